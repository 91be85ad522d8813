"""The configuration of an instance, and the options dictionary that is made of it."""

from __future__ import annotations

import json
from typing import Union

from llm_datadist.arguments import UINT32_MAX, check_dict, check_int32, check_isinstance, check_uint32
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.ip_address import find_ip, trans_str_ip
from llm_datadist.option_text import is_decimal
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument

__all__ = ["LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig", "trans_str_ip"]

DeviceIds = Union[int, list[int], tuple[int, ...]]


class LlmConfig:
    """Configuration of `LLMDataDist.init`; `LLMConfig` is another name of this class.

    Each property is checked when it is assigned: TypeError for a wrong type, LLMException with LLM_PARAM_INVALID for a
    value that cannot be used, ValueError for an integer beyond its width. None takes back what was assigned to a
    property of type str, dict, bool or float.
    """

    def __init__(self) -> None:
        self._options: dict[str, str] = {}
        self._ge_options: dict[str, str] = {}
        self._device_id: DeviceIds | None = None
        self._sync_kv_timeout: int | str | None = None
        self._enable_switch_role: bool | None = None
        self._listen_ip_info: str | None = None
        self._mem_utilization: float | None = 0.95
        self._buf_pool_cfg: str | None = None
        self._cluster_info: str | None = None
        self._deploy_res_path: str | None = None
        self._output_max_size: int | None = None
        self._enable_cache_manager: bool | None = None
        self._enable_remote_cache_accessible: bool | None = None
        self._mem_pool_cfg: str | None = None
        self._host_mem_pool_cfg: str | None = None
        self._rdma_traffic_class: int | None = None
        self._rdma_service_level: int | None = None
        self._local_comm_res: str | None = None
        self._link_total_time: int | None = None
        self._link_retry_count: int | None = None
        self._transfer_backend: str | None = None
        self._global_resource_config: str | None = None

    def generate_options(self) -> dict[str, str]:
        """Write the configuration into the options dictionary.

        Returns
        -------
        dict of str to str
            The same object each time. A property wins over the same key in `ge_options`; a key that was written once is
            overwritten by later values, but never removed.

        Examples
        --------
        >>> from llm_datadist import LLMConfig
        >>> config = LLMConfig()
        >>> config.device_id = 0
        >>> config.listen_ip_info = "127.0.0.1:26000"
        >>> config.ge_options = {"ge.flowGraphMemMaxSize": str(1 << 30)}
        >>> options = config.generate_options()
        >>> options["llm.listenIpInfo"], options["ge.exec.deviceId"], options["ge.flowGraphMemMaxSize"]
        ('127.0.0.1:26000', '0', '1073741824')
        """
        self._options.update(self._ge_options)
        entries = {
            "llm.listenIpInfo": self._listen_ip_info or None,
            **_device_entries(self._device_id),
            "llm.SyncKvCacheWaitTime": _decimal(self._sync_kv_timeout),
            "llm.deployResPath": self._deploy_res_path or None,
            "llm.OutputMaxSize": _decimal(self._output_max_size),
            "llm.ClusterInfo": self._cluster_info or None,
            "llm.MemoryUtilization": None if self._mem_utilization is None else str(self._mem_utilization),
            "llm.BufPoolCfg": self._buf_pool_cfg or None,
            "llm.MemPoolConfig": self._mem_pool_cfg or None,
            "llm.HostMemPoolConfig": self._host_mem_pool_cfg or None,
            "llm.EnableSwitchRole": "1" if self._enable_switch_role else None,
            "llm.EnableCacheManager": _flag(self._enable_cache_manager),
            "llm.EnableRemoteCacheAccessible": _flag(self._enable_remote_cache_accessible),
            "llm.RdmaTrafficClass": _decimal(self._rdma_traffic_class),
            "llm.RdmaServiceLevel": _decimal(self._rdma_service_level),
            "llm.LocalCommRes": self._local_comm_res,
            "llm.LinkTotalTime": _decimal(self._link_total_time),
            "llm.LinkRetryCount": _decimal(self._link_retry_count),
            "llm.TransferBackend": self._transfer_backend or None,
            "llm.GlobalResourceConfig": self._global_resource_config,
        }
        self._options.update({key: value for key, value in entries.items() if value is not None})
        return self._options

    gen_options = generate_options

    @property
    def options(self) -> dict[str, str]:
        """The dictionary that `generate_options` fills and gives."""
        return self._options

    @property
    def ge_options(self) -> dict[str, str]:
        """Further options, str to str; ``"ge.flowGraphMemMaxSize"`` is the most memory for caches, in bytes."""
        return self._ge_options

    @ge_options.setter
    def ge_options(self, ge_options: dict[str, str]) -> None:
        if ge_options is not None:
            check_dict("ge_options", ge_options, str, str)
        self._ge_options = {} if ge_options is None else ge_options

    @property
    def device_id(self) -> DeviceIds | None:
        """Device of the process, or a list or tuple of several; int32, >= 0."""
        return self._device_id

    @device_id.setter
    def device_id(self, device_id: DeviceIds) -> None:
        check_isinstance("device_id", device_id, [int, list, tuple], allow_none=False)
        if not isinstance(device_id, int):
            check_isinstance("device_id", device_id, [list, tuple], int)
        for one in _as_list(device_id):
            if one < 0:
                raise InvalidArgument(f"device_id {one} should be >= 0")
            check_int32("device_id", one)
        self._device_id = device_id

    @property
    def sync_kv_timeout(self) -> int | str | None:
        """Milliseconds that a pull, an allocation or a question to a peer may take; int32 > 0, or its decimal text."""
        return self._sync_kv_timeout

    @sync_kv_timeout.setter
    def sync_kv_timeout(self, sync_kv_timeout: int | str) -> None:
        check_isinstance("sync_kv_timeout", sync_kv_timeout, [int, str], allow_none=False)
        if isinstance(sync_kv_timeout, str) and not is_decimal(sync_kv_timeout):
            raise InvalidArgument(f"sync_kv_timeout {sync_kv_timeout!r} should be digits only")
        milliseconds = int(sync_kv_timeout)
        if milliseconds <= 0:
            raise InvalidArgument(f"sync_kv_timeout {milliseconds} should be greater than 0")
        check_int32("sync_kv_timeout", milliseconds)
        self._sync_kv_timeout = sync_kv_timeout

    @property
    def enable_switch_role(self) -> bool:
        """Whether the role may change after ``init``."""
        return bool(self._enable_switch_role)

    @enable_switch_role.setter
    def enable_switch_role(self, enable_switch_role: bool) -> None:
        check_isinstance("enable_switch_role", enable_switch_role, bool)
        self._enable_switch_role = enable_switch_role

    @property
    def listen_ip_info(self) -> str:
        """Address that a PROMPT listens on: ``"ip:port"``; one for each device, joined by ``;``.

        In cache-manager mode any role may listen, at one address.
        """
        return self._listen_ip_info or ""

    @listen_ip_info.setter
    def listen_ip_info(self, listen_ip_info: str) -> None:
        check_isinstance("listen_ip_info", listen_ip_info, str)
        self._listen_ip_info = listen_ip_info

    @property
    def mem_utilization(self) -> float:
        """Share of ``ge.flowGraphMemMaxSize`` that caches may use, in [0.0, 1.0]; a float, 0.95 at first."""
        return 0.95 if self._mem_utilization is None else self._mem_utilization

    @mem_utilization.setter
    def mem_utilization(self, mem_utilization: float) -> None:
        check_isinstance("mem_utilization", mem_utilization, float)
        if mem_utilization is not None and not 0.0 <= mem_utilization <= 1.0:
            raise InvalidArgument(f"mem_utilization {mem_utilization} should be in [0.0, 1.0]")
        self._mem_utilization = mem_utilization

    @property
    def buf_pool_cfg(self) -> str:
        """Size classes of the pool in JSON: ``buf_cfg``, a list of ``total_size``, ``blk_size``, ``max_buf_size``."""
        return self._buf_pool_cfg or ""

    @buf_pool_cfg.setter
    def buf_pool_cfg(self, buf_pool_cfg: str) -> None:
        check_isinstance("buf_pool_cfg", buf_pool_cfg, str)
        self._buf_pool_cfg = buf_pool_cfg

    @property
    def cluster_info(self) -> str:
        """The process in its cluster, in JSON; IP addresses given as text are turned into integers.

        Text that is no JSON is a ``json.JSONDecodeError``.
        """
        return self._cluster_info or ""

    @cluster_info.setter
    def cluster_info(self, cluster_info: str) -> None:
        check_isinstance("cluster_info", cluster_info, str)
        self._cluster_info = None if cluster_info is None else _with_integer_ips(cluster_info)

    @property
    def deploy_res_path(self) -> str:
        """Path of deployment resources."""
        return self._deploy_res_path or ""

    @deploy_res_path.setter
    def deploy_res_path(self, deploy_res_path: str) -> None:
        check_isinstance("deploy_res_path", deploy_res_path, str)
        self._deploy_res_path = deploy_res_path

    @property
    def output_max_size(self) -> int | None:
        """Largest output, an int."""
        return self._output_max_size

    @output_max_size.setter
    def output_max_size(self, output_max_size: int) -> None:
        check_isinstance("output_max_size", output_max_size, int, allow_none=False)
        self._output_max_size = output_max_size

    @property
    def enable_cache_manager(self) -> bool:
        """Whether the instance works in cache-manager mode."""
        return bool(self._enable_cache_manager)

    @enable_cache_manager.setter
    def enable_cache_manager(self, enable_cache_manager: bool) -> None:
        check_isinstance("enable_cache_manager", enable_cache_manager, bool)
        self._enable_cache_manager = enable_cache_manager

    @property
    def enable_remote_cache_accessible(self) -> bool:
        """Whether peers may push into caches, and reach only those that were made accessible; cache-manager mode."""
        return bool(self._enable_remote_cache_accessible)

    @enable_remote_cache_accessible.setter
    def enable_remote_cache_accessible(self, enable_remote_cache_accessible: bool) -> None:
        check_isinstance("enable_remote_cache_accessible", enable_remote_cache_accessible, bool)
        self._enable_remote_cache_accessible = enable_remote_cache_accessible

    @property
    def mem_pool_cfg(self) -> str:
        """Pool of device memory in JSON: ``{"memory_size": N, "page_shift": P}``; cache-manager mode.

        N bytes, in units of ``2**P``; P in [10, 31), by default 16.
        """
        return self._mem_pool_cfg or ""

    @mem_pool_cfg.setter
    def mem_pool_cfg(self, mem_pool_cfg: str) -> None:
        check_isinstance("mem_pool_cfg", mem_pool_cfg, str)
        self._mem_pool_cfg = mem_pool_cfg

    @property
    def host_mem_pool_cfg(self) -> str:
        """Pool of host memory, in the form of `mem_pool_cfg`, at most 20 GiB; cache-manager mode."""
        return self._host_mem_pool_cfg or ""

    @host_mem_pool_cfg.setter
    def host_mem_pool_cfg(self, host_mem_pool_cfg: str) -> None:
        check_isinstance("host_mem_pool_cfg", host_mem_pool_cfg, str)
        self._host_mem_pool_cfg = host_mem_pool_cfg

    @property
    def rdma_traffic_class(self) -> int | None:
        """Traffic class of RDMA, uint32; no effect on a host."""
        return self._rdma_traffic_class

    @rdma_traffic_class.setter
    def rdma_traffic_class(self, rdma_traffic_class: int) -> None:
        self._rdma_traffic_class = check_uint32("rdma_traffic_class", rdma_traffic_class)

    @property
    def rdma_service_level(self) -> int | None:
        """Service level of RDMA, uint32; no effect on a host."""
        return self._rdma_service_level

    @rdma_service_level.setter
    def rdma_service_level(self, rdma_service_level: int) -> None:
        self._rdma_service_level = check_uint32("rdma_service_level", rdma_service_level)

    @property
    def local_comm_res(self) -> str:
        """Communication resources of the process, a rank table in JSON; ``""`` lets the library find them.

        Once it is set, also to ``""``, the instance is in cache-manager mode with remote access, unless those are set.
        """
        return self._local_comm_res or ""

    @local_comm_res.setter
    def local_comm_res(self, local_comm_res: str) -> None:
        check_isinstance("local_comm_res", local_comm_res, str)
        self._local_comm_res = local_comm_res

    @property
    def link_total_time(self) -> int:
        """Seconds for setting a link up, retries included; in [0, 2**32)."""
        return self._link_total_time or 0

    @link_total_time.setter
    def link_total_time(self, link_total_time: int) -> None:
        self._link_total_time = _check_range("link_total_time", link_total_time, 0, UINT32_MAX)

    @property
    def link_retry_count(self) -> int:
        """Attempts of setting a link up, in [1, 100]."""
        return 1 if self._link_retry_count is None else self._link_retry_count

    @link_retry_count.setter
    def link_retry_count(self, link_retry_count: int) -> None:
        self._link_retry_count = _check_range("link_retry_count", link_retry_count, 1, 100)

    @property
    def transfer_backend(self) -> str:
        """Name of the backend that moves bytes: ``"hixl"``, or ``""`` for none; cache-manager mode."""
        return self._transfer_backend or ""

    @transfer_backend.setter
    def transfer_backend(self, transfer_backend: str) -> None:
        check_isinstance("transfer_backend", transfer_backend, str)
        self._transfer_backend = transfer_backend

    @property
    def global_resource_config(self) -> str:
        """Configuration of the backend in JSON; no effect on a host."""
        return self._global_resource_config or ""

    @global_resource_config.setter
    def global_resource_config(self, global_resource_config: str) -> None:
        check_isinstance("global_resource_config", global_resource_config, str)
        self._global_resource_config = global_resource_config


LLMConfig = LlmConfig


def _as_list(device_id: DeviceIds) -> list[int]:
    return [device_id] if isinstance(device_id, int) else list(device_id)


def _device_entries(device_id: DeviceIds | None) -> dict[str, str]:
    if device_id is None:
        return {}
    ids = [f"{one:d}" for one in _as_list(device_id)]
    return {"ge.exec.deviceId": ";".join(ids), "ge.session_device_id": ids[0]}


def _decimal(value: int | str | None) -> str | None:
    return f"{value:d}" if isinstance(value, int) else value


def _flag(value: bool | None) -> str | None:
    return None if value is None else "1" if value else "0"


def _check_range(name: str, value: int, low: int, high: int) -> int:
    check_isinstance(name, value, int, allow_none=False)
    if not low <= value <= high:
        raise InvalidArgument(f"{name} {value} should be in [{low}, {high}]")
    return value


def _with_integer_ips(cluster_info: str) -> str:
    document = json.loads(cluster_info)
    entries = document.get("listen_ip_info") if isinstance(document, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("ip"), str):
            entry["ip"] = find_ip(entry["ip"])
    return json.dumps(document)
