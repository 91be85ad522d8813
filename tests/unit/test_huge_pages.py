"""Pools on huge pages where there are any, and on ordinary ones where not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_datadist import LLMException, LLMStatusCode
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


@pytest.mark.parametrize(
    ("text", "advise"),
    [("always within_size [advise] never deny force", True), ("always within_size advise [never] deny force", False)],
)
def test_transparent_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, advise: bool) -> None:
    (tmp_path / "shmem_enabled").write_text(f"{text}\n")
    monkeypatch.setattr(huge_pages, "_SHMEM_ENABLED", tmp_path / "shmem_enabled")
    assert huge_pages._may_advise() is advise
    assert usable(3 << 20)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert usable(3 << 20)
    monkeypatch.setenv(VARIABLE, "please")
    with pytest.raises(LLMException, match=f"{VARIABLE} is 'please', should be 'auto' or 'off'") as raised:
        usable(1)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
