"""From the way a transfer failed to the documented status code and a message that says what would be right."""

from __future__ import annotations

from llm_datadist._core import Outcome, TransferFault
from llm_datadist._local import LocalCache
from llm_datadist.status import InvalidArgument, LLMException, LLMStatusCode

_CODES = {
    Outcome.KEY_UNKNOWN: LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    Outcome.SLOT_UNKNOWN: LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    Outcome.SOURCE_RANGE: LLMStatusCode.LLM_PARAM_INVALID,
    Outcome.SOURCE_TENSORS: LLMStatusCode.LLM_PARAM_INVALID,
    Outcome.TENSOR_COUNT: LLMStatusCode.LLM_PARAM_INVALID,
    Outcome.BLOCK_SIZE: LLMStatusCode.LLM_PARAM_INVALID,
    Outcome.SOURCE_BLOCK: LLMStatusCode.LLM_PARAM_INVALID,
    Outcome.CACHE_RELEASED: LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    Outcome.TIMED_OUT: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
    # Programs written for the API rebuild a link after a timeout, and that is what a lost peer needs.
    Outcome.PEER_DEAD: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
    Outcome.REVOKED: LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
    Outcome.LINK_CLOSED: LLMStatusCode.LLM_NOT_YET_LINK,
    Outcome.BAD_DIRECTORY: LLMStatusCode.LLM_FAILED,
    Outcome.NO_MEMORY: LLMStatusCode.LLM_FAILED,
    Outcome.TARGET_ADDRESS: LLMStatusCode.LLM_PARAM_INVALID,
}


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


def transfer_failure(
    call: str, cluster_id: int, key: str, cache: LocalCache, fault: TransferFault, timeout_ms: int
) -> LLMException:
    """Explain a transfer that failed at the remote side or on the way."""
    remote = f"{fault.remote_tensors} tensors of {fault.remote_slots} slots of {fault.remote_stride} bytes"
    reasons = {
        Outcome.KEY_UNKNOWN: f"cluster {cluster_id} has no cache under {key}: never bound, pulled, or removed",
        Outcome.SLOT_UNKNOWN: f"{key} is out of range, the remote cache has {fault.remote_slots} slots",
        Outcome.SOURCE_RANGE: f"src_cache_offset + size exceed a remote slot of {fault.remote_stride} bytes",
        Outcome.SOURCE_TENSORS: f"source layers are out of range, the remote cache has {fault.remote_tensors} tensors",
        Outcome.TENSOR_COUNT: (
            f"numbers of tensors differ: remote cache has {remote}, local cache has {cache.tensors} tensors;"
            " ranges must choose equally many on both sides"
        ),
        Outcome.BLOCK_SIZE: f"block sizes differ: remote {fault.remote_stride} bytes, local {cache.stride} bytes",
        Outcome.SOURCE_BLOCK: f"a prompt block is out of range, the remote cache has {fault.remote_slots} blocks",
        Outcome.CACHE_RELEASED: f"local cache {cache.cache_id} was deallocated",
        **_link_reasons(cluster_id, timeout_ms),
    }
    return failure(call, _CODES[fault.outcome], reasons[fault.outcome])


def push_failure(call: str, cluster_id: int, cache: LocalCache, fault: TransferFault, timeout_ms: int) -> LLMException:
    """Explain a push that failed at the remote side or on the way."""
    codes = {**_CODES, Outcome.SLOT_UNKNOWN: LLMStatusCode.LLM_PARAM_INVALID}
    reasons = {
        Outcome.SLOT_UNKNOWN: f"src_batch_index is out of range, cache {cache.cache_id} has {cache.slots} slots",
        Outcome.SOURCE_BLOCK: f"a source block is out of range, cache {cache.cache_id} has {cache.slots} blocks",
        Outcome.SOURCE_TENSORS: f"source layers are out of range, cache {cache.cache_id} has {cache.tensors} tensors",
        Outcome.CACHE_RELEASED: f"source cache {cache.cache_id} was deallocated",
        Outcome.TARGET_ADDRESS: (
            f"an address lies in no cache of cluster {cluster_id}, or the bytes would run over the end of its tensor"
        ),
        **_link_reasons(cluster_id, timeout_ms),
    }
    return failure(call, codes[fault.outcome], reasons[fault.outcome])


def _link_reasons(cluster_id: int, timeout_ms: int) -> dict[Outcome, str]:
    """Explain what a transfer in either direction can meet on the way."""
    return {
        Outcome.TIMED_OUT: f"not finished within sync_kv_timeout of {timeout_ms} ms",
        Outcome.PEER_DEAD: f"cluster {cluster_id} is dead or has closed the link: unlink, then link again",
        Outcome.REVOKED: f"cluster {cluster_id} has closed the link during the call: unlink, then link again",
        Outcome.LINK_CLOSED: f"the link to cluster {cluster_id} was taken down during the call",
        Outcome.BAD_DIRECTORY: f"cluster {cluster_id} names memory outside of its pool",
        Outcome.NO_MEMORY: "no memory for the transfer's plan",
    }
