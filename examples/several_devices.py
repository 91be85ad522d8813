"""One process drives two devices: a cache lies on both, links join device i to device i, a pull moves both parts."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PREFILL, DECODE = 1, 2  # cluster ids
DEVICES = [0, 1]
KV = CacheDesc(2, (1, 4096), DataType.DT_FLOAT16)  # on each device, as with tensor parallelism
REQUEST = CacheKey(PREFILL, req_id=7)


def options(ports: list[int]) -> dict[str, str]:
    config = LLMConfig()
    config.device_id = DEVICES
    config.listen_ip_info = ";".join(f"127.0.0.1:{port}" for port in ports)
    return config.generate_options()


def prefill(connection: Connection, ports: list[int]) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PREFILL)
    prompt.init(options(ports))
    cache = prompt.kv_cache_manager.allocate_cache(KV, [REQUEST])
    for device in DEVICES:
        tensor_view(cache, 0, device)[:] = tensor_view(cache, 1, device)[:] = 100 + device
    connection.send("offered")
    connection.recv()  # until the decoder is done
    prompt.finalize()


def decode(ports: list[int]) -> None:
    decoder = LLMDataDist(LLMRole.DECODER, DECODE)
    decoder.init(options([]))
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PREFILL
    for port in ports:  # one address a device on both sides, in the order of the devices
        cluster.append_local_ip_info("127.0.0.1", 0)
        cluster.append_remote_ip_info("127.0.0.1", port)
    assert decoder.link_clusters([cluster])[0] is LLMStatusCode.LLM_SUCCESS
    cache = decoder.kv_cache_manager.allocate_cache(KV)
    assert len(cache.per_device_tensor_addrs) == len(DEVICES)
    decoder.kv_cache_manager.pull_cache(REQUEST, cache)
    for device, tensor in enumerate(decoder.kv_cache_manager.get_cache_tensors(cache, 1)):
        assert np.all(tensor.numpy() == 100 + device)
    decoder.finalize()


def main() -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in DEVICES]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    with LocalGroup() as group:
        worker = group.start("prefill", prefill, ports)
        assert worker.connection.recv() == "offered"
        decode(ports)
        worker.connection.send("done")
        assert worker.wait(10)


if __name__ == "__main__":
    main()
