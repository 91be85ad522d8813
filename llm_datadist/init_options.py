"""Options of `LLMDataDist.init`: from the dictionary of texts to checked values, in the documented order."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist.arguments import INT32_MAX, check_isinstance
from llm_datadist.buf_pool_option import KEY as BUF_POOL
from llm_datadist.buf_pool_option import parse_buf_pool
from llm_datadist.cache_manager_options import read_cache_manager_options, wants_cache_manager
from llm_datadist.cluster_info_option import CLUSTER_INFO, own_cluster
from llm_datadist.engine.copy_threads import MAX_THREADS
from llm_datadist.engine.device_choice import OPTION as DEVICE_BACKEND
from llm_datadist.engine.options import EngineOptions, NetworkOptions, SizeClass
from llm_datadist.known_options import warn_of_unknown
from llm_datadist.mode_rules import ModeRules
from llm_datadist.option_text import is_decimal, option_number, option_text
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument

COPY_THREADS = "llm.CopyThreads"
DATA_ADDRESS = "llm.DataAddress"
DATA_CHECKSUM = "llm.DataChecksum"
DATA_PORTS = "llm.DataPorts"
TRANSPORT = "llm.Transport"
MEMORY_SIZE = "ge.flowGraphMemMaxSize"
MEMORY_UTILIZATION = "llm.MemoryUtilization"
ROLE = "llm.Role"
SWITCH_ROLE = "llm.EnableSwitchRole"
SYNC_KV_TIMEOUT = "llm.SyncKvCacheWaitTime"

_ROLE_NAMES = {LLMRole.PROMPT: "Prompt", LLMRole.DECODER: "Decoder", LLMRole.MIX: "Mix"}
_DEFAULT_UTILIZATION = 0.95
_MIN_POOL_BYTES = 512  # what the smallest tensor occupies
_MAX_POOL_DIGITS = 19  # what an int64 can have; Python refuses to convert very long numbers


class InitOptions(NamedTuple):
    """What the options of an instance come to.

    Attributes
    ----------
    engine : EngineOptions
        What the engine is made from.
    entries : dict of str to str
        What is written into the program's dictionary when the engine runs; nothing in cache-manager mode.
    rules : ModeRules
        Which calls the instance offers.
    """

    engine: EngineOptions
    entries: dict[str, str]
    rules: ModeRules


def read_init_options(role: LLMRole, cluster_id: int, options: dict[str, str]) -> InitOptions:
    """Check the options of an instance; the dictionary stays as it is.

    Raises
    ------
    TypeError
        `options` is no dict, or a value is no str.
    ValueError
        The memory utilisation or the port of a listen address is no number, or the port is out of range.
    RuntimeError
        The IP of a listen address cannot be parsed.
    LLMException
        LLM_PARAM_INVALID: an option is missing or cannot be used.
    """
    check_isinstance("options", options, dict, allow_none=False)
    warn_of_unknown(options)
    pool_bytes = _pool_bytes(options)
    if wants_cache_manager(options):
        return _read_cache_manager(role, cluster_id, options)
    cluster = own_cluster(role, cluster_id, options)
    classes = _buf_pool_classes(options)
    engine = EngineOptions(
        role=role,
        cluster_id=cluster.cluster_id,
        device_ids=cluster.device_ids,
        listen=cluster.listen,
        enable_switch_role=_enable_switch_role(options),
        sync_kv_timeout_ms=_sync_kv_timeout_ms(options),
        pool_bytes=sum(size_class.total_size for size_class in classes) if classes else pool_bytes,
        buf_pool_classes=classes,
        copy_threads=_copy_threads(options),
        network=_network(options),
        device_backend=option_text(options, DEVICE_BACKEND),
    )
    return InitOptions(engine, {ROLE: _ROLE_NAMES[role], CLUSTER_INFO: cluster.text}, ModeRules())


def _read_cache_manager(role: LLMRole, cluster_id: int, options: dict[str, str]) -> InitOptions:
    """Check the options of an instance in cache-manager mode, where any role may listen."""
    init = read_cache_manager_options(options)
    engine = EngineOptions(
        role=role,
        cluster_id=cluster_id,
        device_ids=(init.device_id,),
        listen=() if init.rules.listen is None else (init.rules.listen,),
        enable_switch_role=_enable_switch_role(options),
        sync_kv_timeout_ms=_sync_kv_timeout_ms(options),
        cache_manager=init.options,
        copy_threads=_copy_threads(options),
        network=_network(options),
        device_backend=option_text(options, DEVICE_BACKEND),
    )
    return InitOptions(engine, {}, init.rules)


def _pool_bytes(options: dict[str, str]) -> int | None:
    size_text = option_text(options, MEMORY_SIZE)
    if size_text is not None:
        _check_memory_size(size_text)
    utilization = float(options.get(MEMORY_UTILIZATION, _DEFAULT_UTILIZATION))
    if not 0.0 <= utilization <= 1.0:
        raise InvalidArgument(f"{MEMORY_UTILIZATION} is {utilization}, should be in [0.0, 1.0]")
    if size_text is None:
        return None
    usable = int(int(size_text) * utilization)
    if usable < _MIN_POOL_BYTES:
        raise InvalidArgument(
            f"{MEMORY_SIZE} is {size_text} and {MEMORY_UTILIZATION} {utilization}, which leaves {usable} bytes for"
            f" caches, should be at least {_MIN_POOL_BYTES}"
        )
    return usable


def _check_memory_size(text: str) -> None:
    if "," in text:
        raise InvalidArgument(f"{MEMORY_SIZE} is {text!r}, only support one mem pool")
    if not is_decimal(text) or len(text) > _MAX_POOL_DIGITS:
        raise InvalidArgument(f"{MEMORY_SIZE} is {text[:64]!r}, should be a decimal number of bytes")


def _enable_switch_role(options: dict[str, str]) -> bool:
    text = option_text(options, SWITCH_ROLE)
    if text not in (None, "0", "1"):
        raise InvalidArgument(f'{SWITCH_ROLE} is {text!r}, should be "0" or "1"')
    return text == "1"


def _sync_kv_timeout_ms(options: dict[str, str]) -> int:
    timeout_ms = option_number(SYNC_KV_TIMEOUT, option_text(options, SYNC_KV_TIMEOUT), 1, INT32_MAX)
    return EngineOptions.sync_kv_timeout_ms if timeout_ms is None else timeout_ms


def _copy_threads(options: dict[str, str]) -> int | None:
    return option_number(COPY_THREADS, option_text(options, COPY_THREADS), 1, MAX_THREADS)


def _network(options: dict[str, str]) -> NetworkOptions:
    return NetworkOptions(
        transport=option_text(options, TRANSPORT),
        data_ports=option_text(options, DATA_PORTS),
        data_address=option_text(options, DATA_ADDRESS),
        data_checksum=option_text(options, DATA_CHECKSUM),
    )


def _buf_pool_classes(options: dict[str, str]) -> tuple[SizeClass, ...]:
    text = option_text(options, BUF_POOL)
    if text is None:
        return ()
    classes = parse_buf_pool(text)
    wanted, limit = sum(size_class.total_size for size_class in classes), options.get(MEMORY_SIZE)
    # The sizes are explicit, so MEMORY_UTILIZATION, the share that a pool without classes takes, has no part in it.
    if limit is not None and wanted > int(limit):
        raise InvalidArgument(
            f"the size classes of {BUF_POOL} take {wanted} bytes together, should be at most {limit}, which is"
            f" {MEMORY_SIZE}"
        )
    return classes
