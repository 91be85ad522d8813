"""A connector that pulls one block of one tensor with each call.

Every tensor counts as a layer of its own (``tensor_num_per_layer=1``). A decoder that holds some of the layers, a stage
of a pipeline, picks these from the cache of a prompt that holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from tests.clients.instances import cluster_at, open_instance
from tests.clients.kv_tensors import KvTensors

OK = LLMStatusCode.LLM_SUCCESS


class BlockByBlockConnector:
    """One process: a prompt, which listens, or a stage of a decoder.

    Parameters
    ----------
    role : LLMRole
        A label.
    cluster_id : int
        Of this process.
    cache : KvTensors
        Registered as the blocks cache of model 0.
    first : int
        Tensor of the prompt that tensor 0 of this cache stands for.
    port : int, optional
        Where others link to.
    """

    def __init__(
        self, role: LLMRole, cluster_id: int, cache: KvTensors, first: int = 0, port: int | None = None
    ) -> None:
        self.cache = cache
        self.first = first
        self._datadist = open_instance(role, cluster_id, port, enable_remote_cache_accessible=True)
        self._manager = self._datadist.cache_manager
        self._handle = self._manager.register_blocks_cache(
            cache_desc=cache.desc,
            addrs=cache.addresses,
            blocks_cache_key=BlocksCacheKey(prompt_cluster_id=cluster_id, model_id=0),
            remote_accessible=True,
        )

    def close(self) -> None:
        self._datadist.finalize()

    def link(self, cluster_id: int, port: int) -> None:
        result = self._datadist.link_clusters([cluster_at(cluster_id, port)], timeout=5000)
        assert result == (OK, [OK]), result

    def pull(self, cluster_id: int, remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> int:
        """Pull blocks of the tensors that this stage holds; gives the number of calls that this took."""
        key = BlocksCacheKey(cluster_id=cluster_id, model_id=0)
        calls = 0
        for tensor in range(self.cache.desc.num_tensors):
            remote = self.first + tensor
            for remote_block, local_block in zip(remote_blocks, local_blocks):
                self._manager.pull_blocks(
                    key,
                    self._handle,
                    src_blocks=[remote_block],
                    dst_blocks=[local_block],
                    src_layer_range=range(remote, remote + 1),
                    dst_layer_range=range(tensor, tensor + 1),
                    tensor_num_per_layer=1,
                )
                calls += 1
        return calls
