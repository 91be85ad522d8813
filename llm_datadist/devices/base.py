"""What the engine asks of a device: one pool of cache memory."""

from __future__ import annotations

from typing import Protocol

from llm_datadist._local_copies import LocalCopier
from llm_datadist._segment import Memory


class DevicePool(Protocol):
    """Memory of one device that holds all its caches, as one range of addresses.

    Attributes
    ----------
    address : int
        Address of the first byte, as transfers and the program see it.
    capacity : int
        Bytes.
    """

    address: int
    capacity: int

    @property
    def segment(self) -> Memory:
        """The memory itself, for native code."""

    def prepare(self, offset: int, nbytes: int) -> None:
        """Make a range ready for use, so that the first transfer into it does not pay for that.

        Raises
        ------
        OSError
            The system has no memory for it.
        """

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """Give a range as writable bytes; it stays mapped as long as the view lives.

        Raises
        ------
        LLMException
            LLM_FEATURE_NOT_ENABLED: the host cannot see the memory of the device.
        """

    def contents(self, address: int, nbytes: int, deadline_ns: int) -> memoryview | None:
        """Give a copy of what is at an address of the pool; None if the host can see it where it is.

        Raises
        ------
        LLMException
            The device does not let it be copied, or not by the deadline (monotonic clock).
        """

    def copier(self, threads: int) -> LocalCopier:
        """Make what copies between caches, and between them and host memory, with so many threads of the host."""

    def close(self) -> None:
        """Give the memory up; may be called twice."""
