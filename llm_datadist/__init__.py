"""KV cache transfer between the prefill and the decode processes of a large language model.

The names of the documented interface are here. NumPy, ZeroMQ and the native core are loaded when they are needed.
"""

from __future__ import annotations

import os

from llm_datadist.cache import Cache
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.cache_task import CacheTask
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.configs import LLMConfig, LlmConfig
from llm_datadist.data_type import DataType
from llm_datadist.datadist import LLMDataDist
from llm_datadist.kv_cache import KvCache
from llm_datadist.kv_cache_manager import KvCacheManager
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.log import set_up_logger
from llm_datadist.memory_info import MemInfo, Memtype, RegisterMemStatus
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode, Status
from llm_datadist.tensor import Tensor, TensorDesc
from llm_datadist.transfer_config import TransferConfig, TransferWithCacheKeyConfig

__all__ = [
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "TensorDesc",
    "Tensor",
    "DataType",
    "Status",
    "KvCacheManager",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "RegisterMemStatus",
    "Memtype",
    "MemInfo",
]

# The names of the second generation of the interface.
v2_list = [name for name in __all__ if name not in ("TensorDesc", "Tensor", "KvCacheManager")]

# Programs and the libraries beside this one read it.
os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

set_up_logger()
