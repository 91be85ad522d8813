"""The prompt of the benchmarks: offers caches, and can hold its interpreter lock."""

from __future__ import annotations

import ctypes
import sys
import time
from multiprocessing.connection import Connection

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMConfig, LLMDataDist, LLMRole
from llm_datadist.views import tensor_view

CLUSTER = 1
ANY_REQUEST = 2**64 - 1
PREFIX = 1

CONTIGUOUS = CacheDesc(2, (1, 32 << 20), DataType.DT_UINT8)  # 64 MiB
BLOCKS_64K = CacheDesc(2, (512, 64 << 10), DataType.DT_UINT8)  # 64 MiB
BLOCKS_16K = CacheDesc(2, (1024, 16 << 10), DataType.DT_UINT8)  # 32 MiB
MODEL_64K, MODEL_16K = 0, 1

POOL_BYTES = 256 << 20


def new_datadist(role: LLMRole, cluster_id: int, listen: str = "") -> LLMDataDist:
    """Make an initialised instance with a pool that holds the caches above."""
    config = LLMConfig()
    config.device_id = 0
    config.mem_utilization = 1.0
    config.sync_kv_timeout = 10_000
    config.ge_options = {"ge.flowGraphMemMaxSize": str(POOL_BYTES)}
    config.listen_ip_info = listen
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def serve(connection: Connection, port: int) -> None:
    """Offer the caches, then do what the other end says: ``("hold", way, seconds)``, or None to end."""
    datadist = new_datadist(LLMRole.PROMPT, CLUSTER, f"127.0.0.1:{port}")
    manager = datadist.kv_cache_manager
    caches = [
        manager.allocate_cache(CONTIGUOUS, [CacheKey(CLUSTER, ANY_REQUEST, 0, PREFIX)]),
        manager.allocate_blocks_cache(BLOCKS_64K, BlocksCacheKey(CLUSTER, MODEL_64K)),
        manager.allocate_blocks_cache(BLOCKS_16K, BlocksCacheKey(CLUSTER, MODEL_16K)),
    ]
    for cache in caches:
        for tensor in range(2):
            tensor_view(cache, tensor)[...] = tensor + 1
    connection.send("ready")
    while True:
        order = connection.recv()
        if order is None:
            break
        _, way, seconds = order
        connection.send("holding")
        hold(way, seconds)
        connection.send("done")
    datadist.finalize()


def hold(way: str, seconds: int) -> None:
    """Hold this process's interpreter lock: in a C call that does not release it, or in a Python loop."""
    if way == "c call":
        ctypes.PyDLL(None).sleep(seconds)
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5.0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    sys.setswitchinterval(interval)
