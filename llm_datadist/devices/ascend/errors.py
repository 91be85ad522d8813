"""What the vendor's libraries report, in the status codes of this library."""

from __future__ import annotations

import logging

from llm_datadist._acl import AclError
from llm_datadist._hccl import HcclError
from llm_datadist._shared_library import LibraryMissing, VendorError
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist")

# Of the ACL runtime.
_OUT_OF_MEMORY = {207001, 207018}
_TIMEOUT = {507046, 507047, 107019}
_OWN_MISTAKE = {107000, 100000}
_UNSUPPORTED = {207000, 200006, 200001}

# Of HCCL.
_HCCL_OUT_OF_MEMORY = {24}
_HCCL_TIMEOUT = {9}
_HCCL_OWN_MISTAKE = {1, 2}
_HCCL_UNSUPPORTED = {5}


def llm_exception(
    call: str,
    error: VendorError,
    *,
    timeout: LLMStatusCode = LLMStatusCode.LLM_TIMEOUT,
    out_of_memory: LLMStatusCode = LLMStatusCode.LLM_OUT_OF_MEMORY,
) -> LLMException:
    """Make the exception of a call in which a library of the vendor failed, with its number and its text.

    Parameters
    ----------
    call : str
        What was called, by its public name.
    error : VendorError
        What happened.
    timeout, out_of_memory : LLMStatusCode
        What the mode of the instance calls these events.
    """
    code = _status(error, timeout, out_of_memory)
    if code is LLMStatusCode.LLM_PARAM_INVALID:
        _log.error("%s: %s; this is a mistake of this library, please report it", call, error)
    return LLMException(f"{call} failed, error code is {code}: {error}", status_code=code)


def _status(error: VendorError, timeout: LLMStatusCode, out_of_memory: LLMStatusCode) -> LLMStatusCode:
    if isinstance(error, LibraryMissing):
        return LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    if isinstance(error, AclError):
        groups = (_OUT_OF_MEMORY, _TIMEOUT, _OWN_MISTAKE, _UNSUPPORTED)
    elif isinstance(error, HcclError):
        groups = (_HCCL_OUT_OF_MEMORY, _HCCL_TIMEOUT, _HCCL_OWN_MISTAKE, _HCCL_UNSUPPORTED)
    else:
        return LLMStatusCode.LLM_FAILED
    codes = (out_of_memory, timeout, LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_FEATURE_NOT_ENABLED)
    for numbers, code in zip(groups, codes):
        if error.code in numbers:
            return code
    return LLMStatusCode.LLM_FAILED
