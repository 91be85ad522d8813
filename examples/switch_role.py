"""Two processes exchange their roles: the decoder becomes the prompt, and the prompt pulls from it.

Run it: python examples/switch_role.py
"""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

KV = CacheDesc(num_tensors=2, shape=(1, 1024), data_type=DataType.DT_FLOAT16)


def start(role: LLMRole, cluster_id: int, listen: str = "") -> LLMDataDist:
    """Make an instance whose role may change."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_switch_role = True
    config.ge_options = {"ge.flowGraphMemMaxSize": str(64 << 20)}
    config.listen_ip_info = listen
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def cluster(cluster_id: int, port: int) -> LLMClusterInfo:
    """Say where a prompt listens."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", port)
    return info


def pull(datadist: LLMDataDist, cluster_id: int, port: int) -> float:
    """Link to a prompt, pull request 7, unlink, and give the first value that came."""
    linked, _ = datadist.link_clusters([cluster(cluster_id, port)])
    assert linked == LLMStatusCode.LLM_SUCCESS, linked
    cache = datadist.kv_cache_manager.allocate_cache(KV)
    datadist.kv_cache_manager.pull_cache(CacheKey(cluster_id, req_id=7), cache)
    datadist.unlink_clusters([cluster(cluster_id, port)])
    return float(tensor_view(cache, 0)[0, 0])


def offer(datadist: LLMDataDist, cluster_id: int, value: float) -> None:
    """Write a cache and name it."""
    cache = datadist.kv_cache_manager.allocate_cache(KV, [CacheKey(cluster_id, req_id=7)])
    tensor_view(cache, 0)[:] = value
    datadist.kv_cache_manager.deallocate_cache(cache)  # the key holds it until it is pulled


def other(connection: Connection, port: int, new_port: int) -> None:
    """Process 2: pull as DECODER, then become PROMPT and offer a cache."""
    datadist = start(LLMRole.DECODER, 2)
    print(f"process 2, decoder: pulled {pull(datadist, 1, port)}")
    datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": f"127.0.0.1:{new_port}"})
    offer(datadist, 2, 2.0)
    connection.send("switched")
    connection.recv()
    datadist.finalize()


def free_ports(count: int) -> list[int]:
    """Find ports on which nobody listens."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> None:
    """Process 1: offer a cache as PROMPT, then become DECODER and pull."""
    port, new_port = free_ports(2)
    datadist = start(LLMRole.PROMPT, 1, f"127.0.0.1:{port}")
    offer(datadist, 1, 1.0)
    with LocalGroup() as group:
        worker = group.start("process 2", other, port, new_port)
        assert worker.connection.recv() == "switched"
        datadist.switch_role(LLMRole.DECODER)
        print(f"process 1, decoder now: pulled {pull(datadist, 2, new_port)}")
        worker.connection.send("done")
        worker.wait(10)
    datadist.finalize()


if __name__ == "__main__":
    main()
