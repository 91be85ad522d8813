"""A connector whose prompts push: each layer goes to the decoder as soon as the model has computed it.

A decoder registers its cache under a key, accessible from remote, listens, and tells a prompt with each request which
blocks it has set aside. The prompt links at the first request for a decoder and pushes from a pool of threads, in one
of two ways: a call of `push_blocks` for each layer, or one `transfer_cache_async` that waits for each layer by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from llm_datadist import (
    BlocksCacheKey,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from tests.clients.instances import cluster_at, open_instance
from tests.clients.kv_tensors import KvTensors

THREADS = 12
LAYER_S = 10.0  # that a layer may take to be computed
LINK_MS = 5000
LINKED = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)
PUSH_ATTEMPTS = 100  # while another push uses the link


class Request(NamedTuple):
    """What a prompt is asked for.

    Attributes
    ----------
    seed : int
        Contents that the model computes.
    cluster_id, port : int
        Decoder.
    remote_blocks, blocks : list of int
        Blocks at the decoder and here.
    """

    seed: int
    cluster_id: int
    port: int
    remote_blocks: list[int]
    blocks: list[int]


class PushedInto:
    """A decoder: others push into its cache, two tensors for each layer, while it does something else."""

    def __init__(self, cluster_id: int, cache: KvTensors, port: int) -> None:
        self.cache = cache
        self._datadist = open_instance(LLMRole.DECODER, cluster_id, port, enable_remote_cache_accessible=True)
        self._datadist.cache_manager.register_blocks_cache(
            cache.desc, cache.addresses, BlocksCacheKey(cluster_id), remote_accessible=True
        )

    def close(self) -> None:
        self._datadist.finalize()


class PushingConnector:
    """A prompt.

    Parameters
    ----------
    cluster_id : int
        Of this process.
    cache : KvTensors
        Two tensors for each layer.
    """

    def __init__(self, cluster_id: int, cache: KvTensors) -> None:
        self.cache = cache
        self.layers = cache.desc.num_tensors // 2
        self._datadist = open_instance(LLMRole.PROMPT, cluster_id, local_comm_res="")
        self._manager = self._datadist.cache_manager
        self._handle = self._manager.register_blocks_cache(cache.desc, cache.addresses)
        self._linked: dict[int, Future[None]] = {}
        self._guard = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, "pushing")

    def close(self) -> None:
        self._threads.shutdown()
        self._datadist.finalize()

    def serve(self, requests: list[Request], push: Callable[[PushingConnector, Request], None]) -> None:
        """Compute all requests and push their blocks, many at the same time."""
        for done in [self._threads.submit(push, self, request) for request in requests]:
            done.result()

    def push_each_layer(self, request: Request) -> None:
        """Compute a layer, push it, and so on."""
        self._link(request)
        for layer in range(self.layers):
            self._compute(request, layer)
            self._push_layer(request, range(layer, layer + 1))

    def transfer_all_layers(self, request: Request) -> None:
        """Start the transfer, compute the layers, and wait until they have arrived."""
        self._link(request)
        computed = ComputedLayers(self.layers)
        everything = range(self.layers)
        config = TransferWithCacheKeyConfig(BlocksCacheKey(request.cluster_id), everything, everything)
        task = self._manager.transfer_cache_async(
            self._handle,
            computed,
            [config],
            src_block_indices=request.blocks,
            dst_block_indices=request.remote_blocks,
        )
        for layer in range(self.layers):
            self._compute(request, layer)
            computed.announce(layer)
        results = task.get_results(timeout_in_millis=10_000)
        assert results == [LLMStatusCode.LLM_SUCCESS], results

    def _compute(self, request: Request, layer: int) -> None:
        for tensor in (2 * layer, 2 * layer + 1):
            self.cache.fill_blocks(request.seed, tensor, request.blocks)

    def _push_layer(self, request: Request, layers: range) -> None:
        key = BlocksCacheKey(request.cluster_id)
        for attempt in range(1, PUSH_ATTEMPTS + 1):
            try:
                self._manager.push_blocks(key, self._handle, request.blocks, request.remote_blocks, layers, layers)
            except LLMException as error:
                if error.status_code is not LLMStatusCode.LLM_LINK_BUSY or attempt == PUSH_ATTEMPTS:
                    raise
            else:
                return

    def _link(self, request: Request) -> None:
        """Link to a decoder, once, by whichever thread comes first."""
        with self._guard:
            linked = self._linked.get(request.cluster_id)
            is_first = linked is None
            if linked is None:
                linked = self._linked[request.cluster_id] = Future()
        if is_first:
            _, (code,) = self._datadist.link_clusters([cluster_at(request.cluster_id, request.port)], LINK_MS)
            assert code in LINKED, code
            linked.set_result(None)
        linked.result(LINK_MS / 1000)


class ComputedLayers(LayerSynchronizer):
    """Lets a transfer wait for the layers that the model computes."""

    def __init__(self, layers: int) -> None:
        self._computed = [threading.Event() for _ in range(layers)]

    def announce(self, layer: int) -> None:
        self._computed[layer].set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._computed[layer_index].wait(LAYER_S)
