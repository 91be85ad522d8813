"""The copy engine against a copy in plain Python."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist._copy import copy_runs

SIZE = 4096


def in_a_second() -> int:
    return time.monotonic_ns() + 10**9


Runs = list[tuple[int, int, int]]


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Runs]:
    tensors = draw(st.integers(1, 4))
    runs = []
    for _ in range(draw(st.integers(0, 20))):
        nbytes = draw(st.integers(0, SIZE // 4))
        runs.append((draw(st.integers(0, SIZE - nbytes)), draw(st.integers(0, SIZE - nbytes)), nbytes))
    return tensors, runs


@given(plans(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_every_plan_copies_what_slices_would_copy(plan: tuple[int, Runs], random: object) -> None:
    tensors, runs = plan
    generator = np.random.default_rng(len(runs))
    sources = [generator.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(tensors)]
    targets = [np.zeros(SIZE, np.uint8) for _ in range(tensors)]
    expected = [target.copy() for target in targets]
    for source, target in zip(sources, expected):
        for source_offset, target_offset, nbytes in runs:
            target[target_offset : target_offset + nbytes] = source[source_offset : source_offset + nbytes]
    result = copy_runs([a.ctypes.data for a in sources], [a.ctypes.data for a in targets], runs, in_a_second())
    assert result == 0
    for target, wanted in zip(targets, expected):
        np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize("shift", range(0, 64, 7))
@pytest.mark.parametrize("tail", [0, 1, 63, 64, 65])
def test_large_copies_touch_exactly_their_bytes(shift: int, tail: int) -> None:
    """Beyond the size where copies go past the caches, at every kind of alignment, in runs of several sizes."""
    size = 6 << 20
    source = np.random.default_rng(shift).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros(size, np.uint8)
    wanted = target.copy()
    runs = [(shift, 100, (5 << 20) + tail), (3, (5 << 20) + 1000 + shift, 4096 + tail), (0, size - 60 - tail, 50)]
    for source_offset, target_offset, nbytes in runs:
        wanted[target_offset : target_offset + nbytes] = source[source_offset : source_offset + nbytes]
    assert copy_runs([source.ctypes.data], [target.ctypes.data], runs, in_a_second()) == 0
    np.testing.assert_array_equal(target, wanted)


def test_large_unaligned_runs() -> None:
    source = np.random.default_rng(1).integers(0, 256, 8 << 20, dtype=np.uint8)
    target = np.zeros_like(source)
    nbytes = (8 << 20) - 13
    assert copy_runs([source.ctypes.data + 5], [target.ctypes.data + 9], [(0, 0, nbytes)], in_a_second()) == 0
    np.testing.assert_array_equal(target[9 : 9 + nbytes], source[5 : 5 + nbytes])
    assert not target[:9].any()
    assert not target[9 + nbytes :].any()


def test_a_passed_deadline_ends_a_large_copy() -> None:
    source = np.ones(8 << 20, np.uint8)
    target = np.zeros_like(source)
    runs = [(0, 0, source.size)]
    assert copy_runs([source.ctypes.data], [target.ctypes.data], runs, time.monotonic_ns() - 1) == 1
    assert target[-1] == 0


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 source tensors but 2"):
        copy_runs([1], [1, 2], [], in_a_second())
