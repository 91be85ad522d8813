"""Instances for the benchmarks, and links between them."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

HOST = "127.0.0.1"
TIMEOUT_MS = 10_000
WAIT_S = 60.0


def new_datadist(role: LLMRole, cluster_id: int, pool_bytes: int, port: int | None = None) -> LLMDataDist:
    """Make an initialised instance with a pool, which listens on a port if one is given."""
    config = _new_config(port)
    config.mem_utilization = 1.0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(pool_bytes)}
    return _initialised(role, cluster_id, config)


def new_cache_manager(cluster_id: int, port: int | None = None) -> LLMDataDist:
    """Make an initialised instance in cache-manager mode without a pool."""
    config = _new_config(port)
    config.enable_cache_manager = True
    return _initialised(LLMRole.MIX, cluster_id, config)


def link(datadist: LLMDataDist, remote_id: int, port: int) -> None:
    """Link to a cluster that listens on a port of this host."""
    info = LLMClusterInfo()
    info.remote_cluster_id = remote_id
    info.append_local_ip_info(HOST, 0)
    info.append_remote_ip_info(HOST, port)
    overall, _ = datadist.link_clusters([info], TIMEOUT_MS)
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"linking to cluster {remote_id} failed: {overall}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def answer(connection: Connection) -> object:
    """Give what a worker says next."""
    if not connection.poll(WAIT_S):
        raise RuntimeError(f"a process of the benchmark did not answer within {WAIT_S:.0f} s")
    return connection.recv()


def _new_config(port: int | None) -> LLMConfig:
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = TIMEOUT_MS
    if port is not None:
        config.listen_ip_info = f"{HOST}:{port}"
    return config


def _initialised(role: LLMRole, cluster_id: int, config: LLMConfig) -> LLMDataDist:
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist
