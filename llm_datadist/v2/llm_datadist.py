"""`LLMDataDist`, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.datadist import LLMDataDist, _shutdown_handler

__all__ = ["LLMDataDist", "_shutdown_handler"]
