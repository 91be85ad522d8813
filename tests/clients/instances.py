"""Instances in cache-manager mode as the connectors of this directory start them."""

from __future__ import annotations

from typing import Any

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole

HOST = "127.0.0.1"


def open_instance(role: LLMRole, cluster_id: int, port: int | None = None, **properties: Any) -> LLMDataDist:
    """Initialise an instance that listens at a port, if one is given; `properties` are those of LLMConfig."""
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = 5000
    config.enable_cache_manager = True
    if port is not None:
        config.listen_ip_info = f"{HOST}:{port}"
    for name, value in properties.items():
        setattr(config, name, value)
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def cluster_at(cluster_id: int, port: int) -> LLMClusterInfo:
    """Describe a cluster that listens at a port."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info(HOST, 0)
    info.append_remote_ip_info(HOST, port)
    return info
