"""A prefill process sends its KV cache to a decode process layer by layer, while the model still computes.

::

    python examples/transfer_cache_async.py             # one slot of a contiguous cache
    python examples/transfer_cache_async.py --blocks    # blocks of a paged cache, by block tables

The decode process tells the prefill process where its tensors lie. The prefill process starts the transfer before its
model runs; each layer leaves as soon as the synchronizer says that it has been computed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import (
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS = 4
BATCH, TOKENS, HIDDEN = 3, 16, 64
CONTIGUOUS = CacheDesc(2 * LAYERS, (BATCH, TOKENS, HIDDEN), DataType.DT_FLOAT16)
PREFILL_SLOT, DECODE_SLOT = 0, 2

BLOCKS, BLOCK_TOKENS = 8, 4
PAGED = CacheDesc(2 * LAYERS, (BLOCKS, BLOCK_TOKENS, HIDDEN), DataType.DT_FLOAT16)
PREFILL_BLOCKS, DECODE_BLOCKS = [4, 1, 6], [0, 2, 5]

PATIENCE_SECONDS = 30


class ComputedLayers(LayerSynchronizer):
    """The model counts the layers up, the transfer waits for them."""

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


def start(role: LLMRole, cluster_id: int, port: int) -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(64 << 20)}
    if role is LLMRole.PROMPT:
        config.listen_ip_info = f"127.0.0.1:{port}"
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def value_of(tensor: int) -> float:
    """What the pretended model writes: 1, -1 for K and V of layer 0, then 2, -2, and so on."""
    layer, is_v = divmod(tensor, 2)
    return -(layer + 1.0) if is_v else layer + 1.0


def prefill(decode: Connection, port: int, blocks: bool) -> None:
    datadist = start(LLMRole.PROMPT, PREFILL, port)
    manager = datadist.kv_cache_manager
    decode.send("listening")
    if blocks:
        cache = manager.allocate_blocks_cache(PAGED)
        addresses = decode.recv()  # a block is found behind the start of its tensor
        slots = PREFILL_BLOCKS
    else:
        cache = manager.allocate_cache(CONTIGUOUS)
        slot_bytes = CONTIGUOUS.size // CONTIGUOUS.num_tensors // BATCH
        addresses = [address + DECODE_SLOT * slot_bytes for address in decode.recv()]
        slots = [PREFILL_SLOT]

    layers = ComputedLayers()
    config = TransferConfig(DECODE, addresses)
    if blocks:
        task = manager.transfer_cache_async(cache, layers, [config], PREFILL_BLOCKS, DECODE_BLOCKS)
    else:
        config.src_batch_index = PREFILL_SLOT
        task = manager.transfer_cache_async(cache, layers, [config])

    for layer in range(LAYERS):  # the model
        for tensor in (2 * layer, 2 * layer + 1):
            tensor_view(cache, tensor)[slots] = value_of(tensor)
        layers.computed(layer)

    decode.send(task.synchronize(PATIENCE_SECONDS * 1000))
    datadist.finalize()


def decode(prefill: Connection, port: int, blocks: bool) -> None:
    datadist = start(LLMRole.DECODER, DECODE, port)
    manager = datadist.kv_cache_manager
    cache = manager.allocate_blocks_cache(PAGED) if blocks else manager.allocate_cache(CONTIGUOUS)
    for tensor in range(2 * LAYERS):
        tensor_view(cache, tensor)[:] = 0
    assert prefill.recv() == "listening"
    link = LLMClusterInfo()
    link.remote_cluster_id = PREFILL
    link.append_local_ip_info("127.0.0.1", 0)
    link.append_remote_ip_info("127.0.0.1", port)
    overall, each = datadist.link_clusters([link])
    assert overall is LLMStatusCode.LLM_SUCCESS, each

    prefill.send(cache.per_device_tensor_addrs[0])
    status = prefill.recv()  # the library does not tell the receiver; the program does
    print("transfer:", status)
    slots = DECODE_BLOCKS if blocks else [DECODE_SLOT]
    for tensor in range(2 * LAYERS):
        view = tensor_view(cache, tensor)
        assert np.all(view[slots] == value_of(tensor))
        assert np.count_nonzero(view) == view[slots].size, "other slots stay as they were"
        print(
            f"layer {tensor // 2} {'KV'[tensor % 2]}: {'blocks' if blocks else 'slots'} {slots} hold {view[slots].mean()}"
        )
    datadist.unlink_clusters([link])
    datadist.finalize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a KV cache layer by layer.")
    parser.add_argument("--blocks", action="store_true", help="send blocks of a paged cache")
    parser.add_argument("--port", type=int, default=26000, help="where the prefill process listens")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=prefill, args=(there, arguments.port, arguments.blocks), daemon=True)
    process.start()
    there.close()
    decode(here, arguments.port, arguments.blocks)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0


if __name__ == "__main__":
    main()
