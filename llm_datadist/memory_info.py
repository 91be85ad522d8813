"""Memory that a program registers, as values: which kind, where, and how far its registration has come."""

from __future__ import annotations

from enum import Enum

from llm_datadist.arguments import check_isinstance


class RegisterMemStatus(Enum):
    """How far the members of a communicator have come with telling each other about their memory."""

    OK = 0
    PREPARING = 1
    FAILED = 2


int_to_mem_status_dict: dict[int, RegisterMemStatus] = {member.value: member for member in RegisterMemStatus}


class Memtype(Enum):
    """Where memory lives."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


class PushType(Enum):
    """What names the destination of a push."""

    NO_CACHE_KEY = 0
    BLOCKS_CACHE_KEY = 1
    CACHE_KEY_BY_ID = 2


class MemInfo:
    """A range of registered memory.

    Parameters
    ----------
    mem_type : Memtype
        Where it lives.
    addr : int
        Address of its first byte.
    size : int
        Bytes.

    Raises
    ------
    TypeError
        An argument of the wrong type.

    Examples
    --------
    >>> MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 512)
    MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=4096, size=512)
    """

    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        check_isinstance("mem_type", mem_type, Memtype, allow_none=False)
        check_isinstance("addr", addr, int, allow_none=False)
        check_isinstance("size", size, int, allow_none=False)
        self._mem_type = mem_type
        self._addr = addr
        self._size = size

    @property
    def mem_type(self) -> Memtype:
        """Where the memory lives."""
        return self._mem_type

    @property
    def addr(self) -> int:
        """Address of the first byte."""
        return self._addr

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self._mem_type}, addr={self._addr}, size={self._size})"
