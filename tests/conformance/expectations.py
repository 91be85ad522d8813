"""Codes and checks that the conformance tests share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import LLMException, LLMStatusCode

OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
OUT_OF_MEMORY = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
LINKED = (OK, [OK])
INVALID_ID = 2**64 - 1
LITTLE_S = 1.0  # what a call may take beyond its deadline on a busy machine


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that another thread or process does; fail if it does not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not reached within {seconds} s"


def refused(code: LLMStatusCode, call: Callable[..., Any], *args: Any, match: str | None = None, **kwargs: Any) -> None:
    """Expect a call to raise LLMException with a code, and with a text in its message."""
    with pytest.raises(LLMException, match=match) as raised:
        call(*args, **kwargs)
    assert raised.value.status_code is code


def invalid(call: Callable[..., Any], *args: Any, match: str | None = None, **kwargs: Any) -> None:
    """Expect a call to refuse an argument of the right type."""
    refused(INVALID, call, *args, match=match, **kwargs)


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> LLMStatusCode:
    """Give the code that a call ends with; LLM_SUCCESS if it returns."""
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return OK
