"""Pull the blocks of a sequence between two paged caches.

Both processes keep the KV of all their sequences in one blocks cache and a block table a sequence. The decode process
pulls the blocks of the sequence into free blocks of its own; the tables say which goes where.
"""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS, BLOCKS, TOKENS_PER_BLOCK, HIDDEN = 2, 32, 16, 64
KV = CacheDesc(2 * LAYERS, (BLOCKS, TOKENS_PER_BLOCK, HIDDEN), DataType.DT_FLOAT16)
KEY = BlocksCacheKey(PREFILL, model_id=0)
OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20), "llm.SyncKvCacheWaitTime": "5000"}


def prefill(connection: Connection, port: int) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init({**OPTIONS, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    cache = prompt.kv_cache_manager.allocate_blocks_cache(KV, KEY)
    table = [5, 17, 2]  # blocks of the sequence, in the order of its tokens
    for tensor in range(KV.num_tensors):
        for position, block in enumerate(table):
            tensor_view(cache, tensor)[block] = 10 * tensor + position
    connection.send(table)
    connection.recv()  # until the decoder is done
    prompt.finalize()


def decode(port: int, remote_table: list[int]) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(dict(OPTIONS))
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    assert decoder.link_clusters([cluster])[0] is LLMStatusCode.LLM_SUCCESS
    cache = decoder.kv_cache_manager.allocate_blocks_cache(KV)
    table = [30, 0, 1]  # free blocks here
    decoder.kv_cache_manager.pull_blocks(KEY, cache, remote_table, table)
    for tensor in range(KV.num_tensors):
        for position, block in enumerate(table):
            assert np.all(tensor_view(cache, tensor)[block] == 10 * tensor + position)
    decoder.finalize()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with LocalGroup() as group:
        worker = group.start("prefill", prefill, port)
        decode(port, worker.connection.recv())
        worker.connection.send("done")
        assert worker.wait(10)


if __name__ == "__main__":
    main()
