"""Status codes, the exception that carries one, and checks that raise it."""

from __future__ import annotations

import logging

from llm_datadist.qualified_enum import QualifiedIntEnum

_log = logging.getLogger("llm_datadist")

# Codes of the component: runtime (01 << 30), type (01 << 28), system (8 << 17), module (11 << 12).
_COMPONENT = 0x5010B000


class LLMStatusCode(QualifiedIntEnum):
    """What a call ended with; equal to its number, printed as ``LLMStatusCode.LLM_FAILED``.

    Examples
    --------
    >>> from llm_datadist import LLMStatusCode
    >>> print(LLMStatusCode.LLM_NOT_YET_LINK)
    LLMStatusCode.LLM_NOT_YET_LINK
    >>> LLMStatusCode.LLM_NOT_YET_LINK == 0x5010B007
    True
    """

    LLM_SUCCESS = 0
    LLM_FAILED = 0xFFFFFFFF
    LLM_WAIT_PROCESS_TIMEOUT = _COMPONENT + 1
    LLM_KV_CACHE_NOT_EXIST = _COMPONENT + 2
    LLM_REPEAT_REQUEST = _COMPONENT + 3
    LLM_REQUEST_ALREADY_COMPLETED = _COMPONENT + 4
    LLM_PARAM_INVALID = _COMPONENT + 5
    LLM_ENGINE_FINALIZED = _COMPONENT + 6
    LLM_NOT_YET_LINK = _COMPONENT + 7
    LLM_ALREADY_LINK = _COMPONENT + 8
    LLM_LINK_FAILED = _COMPONENT + 9
    LLM_UNLINK_FAILED = _COMPONENT + 10
    LLM_NOTIFY_PROMPT_UNLINK_FAILED = _COMPONENT + 11
    LLM_CLUSTER_NUM_EXCEED_LIMIT = _COMPONENT + 12
    LLM_PROCESSING_LINK = _COMPONENT + 13
    LLM_DEVICE_OUT_OF_MEMORY = _COMPONENT + 14
    LLM_PREFIX_ALREADY_EXIST = _COMPONENT + 15
    LLM_PREFIX_NOT_EXIST = _COMPONENT + 16
    LLM_SEQ_LENOVERLIMIT = _COMPONENT + 17
    LLM_NO_FREE_BLOCK = _COMPONENT + 18
    LLM_BLOCKS_OUT_OF_MEMORY = _COMPONENT + 19
    LLM_EXIST_LINK = _COMPONENT + 24
    LLM_FEATURE_NOT_ENABLED = _COMPONENT + 25
    LLM_TIMEOUT = _COMPONENT + 26
    LLM_LINK_BUSY = _COMPONENT + 27
    LLM_OUT_OF_MEMORY = _COMPONENT + 28
    LLM_DEVICE_MEM_ERROR = 507053
    LLM_SUSPECT_REMOTE_ERROR = 507057
    LLM_UNKNOWN_ERROR = -1


class LLMException(RuntimeError):
    """A call of this library failed.

    Parameters
    ----------
    *args
        The message, as for any exception.
    status_code : LLMStatusCode
        Why it failed.

    Examples
    --------
    >>> from llm_datadist import LLMConfig, LLMException, LLMStatusCode
    >>> try:
    ...     LLMConfig().link_retry_count = 0
    ... except LLMException as error:
    ...     print(error.status_code)
    LLMStatusCode.LLM_PARAM_INVALID
    """

    def __init__(self, *args: object, status_code: LLMStatusCode = LLMStatusCode.LLM_SUCCESS) -> None:
        super().__init__(*args)
        self._status_code = status_code

    @property
    def status_code(self) -> LLMStatusCode:
        """Why the call failed."""
        return self._status_code


class InvalidArgument(LLMException, ValueError):
    """An argument or option has the right type, but cannot be used: LLM_PARAM_INVALID.

    It is a ValueError too, because the documentation of most calls promises one.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args, status_code=LLMStatusCode.LLM_PARAM_INVALID)


class Status:
    """Holder of a status code.

    Parameters
    ----------
    status : LLMStatusCode
        The code.

    Examples
    --------
    >>> from llm_datadist import LLMStatusCode, Status
    >>> Status(LLMStatusCode.LLM_SUCCESS).is_ok(), Status(LLMStatusCode.LLM_TIMEOUT).is_ok()
    (True, False)
    """

    def __init__(self, status: LLMStatusCode) -> None:
        self._status = status

    def is_ok(self) -> bool:
        """Tell whether the code is LLM_SUCCESS."""
        return self._status == LLMStatusCode.LLM_SUCCESS

    @property
    def status_code(self) -> LLMStatusCode:
        """The code."""
        return self._status


def code_2_status(status: int) -> LLMStatusCode:
    """Give the member of a number; LLM_FAILED for a number without a member."""
    try:
        return LLMStatusCode(status)
    except ValueError:
        return LLMStatusCode.LLM_FAILED


def handle_llm_status(status: int, func_name: str, other_info: object) -> None:
    """Raise the failure of a call by its number.

    Parameters
    ----------
    status : int
        Number of a status code; 0 returns.
    func_name : str
        The call.
    other_info : object
        Put at the end of the message.

    Raises
    ------
    LLMException
        With the member of `status`, for every number except 0.

    Examples
    --------
    >>> from llm_datadist.status import LLMStatusCode, handle_llm_status
    >>> handle_llm_status(0, "pull_cache", "request 7")
    >>> handle_llm_status(LLMStatusCode.LLM_TIMEOUT, "pull_cache", "request 7")
    Traceback (most recent call last):
        ...
    llm_datadist.status.LLMException: pull_cache failed, error code is LLMStatusCode.LLM_TIMEOUT, request 7.
    """
    if status != LLMStatusCode.LLM_SUCCESS:
        code = code_2_status(status)
        raise LLMException(f"{func_name} failed, error code is {code}, {other_info}.", status_code=code)


def raise_if_false(
    pred: object,
    fmt: str,
    *args: object,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: object,
) -> None:
    """Log ``fmt.format(*args, **kwargs)`` as an error and raise it as LLMException, unless `pred` is true."""
    if not pred:
        message = fmt.format(*args, **kwargs)
        _log.error("%s", message)
        raise LLMException(message, status_code=status_code)


def raise_if_true(
    pred: object,
    fmt: str,
    *args: object,
    status_code: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID,
    **kwargs: object,
) -> None:
    """Log ``fmt.format(*args, **kwargs)`` as an error and raise it as LLMException, if `pred` is true."""
    raise_if_false(not pred, fmt, *args, status_code=status_code, **kwargs)
