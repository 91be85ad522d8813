"""Value classes, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.cache import Cache
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.cache_task import CacheTask
from llm_datadist.kv_cache import KvCache
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.memory_info import MemInfo, Memtype, PushType, RegisterMemStatus, int_to_mem_status_dict
from llm_datadist.transfer_config import TransferConfig, TransferWithCacheKeyConfig, check_layer_range

__all__ = [
    "BlocksCacheKey",
    "Cache",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "CacheTask",
    "KvCache",
    "LayerSynchronizer",
    "MemInfo",
    "Memtype",
    "Placement",
    "PushType",
    "RegisterMemStatus",
    "TransferConfig",
    "TransferWithCacheKeyConfig",
    "check_layer_range",
    "int_to_mem_status_dict",
]
