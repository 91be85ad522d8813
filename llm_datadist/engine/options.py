"""What an engine is made from: plain values that were checked before."""

from __future__ import annotations

from dataclasses import dataclass

from llm_datadist.roles import LLMRole


@dataclass(frozen=True)
class SizeClass:
    """One entry of ``llm.BufPoolCfg``, in bytes.

    Attributes
    ----------
    total_size : int
        Memory of the class, a multiple of 2 MiB.
    blk_size : int
        Unit that buffers are rounded up to, a power of two.
    max_buf_size : int
        Largest single buffer, that is, tensor of a cache.
    """

    total_size: int
    blk_size: int
    max_buf_size: int


@dataclass(frozen=True)
class CacheManagerOptions:
    """What an instance in cache-manager mode has beyond the others.

    Attributes
    ----------
    remote_access : bool
        Whether peers see only caches that were registered or allocated as accessible, and may push into these.
    device_pool_bytes, host_pool_bytes : int
        Sizes of the pools that caches of either placement are allocated in; 0 = none.
    device_page_bytes, host_page_bytes : int
        Units that allocations in the pools are rounded up to, powers of two.
    link_total_time_s : int
        Seconds for setting a link up, retries included; 0 = ``HCCL_CONNECT_TIMEOUT``, else 120.
    link_retry_count : int
        Attempts of setting a link up, at least 1.
    has_backend : bool
        Whether a transfer backend was asked for: links through a communicator are not available then.
    """

    remote_access: bool = False
    device_pool_bytes: int = 0
    host_pool_bytes: int = 0
    device_page_bytes: int = 1 << 16
    host_page_bytes: int = 1 << 16
    link_total_time_s: int = 0
    link_retry_count: int = 1
    has_backend: bool = False


@dataclass(frozen=True)
class NetworkOptions:
    """What the options say about the network, as texts; `llm_datadist.engine.network` reads them.

    Attributes
    ----------
    transport, data_ports, data_address, data_checksum : str or None
        None = what the environment says.
    """

    transport: str | None = None
    data_ports: str | None = None
    data_address: str | None = None
    data_checksum: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """Options of one initialised instance.

    Attributes
    ----------
    role, cluster_id : LLMRole, int
        As given to ``LLMDataDist``.
    device_ids : tuple of int
        Devices that the process drives.
    listen : tuple of (str, int)
        Addresses to accept links at, one a device; empty unless PROMPT.
    sync_kv_timeout_ms : int
        Deadline of pulls and of calls on caches, > 0.
    pool_bytes : int or None
        Size of the pool; None = default. With size classes: the sum of their `total_size`.
    enable_switch_role : bool
        Whether the role may change later.
    buf_pool_classes : tuple of SizeClass
        Size classes of the pool; empty = a general pool.
    copy_threads : int or None
        Threads that one copy may use; None = see `llm_datadist.engine.copy_threads`.
    network : NetworkOptions
        Which transports may be used, and where data connections are accepted.
    device_backend : str or None
        What the options say about the kind of device; None = what the environment says.
    cache_manager : CacheManagerOptions or None
        What belongs to the cache-manager mode; None in KV mode. With it `pool_bytes` and `buf_pool_classes` have no
        meaning, and any role may listen.
    """

    role: LLMRole
    cluster_id: int
    device_ids: tuple[int, ...] = (0,)
    listen: tuple[tuple[str, int], ...] = ()
    sync_kv_timeout_ms: int = 1000
    pool_bytes: int | None = None
    enable_switch_role: bool = False
    buf_pool_classes: tuple[SizeClass, ...] = ()
    copy_threads: int | None = None
    network: NetworkOptions = NetworkOptions()
    device_backend: str | None = None
    cache_manager: CacheManagerOptions | None = None
