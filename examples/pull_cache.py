"""Pull the KV cache of a request, by its key, from the process that computed it.

The prefill process writes K and V of two layers and offers them under the key of request 7. The decode process links
to it and pulls them into its own cache. A key is pulled once: after the pull the prefill process no longer holds the
memory.
"""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
LAYERS, SEQUENCES, TOKENS, HIDDEN = 2, 1, 128, 64
KV = CacheDesc(2 * LAYERS, (SEQUENCES, TOKENS, HIDDEN), DataType.DT_FLOAT16)  # K and V of each layer
REQUEST = CacheKey(PREFILL, req_id=7)


def options(listen: str = "") -> dict[str, str]:
    config = LLMConfig()
    config.device_id = 0
    config.listen_ip_info = listen
    config.sync_kv_timeout = 5000
    config.ge_options = {"ge.flowGraphMemMaxSize": str(64 << 20)}
    return config.generate_options()


def prefill(connection: Connection, port: int) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init(options(f"127.0.0.1:{port}"))
    cache = prompt.kv_cache_manager.allocate_cache(KV, [REQUEST])
    for tensor in range(KV.num_tensors):
        tensor_view(cache, tensor)[:] = tensor + 0.5  # where a model writes its K and V
    prompt.kv_cache_manager.deallocate_cache(cache)  # the key holds the memory until it is pulled
    connection.send("offered")
    connection.recv()  # until the decoder is done
    prompt.finalize()


def decode(port: int) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(options())
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    overall, _ = decoder.link_clusters([cluster], timeout=5000)
    assert overall is LLMStatusCode.LLM_SUCCESS, overall
    cache = decoder.kv_cache_manager.allocate_cache(KV)
    decoder.kv_cache_manager.pull_cache(REQUEST, cache, batch_index=0)
    for tensor in range(KV.num_tensors):
        assert np.all(tensor_view(cache, tensor) == tensor + 0.5)
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
