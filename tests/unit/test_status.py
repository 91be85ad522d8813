"""Status codes, the exception that carries one, and the checks that raise it."""

from __future__ import annotations

import logging
import pickle

import pytest

from llm_datadist.status import (
    InvalidArgument,
    LLMException,
    LLMStatusCode,
    Status,
    code_2_status,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
)

NUMBERS = {
    "LLM_SUCCESS": 0,
    "LLM_FAILED": 4294967295,
    "LLM_WAIT_PROCESS_TIMEOUT": 1343270913,
    "LLM_KV_CACHE_NOT_EXIST": 1343270914,
    "LLM_REPEAT_REQUEST": 1343270915,
    "LLM_REQUEST_ALREADY_COMPLETED": 1343270916,
    "LLM_PARAM_INVALID": 1343270917,
    "LLM_ENGINE_FINALIZED": 1343270918,
    "LLM_NOT_YET_LINK": 1343270919,
    "LLM_ALREADY_LINK": 1343270920,
    "LLM_LINK_FAILED": 1343270921,
    "LLM_UNLINK_FAILED": 1343270922,
    "LLM_NOTIFY_PROMPT_UNLINK_FAILED": 1343270923,
    "LLM_CLUSTER_NUM_EXCEED_LIMIT": 1343270924,
    "LLM_PROCESSING_LINK": 1343270925,
    "LLM_DEVICE_OUT_OF_MEMORY": 1343270926,
    "LLM_PREFIX_ALREADY_EXIST": 1343270927,
    "LLM_PREFIX_NOT_EXIST": 1343270928,
    "LLM_SEQ_LENOVERLIMIT": 1343270929,
    "LLM_NO_FREE_BLOCK": 1343270930,
    "LLM_BLOCKS_OUT_OF_MEMORY": 1343270931,
    "LLM_EXIST_LINK": 1343270936,
    "LLM_FEATURE_NOT_ENABLED": 1343270937,
    "LLM_TIMEOUT": 1343270938,
    "LLM_LINK_BUSY": 1343270939,
    "LLM_OUT_OF_MEMORY": 1343270940,
    "LLM_DEVICE_MEM_ERROR": 507053,
    "LLM_SUSPECT_REMOTE_ERROR": 507057,
    "LLM_UNKNOWN_ERROR": -1,
}


def test_every_code_has_its_number() -> None:
    assert {code.name: code.value for code in LLMStatusCode} == NUMBERS
    assert len(LLMStatusCode) == 29


def test_a_code_prints_with_its_class_and_equals_its_number() -> None:
    code = LLMStatusCode.LLM_FAILED
    assert str(code) == f"{code}" == f"{code!s}" == "%s" % code == "LLMStatusCode.LLM_FAILED"  # noqa: UP031
    assert f"{code:>30}" == "LLMStatusCode.LLM_FAILED".rjust(30)
    assert code == 0xFFFFFFFF
    assert LLMStatusCode(0x5010B002) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_numbers_without_a_member_are_failures() -> None:
    assert code_2_status(0) is LLMStatusCode.LLM_SUCCESS
    assert code_2_status(0x5010B007) is LLMStatusCode.LLM_NOT_YET_LINK
    for number in (12345, 0x5010B014, 0x5010B015, 0x5010B016, 0x5010B017):
        assert code_2_status(number) is LLMStatusCode.LLM_FAILED


def test_an_exception_carries_its_code() -> None:
    assert issubclass(LLMException, RuntimeError)
    assert LLMException("x").status_code is LLMStatusCode.LLM_SUCCESS
    error = LLMException("abc", status_code=LLMStatusCode.LLM_FAILED)
    assert str(error) == "abc"
    assert error.status_code is LLMStatusCode.LLM_FAILED
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_SUCCESS


@pytest.mark.parametrize(
    "error", [LLMException("abc", 1, status_code=LLMStatusCode.LLM_TIMEOUT), InvalidArgument("abc", 1)]
)
def test_an_exception_goes_to_another_process_as_it_is(error: LLMException) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), copied.args, copied.status_code) == (type(error), error.args, error.status_code)


def test_an_invalid_argument_is_both_kinds_of_error() -> None:
    with pytest.raises(ValueError, match="abc"):
        raise InvalidArgument("abc")
    with pytest.raises(LLMException, match="abc") as caught:
        raise InvalidArgument("abc")
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_status_is_ok_only_for_success() -> None:
    for code in LLMStatusCode:
        assert Status(code).is_ok() is (code is LLMStatusCode.LLM_SUCCESS)
        assert Status(code).status_code is code


def test_checks_raise_and_log_their_message(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="llm_datadist"):
        with pytest.raises(LLMException, match="^a 1$") as caught:
            raise_if_false(False, "a {0}", 1)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        with pytest.raises(LLMException, match="^b 2$") as caught:
            raise_if_true([0], "b {x}", x=2, status_code=LLMStatusCode.LLM_LINK_BUSY)
        assert caught.value.status_code is LLMStatusCode.LLM_LINK_BUSY
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "a 1"),
        ("ERROR", "b 2"),
    ]
    raise_if_false([0], "a {0}", 1)
    raise_if_true("", "a {0}", 1)


def test_a_failed_number_is_raised_with_all_that_is_known() -> None:
    handle_llm_status(0, "f", "i")
    with pytest.raises(LLMException) as caught:
        handle_llm_status(0x5010B007, "some_call", "cluster 5")
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
    for part in ("some_call", "failed, error code is", "LLMStatusCode.LLM_NOT_YET_LINK", "cluster 5"):
        assert part in str(caught.value)
    with pytest.raises(LLMException) as caught:
        handle_llm_status(12345, "f", "i")
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
