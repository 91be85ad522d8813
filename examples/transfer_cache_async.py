"""Send the KV of a sequence to a decode process layer by layer, while the model still computes the next layers.

The decode process tells where its tensors lie. The prefill process starts the transfer before its model runs; a layer
leaves as soon as the synchronizer says that it has been computed. First with one slot of a contiguous cache, then with
blocks of a paged cache, placed by block tables.
"""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import (
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS, HIDDEN = 4, 64

BATCH, TOKENS = 3, 16
CONTIGUOUS = CacheDesc(2 * LAYERS, (BATCH, TOKENS, HIDDEN), DataType.DT_FLOAT16)
PREFILL_SLOT, DECODE_SLOT = 0, 2

BLOCKS, TOKENS_PER_BLOCK = 8, 4
PAGED = CacheDesc(2 * LAYERS, (BLOCKS, TOKENS_PER_BLOCK, HIDDEN), DataType.DT_FLOAT16)
PREFILL_TABLE, DECODE_TABLE = [4, 1, 6], [0, 2, 5]

OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20), "llm.SyncKvCacheWaitTime": "5000"}
PATIENCE_SECONDS = 10


class ComputedLayers(LayerSynchronizer):
    """The model counts the layers up, and the transfer waits for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def computed(self, layer_index: int) -> None:
        with self._changed:
            self._count = layer_index + 1
            self._changed.notify_all()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._count > layer_index, PATIENCE_SECONDS)


def prefill(connection: Connection, port: int, paged: bool) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init({**OPTIONS, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    manager = prompt.kv_cache_manager
    connection.send("listening")
    addresses = connection.recv()  # of the tensors in the decode process

    layers = ComputedLayers()
    if paged:
        cache = manager.allocate_blocks_cache(PAGED)
        slots = PREFILL_TABLE
        config = TransferConfig(DECODE, addresses)
        task = manager.transfer_cache_async(cache, layers, [config], PREFILL_TABLE, DECODE_TABLE)
    else:
        cache = manager.allocate_cache(CONTIGUOUS)
        slots = [PREFILL_SLOT]
        slot_bytes = CONTIGUOUS.size // BATCH
        to_slot = [address + DECODE_SLOT * slot_bytes for address in addresses]
        config = TransferConfig(DECODE, to_slot, src_batch_index=PREFILL_SLOT)
        task = manager.transfer_cache_async(cache, layers, [config])

    for layer in range(LAYERS):  # the model
        tensor_view(cache, 2 * layer)[slots] = layer + 1  # K
        tensor_view(cache, 2 * layer + 1)[slots] = -(layer + 1)  # V
        layers.computed(layer)

    connection.send(task.synchronize(1000 * PATIENCE_SECONDS))
    prompt.finalize()


def decode(connection: Connection, port: int, paged: bool) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(dict(OPTIONS))
    manager = decoder.kv_cache_manager
    cache = manager.allocate_blocks_cache(PAGED) if paged else manager.allocate_cache(CONTIGUOUS)
    for tensor in range(2 * LAYERS):
        tensor_view(cache, tensor)[:] = 0

    assert connection.recv() == "listening"
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    assert decoder.link_clusters([cluster])[0] is LLMStatusCode.LLM_SUCCESS
    connection.send(cache.per_device_tensor_addrs[0])

    # The library does not tell the receiver when the layers are there: the program does.
    assert connection.recv() is LLMStatusCode.LLM_SUCCESS
    slots = DECODE_TABLE if paged else [DECODE_SLOT]
    for layer in range(LAYERS):
        for tensor, value in ((2 * layer, layer + 1), (2 * layer + 1, -(layer + 1))):
            view = tensor_view(cache, tensor)
            assert np.all(view[slots] == value)
            assert np.count_nonzero(view) == view[slots].size  # nothing else was written
    decoder.finalize()


def main() -> None:
    for paged in (False, True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with LocalGroup() as group:
            worker = group.start("prefill", prefill, port, paged)
            decode(worker.connection, port, paged)
            assert worker.wait(PATIENCE_SECONDS)


if __name__ == "__main__":
    main()
