"""Exceptions."""

from __future__ import annotations

import pytest

from llm_datadist import LLMException, LLMStatusCode, Status
from llm_datadist.status import handle_llm_status, raise_if_false, raise_if_true
from tests.conformance.expectations import NOT_LINKED, invalid


def test_C020_the_exception_carries_a_code() -> None:
    assert issubclass(LLMException, RuntimeError)
    assert LLMException("x").status_code is LLMStatusCode.LLM_SUCCESS
    error = LLMException("x", status_code=LLMStatusCode.LLM_FAILED)
    assert error.status_code is LLMStatusCode.LLM_FAILED
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_SUCCESS  # type: ignore[misc]


def test_C021_the_exception_prints_its_message() -> None:
    assert str(LLMException("abc")) == "abc"


def test_C022_only_success_is_ok() -> None:
    assert [code for code in LLMStatusCode if Status(code).is_ok()] == [LLMStatusCode.LLM_SUCCESS]


def test_C023_raise_if() -> None:
    invalid(raise_if_false, False, "a {0}", 1, match="^a 1$")
    raise_if_false(True, "a {0}", 1)
    invalid(raise_if_true, True, "a {0}", 1, match="^a 1$")
    raise_if_true(False, "a {0}", 1)


def test_C024_handle_llm_status() -> None:
    handle_llm_status(0, "f", "i")
    with pytest.raises(LLMException, match=r"f failed, error code is .*LLM_NOT_YET_LINK.*i") as raised:
        handle_llm_status(0x5010B007, "f", "i")
    assert raised.value.status_code is NOT_LINKED
