"""`KvCacheManager`, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.kv_cache_manager import KvCacheManager

__all__ = ["KvCacheManager"]
