"""Pools on huge pages where there are any, and on ordinary ones where not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist._segment import HUGE_PAGE, Segment
from llm_datadist.devices import huge_pages
from llm_datadist.devices.huge_pages import VARIABLE, create_pool_segment

MEMINFO = "MemTotal: 1 kB\nHugePages_Total: 9\nHugePages_Free: {free}\nHugePages_Rsvd: 1\nHugepagesize: {size} kB\n"


def usable(nbytes: int) -> bool:
    """Whether a segment can be made, written and read."""
    segment = create_pool_segment("test:pool", nbytes, peers_may_write=True)
    try:
        segment.populate(0, nbytes)
        memoryview(segment)[nbytes - 1 : nbytes] = b"x"
        return segment.size >= nbytes and bytes(memoryview(segment)[nbytes - 1 : nbytes]) == b"x"
    finally:
        segment.close()


def test_this_system() -> None:
    assert usable(3 << 20)


@pytest.mark.parametrize("free", [0, 1, 3, 1 << 30])
def test_a_reserve_that_is_too_small_or_only_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int
) -> None:
    """What the system says it has may be gone in the next moment."""
    (tmp_path / "meminfo").write_text(MEMINFO.format(free=free, size=2048))
    monkeypatch.setattr(huge_pages, "_MEMINFO", tmp_path / "meminfo")
    assert usable(3 << 20)


def test_huge_pages_of_another_size_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO.format(free=100, size=1048576))
    monkeypatch.setattr(huge_pages, "_MEMINFO", tmp_path / "meminfo")
    assert huge_pages._free_reserve() == 0


def on_huge_pages(segment: Segment) -> int:
    """Bytes of a segment that the kernel maps in huge pages."""
    entries = Path("/proc/self/smaps").read_text(encoding="ascii").split("VmFlags")
    (entry,) = [entry for entry in entries if f"\n{segment.address:x}-" in entry]
    return int(entry.partition("ShmemPmdMapped:")[2].split()[0]) * 1024


@pytest.mark.parametrize(("first", "nbytes", "huge"), [(0, 9, 4), (1, 5, 2), (1, 1, 0), (3, 6, 2)])
def test_whole_huge_pages_inside_a_range_are_taken(first: int, nbytes: int, huge: int) -> None:
    """In units of half a huge page."""
    half = HUGE_PAGE // 2
    segment = create_pool_segment("test:pool", 9 * half + 5000, peers_may_write=True)
    try:
        segment.populate(first * half, nbytes * half)
        if not segment.huge_pages:
            pytest.skip("this kernel gives shared memory no huge pages, or has none left")
        assert on_huge_pages(segment) == huge * HUGE_PAGE
        assert not any(memoryview(segment)[: segment.size])
    finally:
        segment.close()


def test_what_is_there_stays_when_pages_are_widened() -> None:
    segment = create_pool_segment("test:pool", 4 * HUGE_PAGE, peers_may_write=True)
    try:
        peer = Segment.attach(os.dup(segment.fileno()), writable=True)
        written = bytes(range(256)) * (4 * HUGE_PAGE // 256)
        memoryview(peer)[:] = written
        segment.populate(0, segment.size)
        assert bytes(memoryview(segment)) == written
        memoryview(segment)[HUGE_PAGE] = 77
        assert memoryview(peer)[HUGE_PAGE] == 77
        peer.close()
    finally:
        segment.close()


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    segment = create_pool_segment("test:pool", 2 * HUGE_PAGE, peers_may_write=True)
    segment.populate(0, segment.size)
    assert on_huge_pages(segment) == 0
    segment.close()
    monkeypatch.setenv(VARIABLE, "please")
    with pytest.raises(LLMException, match=f"{VARIABLE} is 'please', should be 'auto' or 'off'") as raised:
        usable(1)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
