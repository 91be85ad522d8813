"""Push the KV cache layer by layer into a decoder while the model still computes, behind a prefix that requests share.

Two requests begin with the same prefix: the decoder pulls it once by its prefix key and copies it into both sequences.
The prompt process computes what follows, and each layer is on its way while the next one is being computed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)

PROMPT_ID, DECODER_ID, LAYERS, WIDTH = 1, 2, 4, 256
PREFIX, SUFFIX, ROOM = 32, 48, 128  # tokens: shared, own, and what a sequence of the decoder has room for
PREFIX_KEY = CacheKey(PROMPT_ID, 2**64 - 1, 0, 7)  # a key with a prefix id names no request
OK, DEADLINE_S = LLMStatusCode.LLM_SUCCESS, 10


def cache_desc(sequences: int, tokens: int) -> CacheDesc:
    return CacheDesc(2 * LAYERS, (sequences, tokens, WIDTH), DataType.DT_FLOAT)


def tensors(cache: KvCache) -> list[np.ndarray[Any, Any]]:
    """Arrays over the memory of a cache: K and V of layer 0, then of layer 1, and so on."""
    desc = cache.cache_desc
    memory = [(ctypes.c_uint8 * desc.size).from_address(address) for address in cache.per_device_tensor_addrs[0]]
    return [np.ctypeslib.as_array(tensor).view(np.float32).reshape(desc.shape) for tensor in memory]


def computed(seed: int, tensor: int, tokens: int) -> np.ndarray[Any, Any]:
    """One tensor of one sequence, the same in both processes; a few passes over it stand for the work of a layer."""
    state = np.random.default_rng((seed, tensor)).standard_normal((tokens, WIDTH), dtype=np.float32)
    for _ in range(20):
        state = np.tanh(np.cumsum(state, axis=0))
    return state


class Model(LayerSynchronizer):
    """Computes layers in the caller's thread; the transfer's thread waits in `synchronize_layer` until one is done."""

    def __init__(self) -> None:
        self._done = [threading.Event() for _ in range(LAYERS)]

    def compute(self, cache: KvCache, layer: int) -> None:
        for tensor in (2 * layer, 2 * layer + 1):
            for sequence, memory in enumerate(tensors(cache)[tensor]):
                memory[:] = computed(1 + sequence, tensor, SUFFIX)
        self._done[layer].set()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return self._done[layer_index].wait(DEADLINE_S)


def receive(pipe: Connection) -> Any:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError("the other process says nothing")
    return pipe.recv()


def start(role: LLMRole, cluster_id: int, listen: str = "") -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.listen_ip_info = listen
    config.ge_options = {"ge.flowGraphMemMaxSize": str(16 << 20)}
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def prompt(pipe: Connection) -> None:
    with socket.socket() as probe:  # a port that is free
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    datadist = start(LLMRole.PROMPT, PROMPT_ID, f"127.0.0.1:{port}")
    manager = datadist.kv_cache_manager
    prefix = manager.allocate_cache(cache_desc(1, PREFIX), [PREFIX_KEY])
    for tensor, memory in enumerate(tensors(prefix)):
        memory[0] = computed(0, tensor, PREFIX)
    manager.deallocate_cache(prefix)  # its key holds the memory until it is removed
    pipe.send(port)

    cache = manager.allocate_cache(cache_desc(2, SUFFIX))
    configs = [TransferConfig(DECODER_ID, addrs, src_batch_index=i) for i, addrs in enumerate(receive(pipe))]
    model = Model()
    task = manager.transfer_cache_async(cache, model, configs)
    for layer in range(LAYERS):
        print(f"layer {layer} computes, transfer: {task.synchronize(0)}")  # it cannot end before the last layer
        model.compute(cache, layer)
    pipe.send(task.get_results(DEADLINE_S * 1000))

    manager.remove_cache_key(PREFIX_KEY)
    pipe.send("prefix removed")
    while receive(pipe) == "push":  # the model has computed every layer: nothing to wait for
        pipe.send(manager.transfer_cache_async(cache, model, configs).get_results(DEADLINE_S * 1000))
    datadist.finalize()


def decode(pipe: Connection) -> None:
    datadist = start(LLMRole.DECODER, DECODER_ID)
    manager = datadist.kv_cache_manager
    prefix, cache = manager.allocate_cache(cache_desc(1, PREFIX)), manager.allocate_cache(cache_desc(2, ROOM))
    prompt_cluster = LLMClusterInfo()
    prompt_cluster.remote_cluster_id = PROMPT_ID
    prompt_cluster.append_local_ip_info("127.0.0.1", 0)
    prompt_cluster.append_remote_ip_info("127.0.0.1", receive(pipe))

    def pull_status(key: CacheKey) -> LLMStatusCode:
        try:
            manager.pull_cache(key, prefix)
        except LLMException as error:
            return error.status_code
        return OK

    def check_bytes() -> None:
        for tensor, memory in enumerate(tensors(cache)):
            for i in range(2):
                np.testing.assert_array_equal(memory[i, :PREFIX], computed(0, tensor, PREFIX))
                np.testing.assert_array_equal(memory[i, PREFIX:][:SUFFIX], computed(1 + i, tensor, SUFFIX))

    assert datadist.link_clusters([prompt_cluster]) == (OK, [OK])
    assert pull_status(CacheKey(PROMPT_ID, req_id=404)) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert pull_status(PREFIX_KEY) == OK  # the link is as good as before the error
    # Pushed bytes go behind the prefix of each sequence.
    starts = [(sequence * ROOM + PREFIX) * WIDTH * 4 for sequence in range(2)]
    pipe.send([[address + start for address in cache.per_device_tensor_addrs[0]] for start in starts])
    for sequence in range(2):  # meanwhile the layers arrive
        manager.copy_cache(cache, prefix, dst_batch_index=sequence)
    assert receive(pipe) == [OK, OK]
    check_bytes()
    print("both sequences are whole")

    assert receive(pipe) == "prefix removed"
    assert pull_status(PREFIX_KEY) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert datadist.unlink_clusters([prompt_cluster]) == (OK, [OK])
    assert pull_status(PREFIX_KEY) == LLMStatusCode.LLM_NOT_YET_LINK
    pipe.send("push")  # without a link: the first config ends the job, the second one gets no result
    assert receive(pipe) == [LLMStatusCode.LLM_NOT_YET_LINK, None]

    tensors(cache)[0][:, PREFIX:] = 0
    assert datadist.link_clusters([prompt_cluster]) == (OK, [OK])
    pipe.send("push")
    assert receive(pipe) == [OK, OK]
    check_bytes()
    print("pushed once more, over a new link")
    assert datadist.unlink_clusters([prompt_cluster]) == (OK, [OK])
    pipe.send("end")
    datadist.finalize()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=prompt, args=(there,), daemon=True)  # a daemon ends with this process at the latest
    child.start()
    decode(here)
    child.join(DEADLINE_S)
    assert child.exitcode == 0
