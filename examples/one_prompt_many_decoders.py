"""One prefill process serves three decode processes: each pulls the requests that were given to it."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL = 1  # cluster id
DECODERS, REQUESTS = 3, 12
KV = CacheDesc(2, (1, 4096), DataType.DT_FLOAT16)
OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20), "llm.SyncKvCacheWaitTime": "5000"}


def decode(connection: Connection, cluster_id: int, port: int) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, cluster_id)  # every decoder needs an id of its own
    decoder.init(dict(OPTIONS))
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    cluster.append_local_ip_info("127.0.0.1", 0)
    cluster.append_remote_ip_info("127.0.0.1", port)
    assert decoder.link_clusters([cluster])[0] is LLMStatusCode.LLM_SUCCESS
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(KV)
    for request in connection.recv():
        manager.pull_cache(CacheKey(PREFILL, request), cache)
        assert np.all(tensor_view(cache, 1) == request)
    decoder.unlink_clusters([cluster])
    decoder.finalize()
    connection.send("pulled")


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init({**OPTIONS, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    manager = prompt.kv_cache_manager
    for request in range(REQUESTS):
        cache = manager.allocate_cache(KV, [CacheKey(PREFILL, request)])
        for tensor in range(KV.num_tensors):
            tensor_view(cache, tensor)[:] = request
        manager.deallocate_cache(cache)  # freed when its key is pulled
    with LocalGroup() as group:
        workers = [group.start(f"decode-{number}", decode, 2 + number, port) for number in range(DECODERS)]
        for number, worker in enumerate(workers):
            worker.connection.send(list(range(number, REQUESTS, DECODERS)))
        for worker in workers:
            assert worker.connection.recv() == "pulled"
            assert worker.wait(10)
    prompt.finalize()


if __name__ == "__main__":
    main()
