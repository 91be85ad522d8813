"""Roles of a process in disaggregated serving."""

from __future__ import annotations

from llm_datadist.qualified_enum import QualifiedIntEnum


class LLMRole(QualifiedIntEnum):
    """What a process does.

    Attributes
    ----------
    PROMPT
        Prefill: owns keys, is linked to, is pulled from.
    DECODER
        Decode: links, checks links, pulls.
    MIX
        Both in one process: local caches only.
    """

    PROMPT = 1
    DECODER = 2
    MIX = 3
