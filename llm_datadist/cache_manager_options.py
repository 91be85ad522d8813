"""Options of an instance in cache-manager mode: from texts to checked values, in the documented order."""

from __future__ import annotations

import json
from typing import NamedTuple

from llm_datadist.arguments import INT32_MAX, UINT32_MAX
from llm_datadist.cluster_info_option import DEVICE_ID, LISTEN_IP_INFO, optional_listen
from llm_datadist.engine.options import CacheManagerOptions
from llm_datadist.mem_pool_option import MemPool, parse_mem_pool
from llm_datadist.mode_rules import CACHE_MANAGER, LOCAL_COMM_RES, REMOTE_ACCESS, TRANSFER_BACKEND, ModeRules
from llm_datadist.option_text import option_number, option_text
from llm_datadist.status import InvalidArgument

_BACKEND = "hixl"
_DEVICE_POOL = "llm.MemPoolConfig"
_HOST_POOL = "llm.HostMemPoolConfig"
_HOST_POOL_LIMIT = 20 << 30
_RESOURCES_VERSIONS = ("1.0", "1.2", "1.3")


class CacheManagerInit(NamedTuple):
    """What the options come to.

    Attributes
    ----------
    device_id : int
        Device of the process.
    options : CacheManagerOptions
        For the engine.
    rules : ModeRules
        For the calls of the instance.
    """

    device_id: int
    options: CacheManagerOptions
    rules: ModeRules


def wants_cache_manager(options: dict[str, str]) -> bool:
    """Tell the mode that the options choose.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: an option of the cache-manager mode is there that would choose the mode, but it is off.
    """
    given = options.get(CACHE_MANAGER)
    if LOCAL_COMM_RES in options and given not in (None, "1"):
        raise InvalidArgument(
            f"{LOCAL_COMM_RES} is given, but {CACHE_MANAGER} is not configured: it is {given!r}, should be '1'"
        )
    wanted = given == "1" or LOCAL_COMM_RES in options
    if _has_backend(options) and not wanted:
        raise InvalidArgument(f"{TRANSFER_BACKEND} is given, but {CACHE_MANAGER} is not configured, should be '1'")
    return wanted


def read_cache_manager_options(options: dict[str, str]) -> CacheManagerInit:
    """Check the options of the mode; raises what `read_init_options` documents.

    ``llm.RdmaTrafficClass``, ``llm.RdmaServiceLevel`` and ``llm.GlobalResourceConfig`` are checked for programs that
    run elsewhere too, and have no effect on a host.
    """
    resources = option_text(options, LOCAL_COMM_RES)
    has_backend = _has_backend(options)
    remote_access = _remote_access(options, resources is not None, has_backend)
    if has_backend:
        _check_backend(options)
    listen = optional_listen(options)
    device_pool = _pool(options, _DEVICE_POOL, None)
    host_pool = _pool(options, _HOST_POOL, _HOST_POOL_LIMIT)
    device_id = _device_id(options)
    _check_resources(resources)
    _check_resource_config("llm.GlobalResourceConfig", option_text(options, "llm.GlobalResourceConfig"))
    for key in ("llm.RdmaTrafficClass", "llm.RdmaServiceLevel"):
        option_number(key, option_text(options, key), 0, UINT32_MAX)
    total_time = option_number("llm.LinkTotalTime", option_text(options, "llm.LinkTotalTime"), 0, UINT32_MAX)
    retry_count = option_number("llm.LinkRetryCount", option_text(options, "llm.LinkRetryCount"), 1, 100)
    engine = CacheManagerOptions(
        remote_access=remote_access,
        device_pool_bytes=device_pool.memory_size,
        host_pool_bytes=host_pool.memory_size,
        device_page_bytes=device_pool.page_bytes,
        host_page_bytes=host_pool.page_bytes,
        link_total_time_s=total_time or 0,
        link_retry_count=1 if retry_count is None else retry_count,
        has_backend=has_backend,
    )
    rules = ModeRules(cache_manager=True, has_backend=has_backend, needs_local_address=not resources, listen=listen)
    return CacheManagerInit(device_id, engine, rules)


def _has_backend(options: dict[str, str]) -> bool:
    """Tell whether a transfer backend is asked for; an empty name asks for none."""
    return bool(option_text(options, TRANSFER_BACKEND))


def _remote_access(options: dict[str, str], has_resources: bool, has_backend: bool) -> bool:
    given = option_text(options, REMOTE_ACCESS)
    if has_backend and given not in (None, "1"):
        raise InvalidArgument(f"{TRANSFER_BACKEND} is given, but {REMOTE_ACCESS} is {given!r}, should be '1'")
    return given == "1" or (given is None and (has_resources or has_backend))


def _check_backend(options: dict[str, str]) -> None:
    if not option_text(options, LISTEN_IP_INFO):
        raise InvalidArgument(f"{TRANSFER_BACKEND} is given, but {LISTEN_IP_INFO} is not, should be ip:port")
    backend = options[TRANSFER_BACKEND]
    if backend != _BACKEND:
        raise InvalidArgument(f"{TRANSFER_BACKEND} is {backend!r}, should be {_BACKEND!r}")


def _pool(options: dict[str, str], key: str, limit: int | None) -> MemPool:
    text = option_text(options, key)
    return MemPool() if text is None else parse_mem_pool(key, text, limit)


def _device_id(options: dict[str, str]) -> int:
    text = option_text(options, DEVICE_ID)
    if text is not None and ";" in text:
        raise InvalidArgument(f"{DEVICE_ID} is {text!r}, should be one device in cache-manager mode")
    return option_number(DEVICE_ID, text, 0, INT32_MAX) or 0


def _check_resources(text: str | None) -> None:
    """Check a description of the process's communication resources, in the form of a rank table."""
    document = _check_resource_config(LOCAL_COMM_RES, text)
    if document is not None and document.get("version") not in _RESOURCES_VERSIONS:
        raise InvalidArgument(
            f"{LOCAL_COMM_RES} has the version {document.get('version')!r}, should be one of"
            f" {', '.join(_RESOURCES_VERSIONS)}"
        )


def _check_resource_config(key: str, text: str | None) -> dict[str, object] | None:
    """Check for nothing, an empty text or an object in JSON, and give that."""
    if not text:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{key} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"{key} is {text[:64]!r}, should be an object in JSON, or empty")
    return document
