"""Serve several requests at once with paged KV caches: block tables, a swap to host memory, a forked sequence.

The prompt process computes prompts into blocks of its cache and announces each request with its block table. The
decoder pulls the blocks into free blocks of its own and says so, and the prompt uses its blocks for the next requests.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import socket
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    KvCache,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    Placement,
)

PROMPT_ID, DECODER_ID = 1, 2
NUM_TENSORS = 4  # two layers, K and V of each
BLOCK = (16, 2, 32)  # tokens, heads, numbers of a head
PROMPT_BLOCKS, DECODER_BLOCKS, HOST_BLOCKS = 8, 24, 4
REQUESTS = {101: 3, 102: 4, 103: 2, 104: 4, 105: 1, 106: 3}  # request -> blocks of its prompt
DEADLINE_S = 10


def blocks_desc(num_blocks: int, placement: Placement = Placement.DEVICE) -> CacheDesc:
    return CacheDesc(NUM_TENSORS, (num_blocks, *BLOCK), DataType.DT_FLOAT16, placement)


def tensors(cache: KvCache) -> list[np.ndarray[Any, Any]]:
    """Arrays over the memory of a cache, one for each tensor."""
    desc = cache.cache_desc
    memory = [(ctypes.c_uint8 * desc.size).from_address(address) for address in cache.per_device_tensor_addrs[0]]
    return [np.ctypeslib.as_array(tensor).view(np.float16).reshape(desc.shape) for tensor in memory]


def computed(request: int, tensor: int) -> np.ndarray[Any, Any]:
    """One tensor of the prompt of a request, the same numbers in both processes."""
    return np.random.default_rng((request, tensor)).random((REQUESTS[request], *BLOCK)).astype(np.float16)


def holds(cache: KvCache, table: list[int], request: int) -> bool:
    return all(np.array_equal(array[table], computed(request, i)) for i, array in enumerate(tensors(cache)))


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
    cache = datadist.kv_cache_manager.allocate_blocks_cache(blocks_desc(PROMPT_BLOCKS), BlocksCacheKey(PROMPT_ID))
    pipe.send(port)
    free, waiting = list(range(PROMPT_BLOCKS)), list(REQUESTS)
    tables: dict[int, list[int]] = {}
    while waiting or tables:
        while waiting and REQUESTS[waiting[0]] <= len(free):
            request = waiting.pop(0)
            tables[request] = [free.pop() for _ in range(REQUESTS[request])]
            for i, array in enumerate(tensors(cache)):
                array[tables[request]] = computed(request, i)
            pipe.send((request, tables[request]))
        free += tables.pop(receive(pipe))  # a blocks pull releases nothing: the decoder says which request it has
    receive(pipe)  # the decoder has unlinked
    datadist.finalize()


def decode(pipe: Connection) -> None:
    datadist = start(LLMRole.DECODER, DECODER_ID)
    manager = datadist.kv_cache_manager
    cache = manager.allocate_blocks_cache(blocks_desc(DECODER_BLOCKS))
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT_ID
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", receive(pipe))
    overall, each = datadist.link_clusters([cluster], timeout=5000)
    assert overall == LLMStatusCode.LLM_SUCCESS, each

    free = list(range(DECODER_BLOCKS))
    tables: dict[int, list[int]] = {}
    while len(tables) < len(REQUESTS):
        request, remote_table = receive(pipe)
        tables[request] = [free.pop(0) for _ in remote_table]
        manager.pull_blocks(BlocksCacheKey(PROMPT_ID), cache, remote_table, tables[request])
        pipe.send(request)
        print(f"request {request}: blocks {remote_table} of the prompt -> {tables[request]}")
    assert all(holds(cache, table, request) for request, table in tables.items())

    # Make room: request 102 waits in host memory while others use its blocks, and comes back into different ones.
    host_desc = blocks_desc(HOST_BLOCKS, Placement.HOST)
    host_memory = np.zeros((NUM_TENSORS, *host_desc.shape), np.float16)  # has to live as long as the host cache
    host = KvCache.create_cpu_cache(host_desc, [int(tensor.ctypes.data) for tensor in host_memory])
    manager.swap_blocks(cache, host, {block: slot for slot, block in enumerate(tables[102])})
    for array in tensors(cache):
        array[tables[102]] = 0  # another sequence writes here
    free += tables.pop(102)
    assert np.array_equal(host_memory[0], computed(102, 0))
    tables[102] = [free.pop(0) for _ in range(HOST_BLOCKS)]
    manager.swap_blocks(host, cache, dict(enumerate(tables[102])))
    assert holds(cache, tables[102], 102)
    print(f"request 102: swapped out and back in, now in {tables[102]}")

    # A fork shares the full blocks of its parent; only the last one, which both go on writing, is copied.
    parent = tables[101]
    fork = [*parent[:-1], free.pop(0)]
    manager.copy_blocks(cache, {parent[-1]: [fork[-1]]})
    tensors(cache)[0][fork[-1], -1] = 0  # the fork goes its own way
    assert holds(cache, parent, 101)
    assert not holds(cache, fork, 101)
    print(f"request 101: {parent}, its fork {fork}")

    overall, each = datadist.unlink_clusters([cluster], timeout=5000)
    assert overall == LLMStatusCode.LLM_SUCCESS, each
    pipe.send("unlinked")
    datadist.finalize()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=prompt, args=(there,), daemon=True)  # a daemon ends with this process at the latest
    child.start()
    decode(here)
    child.join(DEADLINE_S)
    assert child.exitcode == 0
