"""Copies inside the process: which caches, slots and bytes they may touch, and in which order they run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from llm_datadist._local import BlockPairs, LocalCache, block_pairs
from llm_datadist._local_copies import LocalCopier, LocalOutcome
from llm_datadist._shared_library import VendorError
from llm_datadist.arguments import UINT64_MAX
from llm_datadist.engine.caches import CacheTable
from llm_datadist.engine.failures import failure, invalid, no_cache
from llm_datadist.engine.mode_codes import KV_MODE
from llm_datadist.status import LLMException, LLMStatusCode

_CLOSE_SECONDS = 5.0  # a running copy sees within about a millisecond that it must end


class LocalCopies:
    """The local copies of one engine.

    Copies of slots and of blocks queue against each other; swaps run beside them and each other.

    Parameters
    ----------
    table : CacheTable
        Caches of the engine.
    timeout_ms : int
        How long one call may take, the time in the queue included.
    copier : LocalCopier
        Carries them out; the copies close it.
    timeout_code, out_of_memory_code : LLMStatusCode
        What a call ends with that takes longer, or that needs memory which is not to be had.
    """

    def __init__(
        self,
        table: CacheTable,
        timeout_ms: int,
        copier: LocalCopier,
        timeout_code: LLMStatusCode = KV_MODE.timeout,
        out_of_memory_code: LLMStatusCode = KV_MODE.out_of_memory,
    ) -> None:
        self._timeout_code = timeout_code
        self._out_of_memory_code = out_of_memory_code
        self._table = table
        self._timeout_ms = timeout_ms
        self._queue = threading.Lock()
        self._copier = copier

    def close(self) -> bool:
        """End running copies with an error; False if one does not end, whose memory must then stay mapped."""
        return self._copier.close(time.monotonic_ns() + int(_CLOSE_SECONDS * 1e9))

    def copy_cache(
        self, dst_cache_id: int, src_cache_id: int, dst_slot: int, src_slot: int, offset: int, size: int
    ) -> None:
        """Copy one slot, or a part of it, in every tensor.

        Parameters
        ----------
        dst_cache_id, src_cache_id : int
            They may be the same.
        dst_slot, src_slot : int
            Not negative.
        offset, size : int
            Bytes, in both slots; a size of -1 is the rest of the source slot.

        Raises
        ------
        LLMException
            The codes of ``KvCacheManager.copy_cache``.
        """
        call = "copy_cache"
        deadline_ns = self._deadline_ns()
        src = self._find(call, src_cache_id)
        dst = self._find(call, dst_cache_id)
        for name, slot, cache in (("dst_batch_index", dst_slot, dst), ("src_batch_index", src_slot, src)):
            if slot >= cache.slots:
                raise invalid(call, f"{name} {slot} is out of range, cache {cache.cache_id} has {cache.slots} slots")
        if src.tensors != dst.tensors:
            have = f"cache {src.cache_id} has {src.tensors}, cache {dst.cache_id} has {dst.tensors}"
            raise invalid(call, f"numbers of tensors differ: {have}")
        nbytes = _bytes_to_copy(call, src, dst, offset, size)
        self._wait_for_turn(call, deadline_ns)
        try:
            self._carry_out(
                call, lambda: self._copier.copy_slot(dst, src, dst_slot, src_slot, offset, nbytes, deadline_ns)
            )
        finally:
            self._queue.release()

    def copy_blocks(self, cache_id: int, src_blocks: list[int], dst_blocks: list[int]) -> None:
        """Copy block ``src_blocks[i]`` into block ``dst_blocks[i]`` in every tensor, one pair after the other.

        Raises
        ------
        ValueError
            A block number is negative or beyond uint64.
        LLMException
            The codes of ``KvCacheManager.copy_blocks``.
        """
        call = "copy_blocks"
        deadline_ns = self._deadline_ns()
        pairs = block_pairs(src_blocks, dst_blocks)
        cache = self._find(call, cache_id)
        largest = max(pairs.max_source, pairs.max_target)
        if largest >= cache.slots:
            raise invalid(call, f"block {largest} is out of range, cache {cache_id} has {cache.slots} blocks")
        self._wait_for_turn(call, deadline_ns)
        try:
            self._carry_out(call, lambda: self._copier.copy_blocks(cache, pairs, deadline_ns))
        finally:
            self._queue.release()

    def swap_blocks(
        self,
        cache_id: int,
        host_addresses: list[int],
        block_nbytes: int,
        src_blocks: list[int],
        dst_blocks: list[int],
        swap_in: bool,
    ) -> None:
        """Copy blocks between a cache and host memory, in every tensor, in the order of the lists.

        Parameters
        ----------
        cache_id : int
            The cache.
        host_addresses : list of int
            Address of each tensor in host memory.
        block_nbytes : int
            Bytes of a block.
        src_blocks, dst_blocks : list of int
            Block numbers, not negative and inside of the host memory.
        swap_in : bool
            From the host into the cache, or the other way.

        Raises
        ------
        LLMException
            The codes of ``KvCacheManager.swap_blocks``.
        """
        call = "swap_blocks"
        deadline_ns = self._deadline_ns()
        pairs = block_pairs(src_blocks, dst_blocks)
        cache = self._find(call, cache_id)
        if pairs.is_empty:
            return
        _check_host_addresses(call, host_addresses, cache.tensors)
        _check_device_blocks(call, cache, pairs, block_nbytes, swap_in)
        self._carry_out(
            call,
            lambda: self._copier.swap_blocks(cache, host_addresses, pairs, block_nbytes, swap_in, deadline_ns),
        )

    def copy_range(
        self, call: str, cache_id: int, tensor_index: int, offset: int, host: int, nbytes: int, into_cache: bool
    ) -> None:
        """Copy bytes between one tensor of a cache and host memory.

        Parameters
        ----------
        call : str
            Public name of the call.
        cache_id, tensor_index : int
            The tensor; it exists if the cache does.
        offset, nbytes : int
            Bytes of it, not negative.
        host : int
            Address in host memory.
        into_cache : bool
            From the host into the cache, or the other way.

        Raises
        ------
        LLMException
            LLM_KV_CACHE_NOT_EXIST. LLM_PARAM_INVALID: the bytes do not lie inside of the tensor. The mode's code for a
            timeout.
        """
        deadline_ns = self._deadline_ns()
        cache = self._find(call, cache_id)
        if offset + nbytes > cache.tensor_nbytes:
            reason = f"offset {offset} + {nbytes} bytes is out of range, tensors of cache {cache_id} have"
            raise invalid(call, f"{reason} {cache.tensor_nbytes} bytes")
        self._carry_out(
            call,
            lambda: self._copier.copy_range(cache, tensor_index, offset, host, nbytes, into_cache, deadline_ns),
        )

    def _deadline_ns(self) -> int:
        return time.monotonic_ns() + self._timeout_ms * 1_000_000

    def _find(self, call: str, cache_id: int) -> LocalCache:
        cache = self._table.by_id.get(cache_id)
        if cache is None:
            raise no_cache(call, cache_id)
        return cache

    def _wait_for_turn(self, call: str, deadline_ns: int) -> None:
        left = (deadline_ns - time.monotonic_ns()) / 1e9
        if not self._queue.acquire(timeout=max(left, 0.0)):
            raise self._timed_out(call)

    def _carry_out(self, call: str, copy: Callable[[], LocalOutcome]) -> None:
        try:
            outcome = copy()
        except VendorError as error:
            # Loaded here: processes without such a device need no word of it.
            from llm_datadist.devices.ascend.errors import llm_exception

            codes = {"timeout": self._timeout_code, "out_of_memory": self._out_of_memory_code}
            raise llm_exception(call, error, **codes) from error
        self._report(call, outcome)

    def _report(self, call: str, outcome: LocalOutcome) -> None:
        if outcome == LocalOutcome.DONE:
            return
        if outcome == LocalOutcome.TIMED_OUT:
            raise self._timed_out(call)
        if outcome == LocalOutcome.CACHE_RELEASED:
            reason = "the cache was deallocated during the call"
            raise failure(call, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, reason)
        raise failure(call, LLMStatusCode.LLM_FAILED, "the engine was finalized during the call")

    def _timed_out(self, call: str) -> LLMException:
        reason = f"not finished within sync_kv_timeout of {self._timeout_ms} ms"
        return failure(call, self._timeout_code, reason)


def _bytes_to_copy(call: str, src: LocalCache, dst: LocalCache, offset: int, size: int) -> int:
    """Resolve the size of a slot copy, whose bytes must lie in both slots."""
    strides = f"slots have {src.stride} bytes at the source and {dst.stride} at the destination"
    smaller = min(src.stride, dst.stride)
    if offset >= smaller:
        raise invalid(call, f"offset {offset} is out of range, {strides}")
    nbytes = src.stride - offset if size == -1 else size
    if offset + nbytes > smaller:
        raise invalid(call, f"offset {offset} + size {nbytes} is out of range, {strides}")
    return nbytes


def _check_host_addresses(call: str, addresses: list[int], tensors: int) -> None:
    if len(addresses) != tensors:
        raise invalid(call, f"the host cache has {len(addresses)} addresses, the device cache has {tensors} tensors")
    for address in addresses:
        if not 0 < address <= UINT64_MAX:
            raise invalid(call, f"host address {address} is out of range, should be in [1, 2**64)")


def _check_device_blocks(call: str, cache: LocalCache, pairs: BlockPairs, block_nbytes: int, swap_in: bool) -> None:
    """Check against the memory itself: a description may have been changed after the allocation."""
    last = pairs.max_target if swap_in else pairs.max_source
    if (last + 1) * block_nbytes > cache.tensor_nbytes:
        have = f"tensors of cache {cache.cache_id} have {cache.tensor_nbytes} bytes"
        raise invalid(call, f"block {last} of {block_nbytes} bytes is out of range, {have}")
