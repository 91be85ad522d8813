"""Exceptions of the engine: the documented status code, and a message that says what would be right."""

from __future__ import annotations

from llm_datadist.status import InvalidArgument, LLMException, LLMStatusCode


def failure(call: str, code: LLMStatusCode, reason: str) -> LLMException:
    """Make the exception that reports a failed call."""
    text = f"{call} failed, error code is {code}: {reason}"
    if code is LLMStatusCode.LLM_PARAM_INVALID:
        return InvalidArgument(text)
    return LLMException(text, status_code=code)


def invalid(call: str, reason: str) -> LLMException:
    """Make the exception for an argument that does not fit the caches it is about."""
    return failure(call, LLMStatusCode.LLM_PARAM_INVALID, reason)


def no_cache(call: str, cache_id: int) -> LLMException:
    """Make the exception for a local cache whose id is not held."""
    reason = f"local cache {cache_id} does not exist or was deallocated"
    return failure(call, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, reason)


def check_device_index(call: str, device_index: int, devices: int) -> None:
    """Check the position of a device among those of the process."""
    if not 0 <= device_index < devices:
        raise invalid(call, f"device_index {device_index} is out of range, the cache is on {devices} devices")
