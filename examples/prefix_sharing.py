"""Share the KV of a common prefix: compute it once, pull it once, copy it into the slot of every request.

Many requests begin with the same system prompt. The prefill process keeps the KV of that prefix under a prefix key,
which stays until it is removed, however often it is pulled. The decode process pulls it once; each request then gets
a copy in its own slot, where decoding goes on behind the prefix.

Run it: python examples/prefix_sharing.py
"""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS, TOKENS, HIDDEN = 2, 256, 64
PREFIX_TOKENS, REQUESTS = 100, 4
PREFIX = CacheDesc(2 * LAYERS, (1, PREFIX_TOKENS, HIDDEN), DataType.DT_FLOAT16)
BATCH = CacheDesc(2 * LAYERS, (REQUESTS, TOKENS, HIDDEN), DataType.DT_FLOAT16)
NO_REQUEST = 2**64 - 1  # a prefix belongs to no request
SYSTEM_PROMPT = CacheKey(PREFILL, req_id=NO_REQUEST, prefix_id=1)
OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20), "llm.SyncKvCacheWaitTime": "5000"}


def prefill(connection: Connection, port: int) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init({**OPTIONS, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    manager = prompt.kv_cache_manager
    cache = manager.allocate_cache(PREFIX, [SYSTEM_PROMPT])
    for tensor in range(PREFIX.num_tensors):
        tensor_view(cache, tensor)[:] = tensor + 0.5  # where a model writes the K and V of the prefix
    connection.send("offered")
    connection.recv()  # until the decoder is done
    manager.remove_cache_key(SYSTEM_PROMPT)
    manager.deallocate_cache(cache)
    prompt.finalize()


def decode(port: int) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(dict(OPTIONS))
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    assert decoder.link_clusters([cluster], timeout=5000)[0] is LLMStatusCode.LLM_SUCCESS
    manager = decoder.kv_cache_manager
    prefix = manager.allocate_cache(PREFIX)
    batch = manager.allocate_cache(BATCH)

    manager.pull_cache(SYSTEM_PROMPT, prefix)
    for slot in range(REQUESTS):
        # A slot of the batch is longer than the prefix: its other tokens are left for the request.
        manager.copy_cache(batch, prefix, dst_batch_index=slot, req_id=1000 + slot)
    print(f"prefix of {PREFIX_TOKENS} tokens pulled once, copied into {REQUESTS} slots")

    for tensor in range(BATCH.num_tensors):
        shared = tensor_view(batch, tensor)[:, :PREFIX_TOKENS]
        assert np.all(shared == tensor + 0.5)
    manager.pull_cache(SYSTEM_PROMPT, prefix)  # a prefix key is still there after a pull
    decoder.unlink_clusters([cluster])
    decoder.finalize()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with LocalGroup() as group:
        worker = group.start("prefill", prefill, port)
        assert worker.connection.recv() == "offered"
        decode(port)
        worker.connection.send("done")
        assert worker.wait(10)


if __name__ == "__main__":
    main()
