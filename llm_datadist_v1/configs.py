"""Configuration, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.configs import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole, trans_str_ip

__all__ = ["LLMClusterInfo", "LLMConfig", "LLMRole", "LlmConfig", "trans_str_ip"]
