"""The calls of `CacheManager` that write into caches of a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.cache import Cache
from llm_datadist.cache_keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist.cache_manager_access import CacheManagerAccess
from llm_datadist.pull_arguments import DEFAULT_TENSORS_PER_LAYER
from llm_datadist.push_arguments import check_push_blocks, check_push_cache
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist._local import BlockList


class PushCalls(CacheManagerAccess):
    """Base of `CacheManager`; both calls need ``enable_remote_cache_accessible``."""

    def push_cache(
        self,
        dst_cache_key: CacheKeyByIdAndIndex,
        src_cache: Cache,
        src_batch_index: int = 0,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        size: int = -1,
        tensor_num_per_layer: int = DEFAULT_TENSORS_PER_LAYER,
    ) -> None:
        """Copy one slot of a local cache into a slot of a remote one, tensor by tensor.

        Returns when the bytes are there; the peer is not told.

        Parameters
        ----------
        dst_cache_key : CacheKeyByIdAndIndex
            Remote slot; its cluster chooses the link.
        src_cache : Cache
            Local plain cache, of either placement.
        src_batch_index : int
            Local slot, uint32.
        src_layer_range, dst_layer_range : range, optional
            Layers of the local and of the remote cache, step 1, not empty, equally many; None means as many as the
            local cache has, from the first on.
        size : int
            Only -1, the whole slot.
        tensor_num_per_layer : int
            Tensors that make one layer; divides the number of tensors.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An integer is out of the range of its width.
        LLMException
            LLM_PARAM_INVALID: no remote access, blocks cache, the own cluster, another size, or slots, layers or bytes
            that do not exist or do not fit. LLM_KV_CACHE_NOT_EXIST: there is no such cache there that peers may reach,
            or the local one is deallocated. LLM_NOT_YET_LINK: no link. LLM_LINK_BUSY: the link is in use. LLM_TIMEOUT:
            not finished within sync_kv_timeout, or the peer is gone.
        """
        self._require_remote_access("push_cache")
        tensors = check_push_cache(
            dst_cache_key,
            src_cache,
            src_batch_index,
            src_layer_range,
            dst_layer_range,
            size,
            tensor_num_per_layer,
            self._cluster_id,
        )
        key = dst_cache_key
        self._engine.push_cache(key._cluster_id, key._name, self._engine_id(src_cache), src_batch_index, *tensors)

    def push_blocks(
        self,
        dst_cache_key: BlocksCacheKey,
        src_cache: Cache,
        src_blocks: BlockList = (),
        dst_blocks: BlockList = (),
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        tensor_num_per_layer: int = DEFAULT_TENSORS_PER_LAYER,
    ) -> None:
        """Copy block ``src_blocks[i]`` of a local blocks cache into block ``dst_blocks[i]`` of a remote one.

        Returns when the bytes are there; the peer is not told.

        Parameters
        ----------
        dst_cache_key : BlocksCacheKey
            Remote blocks cache; its cluster chooses the link.
        src_cache : Cache
            Local blocks cache, of either placement.
        src_blocks, dst_blocks : list or tuple of int, or one-dimensional array of integers
            Block table of the transfer: equally many, at least one.
        src_layer_range, dst_layer_range, tensor_num_per_layer
            As in `push_cache`.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A block number or a number of the key is no uint64, or `tensor_num_per_layer` no uint32.
        LLMException
            LLM_PARAM_INVALID: no remote access, plain cache, the own cluster, empty or unequal lists, or layers or
            blocks that do not exist or do not fit. The others as in `push_cache`.
        """
        self._require_remote_access("push_blocks")
        tensors = check_push_blocks(
            dst_cache_key,
            src_cache,
            src_blocks,
            dst_blocks,
            src_layer_range,
            dst_layer_range,
            tensor_num_per_layer,
            self._cluster_id,
        )
        key = dst_cache_key
        self._engine.push_blocks(
            key._cluster_id, key._name, self._engine_id(src_cache), src_blocks, dst_blocks, *tensors
        )

    def _require_remote_access(self, function: str) -> None:
        if not self._remote_access:
            raise InvalidArgument(f"[{function}] is not supported without llm.EnableRemoteCacheAccessible")
