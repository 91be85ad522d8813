"""From the way a transfer failed to the documented status code and a message that says what would be right."""

from __future__ import annotations

from llm_datadist._local import LocalCache
from llm_datadist._outcome import Outcome, TransferFault
from llm_datadist.engine.failures import failure
from llm_datadist.engine.mode_codes import ModeCodes
from llm_datadist.status import LLMException, LLMStatusCode

_NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
_INVALID = LLMStatusCode.LLM_PARAM_INVALID
_FAILED = LLMStatusCode.LLM_FAILED


class TransferFailures:
    """Explains failed transfers of one engine.

    Parameters
    ----------
    codes : ModeCodes
        Of the engine's mode.
    timeout_ms : int
        How long a transfer may take.
    """

    def __init__(self, codes: ModeCodes, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        # Programs written for the API rebuild a link after a timeout, and that is what a lost peer needs.
        self._codes = {
            Outcome.KEY_UNKNOWN: _NOT_EXIST,
            Outcome.SLOT_UNKNOWN: _NOT_EXIST,
            Outcome.SOURCE_RANGE: _INVALID,
            Outcome.SOURCE_TENSORS: _INVALID,
            Outcome.TENSOR_COUNT: _INVALID,
            Outcome.BLOCK_SIZE: _INVALID,
            Outcome.SOURCE_BLOCK: _INVALID,
            Outcome.CACHE_RELEASED: _NOT_EXIST,
            Outcome.TIMED_OUT: codes.timeout,
            Outcome.PEER_DEAD: codes.timeout,
            Outcome.REVOKED: codes.timeout,
            Outcome.LINK_CLOSED: LLMStatusCode.LLM_NOT_YET_LINK,
            Outcome.BAD_DIRECTORY: _FAILED,
            Outcome.NO_MEMORY: _FAILED,
            Outcome.TARGET_ADDRESS: _INVALID,
            Outcome.STALE_BLOCKS: _NOT_EXIST,
            Outcome.MEMORY_FAULT: _FAILED,
            Outcome.MEMORY_DENIED: _FAILED,
            Outcome.TARGET_READ_ONLY: _FAILED,
            Outcome.TARGET_TENSORS: _INVALID,
            Outcome.TARGET_BLOCK: _INVALID,
            Outcome.TARGET_RANGE: _INVALID,
            Outcome.CORRUPTED: _FAILED,
            Outcome.DEVICE_FAILED: _FAILED,
            Outcome.NO_COMMUNICATOR: _FAILED,
        }

    def of_pull(self, call: str, cluster_id: int, key: str, cache: LocalCache, fault: TransferFault) -> LLMException:
        """Explain a pull that failed at the remote side or on the way."""
        remote = f"{fault.remote_tensors} tensors of {fault.remote_slots} slots of {fault.remote_stride} bytes"
        reasons = {
            Outcome.SLOT_UNKNOWN: f"{key} is out of range, the remote cache has {fault.remote_slots} slots",
            Outcome.SOURCE_RANGE: f"the wanted bytes exceed a remote slot of {fault.remote_stride} bytes",
            Outcome.SOURCE_TENSORS: (
                f"source layers are out of range, the remote cache has {fault.remote_tensors} tensors"
            ),
            Outcome.TENSOR_COUNT: (
                f"numbers of tensors differ: remote cache has {remote}, local cache has {cache.tensors} tensors;"
                " ranges must choose equally many on both sides"
            ),
            Outcome.SOURCE_BLOCK: f"a source block is out of range, the remote cache has {fault.remote_slots} blocks",
            Outcome.CACHE_RELEASED: f"local cache {cache.cache_id} was deallocated",
            Outcome.STALE_BLOCKS: (
                f"the blocks of {key} are no longer what the token was given out for: retired, published anew, or the"
                " lease has run out"
            ),
            **self._common(cluster_id, key, cache, fault),
        }
        return failure(call, self._codes[fault.outcome], reasons[fault.outcome])

    def of_push(self, call: str, cluster_id: int, key: str, cache: LocalCache, fault: TransferFault) -> LLMException:
        """Explain a push that failed at the remote side or on the way; `key` is not used if it went to addresses."""
        codes = {**self._codes, Outcome.SLOT_UNKNOWN: _INVALID}
        have = f"the remote cache has {fault.remote_tensors} tensors of {fault.remote_slots} slots or blocks"
        reasons = {
            Outcome.SLOT_UNKNOWN: f"src_batch_index is out of range, cache {cache.cache_id} has {cache.slots} slots",
            Outcome.SOURCE_BLOCK: f"a source block is out of range, cache {cache.cache_id} has {cache.slots} blocks",
            Outcome.SOURCE_TENSORS: (
                f"source layers are out of range, cache {cache.cache_id} has {cache.tensors} tensors"
            ),
            Outcome.CACHE_RELEASED: f"source cache {cache.cache_id} was deallocated",
            Outcome.TARGET_ADDRESS: (
                f"an address lies in no cache of cluster {cluster_id}, or the bytes would run over the end of its"
                " tensor"
            ),
            Outcome.TARGET_TENSORS: f"destination layers are out of range, {have}",
            Outcome.TARGET_BLOCK: f"{key}, or a destination block, is out of range, {have}",
            Outcome.TARGET_RANGE: (
                f"a slot of {cache.stride} bytes does not fit into a remote slot of {fault.remote_stride} bytes"
            ),
            **self._common(cluster_id, key, cache, fault),
        }
        return failure(call, codes[fault.outcome], reasons[fault.outcome])

    def _common(self, cluster_id: int, key: str, cache: LocalCache, fault: TransferFault) -> dict[Outcome, str]:
        """Explain what a transfer in either direction can meet."""
        return {
            Outcome.KEY_UNKNOWN: (
                f"cluster {cluster_id} has no cache under {key}: never bound, pulled, removed, or not accessible"
            ),
            Outcome.BLOCK_SIZE: f"block sizes differ: remote {fault.remote_stride} bytes, local {cache.stride} bytes",
            Outcome.TIMED_OUT: f"not finished within sync_kv_timeout of {self._timeout_ms} ms",
            Outcome.PEER_DEAD: f"cluster {cluster_id} is dead or has closed the link: unlink, then link again",
            Outcome.REVOKED: f"cluster {cluster_id} has closed the link during the call: unlink, then link again",
            Outcome.LINK_CLOSED: f"the link to cluster {cluster_id} was taken down during the call",
            Outcome.BAD_DIRECTORY: f"cluster {cluster_id} names memory outside of its pool",
            Outcome.NO_MEMORY: "no memory for the transfer's plan",
            Outcome.MEMORY_FAULT: (
                f"registered memory of cluster {cluster_id} or of this process is not mapped any more: unregister a"
                " cache before its memory is freed"
            ),
            Outcome.MEMORY_DENIED: (
                f"the kernel does not let this process touch private memory of cluster {cluster_id}, and its data"
                " server cannot be reached; or the link is one-sided over HCCL, and the memory is not in the pool"
            ),
            Outcome.CORRUPTED: f"the checksum says that bytes from or to cluster {cluster_id} changed on the way",
            Outcome.DEVICE_FAILED: f"the device, or its communication library, has failed: {fault.detail}",
            Outcome.NO_COMMUNICATOR: (
                f"there is no communicator with cluster {cluster_id}: "
                + (fault.detail or "it was lost, and again at once")
            ),
            Outcome.TARGET_READ_ONLY: f"cluster {cluster_id} shares its pool for reading only",
        }
