"""`CacheManager`, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.cache_manager import CacheManager

__all__ = ["CacheManager"]
