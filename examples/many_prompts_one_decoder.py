"""Three prefill processes, one decode process: one call links to all of them, each key says where to pull from."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILLS, DECODE = (1, 2, 3), 9  # cluster ids
KV = CacheDesc(2, (4, 4096), DataType.DT_FLOAT16)  # four sequences
OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20), "llm.SyncKvCacheWaitTime": "5000"}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def prefill(connection: Connection, cluster_id: int, port: int) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, cluster_id)
    prompt.init({**OPTIONS, "llm.listenIpInfo": f"127.0.0.1:{port}"})
    keys = [CacheKey(cluster_id, request) for request in range(4)]  # key i names slot i
    cache = prompt.kv_cache_manager.allocate_cache(KV, keys)
    for request in range(4):
        tensor_view(cache, 0)[request] = tensor_view(cache, 1)[request] = 10 * cluster_id + request
    connection.send("offered")
    connection.recv()  # until the decoder is done
    prompt.finalize()


def decode(ports: dict[int, int]) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(dict(OPTIONS))
    clusters = []
    for cluster_id, port in ports.items():
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = cluster_id
        cluster.append_local_ip_info("127.0.0.1", 0)
        cluster.append_remote_ip_info("127.0.0.1", port)
        clusters.append(cluster)
    overall, each = decoder.link_clusters(clusters)
    assert overall is LLMStatusCode.LLM_SUCCESS, each  # the codes of the clusters, in their order
    cache = decoder.kv_cache_manager.allocate_cache(KV)
    for slot, cluster_id in enumerate(ports):  # one batch of sequences from everywhere
        decoder.kv_cache_manager.pull_cache(CacheKey(cluster_id, req_id=slot), cache, batch_index=slot)
        assert np.all(tensor_view(cache, 1)[slot] == 10 * cluster_id + slot)
    decoder.unlink_clusters(clusters)
    decoder.finalize()


def main() -> None:
    ports = dict(zip(PREFILLS, free_ports(len(PREFILLS))))
    with LocalGroup() as group:
        workers = [group.start(f"prefill-{number}", prefill, number, port) for number, port in ports.items()]
        for worker in workers:
            assert worker.connection.recv() == "offered"
        decode(ports)
        for worker in workers:
            worker.connection.send("done")
            assert worker.wait(10)


if __name__ == "__main__":
    main()
