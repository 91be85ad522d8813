"""What the engine asks of a device: one pool of cache memory."""

from __future__ import annotations

from typing import Protocol


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

    def prepare(self, offset: int, nbytes: int) -> None:
        """Make a range ready for use, so that the first transfer into it does not pay for that.

        Raises
        ------
        OSError
            The system has no memory for it.
        """

    def memory(self, offset: int, nbytes: int) -> memoryview:
        """Give a range as writable bytes; it stays mapped as long as the view lives."""

    def close(self) -> None:
        """Give the memory up; may be called twice."""
