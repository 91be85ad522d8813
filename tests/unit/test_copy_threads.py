"""How many threads a copy uses, and that they end with their last user."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_datadist import LLMException
from llm_datadist._copy import copy_runs, enter_workers, leave_workers
from llm_datadist.engine import copy_threads as module
from llm_datadist.engine.copy_threads import MAX_THREADS, VARIABLE, copy_threads

MIB = 1 << 20


def native_threads() -> list[str]:
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name.startswith("llm_datadist")]


def wait_for_threads(count: int) -> None:
    """A thread takes its name when it first runs, and the kernel takes a moment to forget one that has ended."""
    deadline = time.monotonic() + 5
    while len(native_threads()) != count:
        assert time.monotonic() < deadline, native_threads()


def copy(threads: int, nbytes: int = 8 * MIB) -> bool:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    target = np.zeros_like(source)
    deadline = time.monotonic_ns() + 10**10
    runs = [(0, 0, nbytes)]
    assert copy_runs([source.ctypes.data], [target.ctypes.data], runs, deadline, threads=threads) == 0
    return bool((source == target).all())


@pytest.fixture
def user() -> Iterator[None]:
    enter_workers()
    yield
    leave_workers()


def test_threads_come_with_the_first_large_copy_and_stay_parked(user: None) -> None:
    assert native_threads() == []
    assert copy(1)
    assert copy(4, 64 << 10)
    assert native_threads() == []
    assert copy(4)
    wait_for_threads(3)
    assert copy(2)
    wait_for_threads(3)


def test_threads_end_with_their_last_user() -> None:
    enter_workers()
    enter_workers()
    assert copy(3)
    leave_workers()
    wait_for_threads(2)
    leave_workers()
    wait_for_threads(0)


def test_a_forked_child_copies_without_threads(user: None) -> None:
    assert copy(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if copy(3) and native_threads() == [] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_wanted_counts_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "3")
    assert copy_threads(5) == 5
    assert copy_threads() == 3


@pytest.mark.parametrize("text", ["0", "-1", "65", "two", "", "1.5", "\u0663"])
def test_a_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(LLMException, match=f"{VARIABLE} is .* should be a number from 1 to {MAX_THREADS}"):
        copy_threads()


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 3), ("1000 100000", 1), ("900000 100000", 8)],
)
def test_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, threads: int) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(module, "_QUOTA_V2", tmp_path / "cpu.max")
    assert copy_threads() == threads


def test_control_groups_of_version_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(module, "_QUOTA_V2", tmp_path / "none")
    files = tmp_path / "quota", tmp_path / "period"
    monkeypatch.setattr(module, "_QUOTA_V1", files)
    assert copy_threads() == 8
    for text, threads in (("-1", 8), ("300000", 3)):
        files[0].write_text(f"{text}\n")
        files[1].write_text("100000\n")
        assert copy_threads() == threads
