"""The options ``llm.MemPoolConfig`` and ``llm.HostMemPoolConfig``: a pool of memory for caches."""

from __future__ import annotations

import json
from typing import NamedTuple

from llm_datadist.arguments import INT64_MAX
from llm_datadist.status import InvalidArgument

_DEFAULT_PAGE_SHIFT = 16
_PAGE_SHIFTS = range(10, 31)


class MemPool(NamedTuple):
    """A pool.

    Attributes
    ----------
    memory_size : int
        Bytes; 0 = no pool.
    page_shift : int
        Base-2 logarithm of the unit that allocations are rounded up to.
    """

    memory_size: int = 0
    page_shift: int = _DEFAULT_PAGE_SHIFT

    @property
    def page_bytes(self) -> int:
        """Unit that allocations are rounded up to."""
        return 1 << self.page_shift


def parse_mem_pool(key: str, text: str, limit: int | None = None) -> MemPool:
    """Read a pool.

    Parameters
    ----------
    key : str
        Name of the option.
    text : str
        JSON: ``{"memory_size": N, "page_shift": P}``.
    limit : int, optional
        Most bytes of the pool.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: the text is no such JSON, or a number breaks a rule.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{key} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f'{key} is {text[:64]!r}, should be an object with "memory_size"')
    size, shift = document.get("memory_size"), document.get("page_shift", _DEFAULT_PAGE_SHIFT)
    # JSON's true and false are ints to Python.
    if type(size) is not int or not 0 < size <= INT64_MAX:
        raise InvalidArgument(f"{key}: memory_size is {size!r}, should be a number of bytes greater than 0")
    if limit is not None and size > limit:
        raise InvalidArgument(f"{key}: memory_size is {size}, should be at most {limit}")
    if type(shift) is not int or shift not in _PAGE_SHIFTS:
        raise InvalidArgument(
            f"{key}: page_shift is {shift!r}, should be an integer in [{_PAGE_SHIFTS.start}, {_PAGE_SHIFTS.stop})"
        )
    return MemPool(size, shift)
