"""Huge pages for a pool, where the system has them: fewer look-ups of addresses while a copy runs, and fewer faults.

The first that is to be had: pages that the administrator keeps in reserve (``vm.nr_hugepages``), if they cover the
pool; transparent ones, taken as caches are allocated (Linux 6.1, unless
``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` is ``deny``); ordinary pages.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llm_datadist._segment import HUGE_PAGE, Segment
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist")

VARIABLE = "LLM_DATADIST_HUGE_PAGES"  # environment: "auto" (default) or "off"
_MEMINFO = Path("/proc/meminfo")


def create_pool_segment(name: str, capacity: int, *, peers_may_write: bool) -> Segment:
    """Make the segment of a pool, on the largest pages that are to be had.

    Raises
    ------
    OSError
        The kernel refuses the memory.
    LLMException
        LLM_PARAM_INVALID: the environment variable is neither ``auto`` nor ``off``.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "off"):
        raise LLMException(
            f"{VARIABLE} is {wanted!r}, should be 'auto' or 'off'", status_code=LLMStatusCode.LLM_PARAM_INVALID
        )
    if wanted == "auto" and capacity <= _free_reserve():
        try:
            segment = Segment.create(name, capacity, peers_may_write=peers_may_write, reserved_huge_pages=True)
        except OSError as error:
            _log.info("the reserve of huge pages cannot be used: %s", error)
        else:
            _log.info("the pool of %d bytes lies on reserved huge pages", capacity)
            return segment
    segment = Segment.create(name, capacity, peers_may_write=peers_may_write)
    if wanted == "auto":
        segment.prefer_huge_pages()
    return segment


def _free_reserve() -> int:
    """Bytes of huge pages in reserve that nobody has claimed."""
    numbers = {}
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in ("HugePages_Free", "HugePages_Rsvd", "Hugepagesize"):
            numbers[name] = int(rest.split()[0])
    if numbers.get("Hugepagesize", 0) * 1024 != HUGE_PAGE:
        return 0
    return (numbers.get("HugePages_Free", 0) - numbers.get("HugePages_Rsvd", 0)) * HUGE_PAGE
