"""What the engine asks of a device: one pool of cache memory."""

from __future__ import annotations

from typing import Callable, Protocol

from llm_datadist._local_copies import LocalCopier
from llm_datadist._segment import Memory

SynchronizeLayer = Callable[[int, None], object]  # waits for a layer of the model; falsy: it failed


class DevicePool(Protocol):
    """Memory that holds all caches of one device.

    The places in it have offsets from 0 on. Those below `capacity` are one range of addresses on the device; behind
    them may be others, for caches that the program wants in host memory.

    Attributes
    ----------
    address : int
        Address of the first byte, as transfers and the program see it.
    capacity : int
        Bytes of the range on the device.
    """

    address: int
    capacity: int

    @property
    def segment(self) -> Memory:
        """The memory itself, for native code."""

    def address_of(self, offset: int) -> int:
        """Address of a place."""

    def offset_of(self, address: int) -> int:
        """Place that has an address."""

    def prepare(self, offset: int, nbytes: int) -> None:
        """Make a range ready for use, so that the first transfer into it does not pay for that.

        Raises
        ------
        OSError
            The system has no memory for it.
        """

    def view(self, address: int, nbytes: int) -> memoryview:
        """Give memory of this process as writable bytes; in the pool it stays mapped as long as the view lives.

        Raises
        ------
        LLMException
            LLM_FEATURE_NOT_ENABLED: the host cannot see the memory of the device.
        """

    def contents(self, address: int, nbytes: int, deadline_ns: int) -> memoryview | None:
        """Give a copy of what is at an address of this process; None if the host can see it where it is.

        Raises
        ------
        LLMException
            The device does not let it be copied, or not by the deadline (monotonic clock).
        """

    def copier(self, threads: int) -> LocalCopier:
        """Make what copies between caches, and between them and host memory, with so many threads of the host."""

    def in_order(self, synchronize_layer: SynchronizeLayer, timeout_s: float) -> SynchronizeLayer:
        """Give a synchronizer that returns when the bytes of a layer can be read; the program's may return earlier.

        It waits `timeout_s` at most after the program's has returned, and raises TimeoutError then.
        """

    def close(self) -> None:
        """Give the memory up; may be called twice."""
