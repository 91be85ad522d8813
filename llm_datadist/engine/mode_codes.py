"""Status codes that the two modes of an instance use for the same event."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist.status import LLMStatusCode


class ModeCodes(NamedTuple):
    """What a mode calls an event.

    Attributes
    ----------
    timeout : LLMStatusCode
        A call did not end in time, or its peer is gone.
    out_of_memory : LLMStatusCode
        There is no room in a pool.
    """

    timeout: LLMStatusCode
    out_of_memory: LLMStatusCode


KV_MODE = ModeCodes(LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY)
CACHE_MANAGER_MODE = ModeCodes(LLMStatusCode.LLM_TIMEOUT, LLMStatusCode.LLM_OUT_OF_MEMORY)
