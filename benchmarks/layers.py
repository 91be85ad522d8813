"""A cache that is sent layer by layer while the model computes the later ones."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from llm_datadist import KvCache, KvCacheManager, LayerSynchronizer, LLMRole, LLMStatusCode, TransferConfig
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

from .instances import TIMEOUT_MS, WAIT_S, answer, free_port, link, new_datadist
from .measurement import Row, Target, time_us
from .prompt_process import DECODER, PROMPT, bytes_desc, pool_for

TOPIC = "layers"
LAYERS = 32
LAYER_BYTES = 8 << 20
COMPUTE_S = 0.002  # a layer
MOST_LAYERS = 1.3
RUNS = 11
DESC = bytes_desc(2 * LAYERS, 1, LAYER_BYTES // 2)


class TimedModel(LayerSynchronizer):
    """A model on a device: one layer is done after the other, at even intervals, and the host sleeps meanwhile."""

    def __init__(self, compute_s: float) -> None:
        self._compute_s = compute_s
        self._done = [threading.Event() for _ in range(LAYERS)]
        self.ended = 0.0

    def compute(self) -> None:
        due = time.perf_counter()
        for layer in self._done:
            due += self._compute_s
            time.sleep(max(0.0, due - time.perf_counter()))
            layer.set()
        self.ended = time.perf_counter()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._done[layer_index].wait(WAIT_S)


def serve(connection: Connection, port: int) -> None:
    """Body of the decoder: link to the prompt, tell the addresses of a cache, and keep it."""
    datadist = new_datadist(LLMRole.DECODER, DECODER, pool_for({0: DESC}))
    link(datadist, PROMPT, port)
    cache = datadist.kv_cache_manager.allocate_cache(DESC)
    connection.send(cache.per_device_tensor_addrs[0])
    connection.recv()
    datadist.finalize()


def measure() -> Iterator[Row]:
    """Send 32 layers behind the computation, and one layer alone."""
    port = free_port()
    with LocalGroup() as group:
        datadist = new_datadist(LLMRole.PROMPT, PROMPT, pool_for({0: DESC}), port)
        try:
            worker = group.start("decoder", serve, port)
            addresses = answer(worker.connection)
            assert isinstance(addresses, list)
            manager = datadist.kv_cache_manager
            cache = manager.allocate_cache(DESC)
            for tensor in range(DESC.num_tensors):
                tensor_view(cache, tensor)[...] = 1
            yield from _measure(manager, cache, addresses)
            worker.connection.send(None)
            worker.wait(WAIT_S)
        finally:
            datadist.finalize()


def _measure(manager: KvCacheManager, cache: KvCache, addresses: list[int]) -> Iterator[Row]:
    ready = TimedModel(0.0)
    ready.compute()
    one = TransferConfig(DECODER, addresses[:2], range(1))
    single: list[float] = []
    whole, after = [], []
    for _ in range(RUNS):
        single += time_us(lambda: manager.transfer_cache_async(cache, ready, [one]).synchronize(TIMEOUT_MS), 5)
        model = TimedModel(COMPUTE_S)
        started = time.perf_counter()
        task = manager.transfer_cache_async(cache, model, [TransferConfig(DECODER, addresses)])
        model.compute()
        status = task.synchronize(TIMEOUT_MS)
        ended = time.perf_counter()
        if status != LLMStatusCode.LLM_SUCCESS:
            raise RuntimeError(f"the transfer ended with {status}")
        whole.append((ended - started) * 1e6)
        after.append((ended - model.ended) * 1e6)
    layer_us = statistics.median(single)
    yield Row(TOPIC, "transfer_cache_async of one layer, 8 MiB", single, LAYER_BYTES)
    yield Row(TOPIC, f"transfer_cache_async, {LAYERS} layers, 2 ms compute each", whole, LAYERS * LAYER_BYTES)
    behind = Target("x one layer", statistics.median(after) / layer_us, MOST_LAYERS, at_least=False)
    yield Row(TOPIC, "end of the transfer behind the end of the computation", after, targets=(behind,))
