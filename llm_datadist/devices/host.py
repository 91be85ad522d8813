"""Host memory as a device: a shared-memory pool that linked processes of the same host map."""

from __future__ import annotations

import ctypes
import time

from llm_datadist._local_copies import LocalCopier
from llm_datadist._segment import HUGE_PAGE
from llm_datadist.devices.base import SynchronizeLayer
from llm_datadist.devices.huge_pages import create_pool_segment
from llm_datadist.status import LLMException, LLMStatusCode

# Pages are taken in pieces, so that a very large cache cannot hold its caller up; the rest is paid at first touch.
_PREPARE_PIECE = HUGE_PAGE
_PREPARE_AT_ONCE = 16  # pieces; one request to the kernel has a cost of its own
_PREPARE_SECONDS = 0.25


class HostPool:
    """A pool in shared memory.

    Parameters
    ----------
    capacity : int
        Bytes, > 0. Pages are taken from the system when caches are allocated on them, and kept.
    peers_may_write : bool
        Whether a peer that it is shared with may push into it.

    Raises
    ------
    LLMException
        LLM_DEVICE_OUT_OF_MEMORY: the host has less memory available than `capacity`.
    """

    def __init__(self, capacity: int, *, peers_may_write: bool = False) -> None:
        available = _available_bytes()
        if capacity > available:
            raise LLMException(
                f"cannot reserve a pool of {capacity} bytes: {available} bytes of host memory are available,"
                " set ge.flowGraphMemMaxSize to less",
                status_code=LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY,
            )
        try:
            self.segment = create_pool_segment("llm_datadist:pool", capacity, peers_may_write=peers_may_write)
        except OSError as error:
            raise LLMException(
                f"cannot reserve a pool of {capacity} bytes: {error}",
                status_code=LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY,
            ) from error
        self.address = self.segment.address
        self.capacity = capacity
        self._prepared = bytearray(-(-capacity // _PREPARE_PIECE))  # one byte a piece: 1 once it has its pages

    def address_of(self, offset: int) -> int:
        return self.address + offset

    def offset_of(self, address: int) -> int:
        return address - self.address

    def prepare(self, offset: int, nbytes: int) -> None:
        end = -(-(offset + nbytes) // _PREPARE_PIECE)
        give_up = time.monotonic() + _PREPARE_SECONDS
        piece = self._prepared.find(0, offset // _PREPARE_PIECE, end)
        while piece >= 0 and time.monotonic() < give_up:
            stop = min(piece + _PREPARE_AT_ONCE, end)
            first = piece * _PREPARE_PIECE
            self.segment.populate(first, min(stop * _PREPARE_PIECE, self.capacity) - first)
            self._prepared[piece:stop] = b"\1" * (stop - piece)
            piece = self._prepared.find(0, stop, end)

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """Give a range of the pool as writable bytes; it stays mapped as long as the view lives."""
        return memoryview(self.segment)[offset : offset + nbytes]

    def view(self, address: int, nbytes: int) -> memoryview:
        offset = self.offset_of(address)
        if 0 <= offset <= self.capacity - nbytes:
            return self.memory(offset, nbytes)
        return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")

    def contents(self, address: int, nbytes: int, deadline_ns: int) -> None:
        """Give nothing: it can be seen where it is."""

    def copier(self, threads: int) -> LocalCopier:
        return LocalCopier(threads)

    def in_order(self, synchronize_layer: SynchronizeLayer, timeout_s: float) -> SynchronizeLayer:
        return synchronize_layer

    def close(self) -> None:
        self.segment.close()


def _available_bytes() -> int:
    """Memory that the system can give without swapping, in bytes (MemAvailable of proc(5))."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")
