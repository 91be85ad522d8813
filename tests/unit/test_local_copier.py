"""The native copies inside a process, against copies in numpy."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist._local import LocalCache, block_pairs
from llm_datadist._local_copies import LocalCopier, LocalOutcome

Array = npt.NDArray[np.uint8]
MIB = 1 << 20


def in_a_minute() -> int:
    return time.monotonic_ns() + 60 * 10**9


def random_bytes(*shape: int) -> Array:
    return np.random.default_rng(list(shape)).integers(0, 256, shape, np.uint8)


def cache_over(memory: Array, cache_id: int = 1) -> LocalCache:
    """Describe an array of (tensors, slots, stride) as a cache."""
    tensors, slots, stride = memory.shape
    return LocalCache(cache_id, memory.ctypes.data, slots * stride, slots * stride, stride, tensors, slots)


Pairs = list[tuple[int, int]]
BLOCKS = 8
pairs_of_blocks = st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)), max_size=24)
neighbours = st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(
    lambda run: [(run[0] + i, run[1] + i) for i in range(run[2]) if max(run[:2]) + i < BLOCKS]
)
tables = pairs_of_blocks | st.lists(neighbours, max_size=6).map(lambda runs: [pair for run in runs for pair in run])


@given(tables)
@settings(deadline=None)
def test_blocks_are_copied_one_pair_after_the_other(table: Pairs) -> None:
    memory = random_bytes(3, BLOCKS, 40)
    wanted = memory.copy()
    for source, target in table:
        wanted[:, target] = wanted[:, source]
    pairs = block_pairs([source for source, _ in table], [target for _, target in table])
    assert LocalCopier(2).copy_blocks(cache_over(memory), pairs, in_a_minute()) == LocalOutcome.DONE
    np.testing.assert_array_equal(memory, wanted)


@pytest.mark.parametrize("stride", [64, MIB + 8])
@pytest.mark.parametrize("step", [1, -1])
def test_a_chain_of_neighbours_carries_its_first_block_to_all(stride: int, step: int) -> None:
    """The pairs join on both sides, and one large copy of all of them would shift the blocks instead."""
    memory = random_bytes(4, BLOCKS, stride)
    wanted = np.repeat(memory[:, [0 if step == 1 else -1]], BLOCKS, axis=1)
    chain = list(range(BLOCKS))[::step]
    LocalCopier(4).copy_blocks(cache_over(memory), block_pairs(chain[:-1], chain[1:]), in_a_minute())
    np.testing.assert_array_equal(memory, wanted)


@given(tables, st.booleans())
@settings(deadline=None)
def test_blocks_are_swapped_in_order(table: Pairs, swap_in: bool) -> None:
    device, host = random_bytes(3, BLOCKS, 24), random_bytes(3, BLOCKS, 24)[::-1].copy()
    wanted_device, wanted_host = device.copy(), host.copy()
    wanted_target, wanted_source = (wanted_device, wanted_host) if swap_in else (wanted_host, wanted_device)
    for source, target in table:
        wanted_target[:, target] = wanted_source[:, source]
    pairs = block_pairs([source for source, _ in table], [target for _, target in table])
    addresses = [tensor.ctypes.data for tensor in host]
    outcome = LocalCopier(2).swap_blocks(cache_over(device), addresses, pairs, 24, swap_in, in_a_minute())
    assert outcome == LocalOutcome.DONE
    np.testing.assert_array_equal(device, wanted_device)
    np.testing.assert_array_equal(host, wanted_host)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 64])
@pytest.mark.parametrize("tensors", [1, 2, 7])
def test_large_copies_are_the_same_in_any_number_of_threads(threads: int, tensors: int) -> None:
    device = random_bytes(tensors, 4, 3 * MIB + 16)
    host = np.zeros_like(device)
    addresses = [tensor.ctypes.data for tensor in host]
    pairs = block_pairs([0, 1, 3], [2, 3, 0])
    LocalCopier(threads).swap_blocks(cache_over(device), addresses, pairs, 3 * MIB + 16, False, in_a_minute())
    np.testing.assert_array_equal(host[:, [2, 3, 0]], device[:, [0, 1, 3]])
    assert not host[:, 1].any()


def test_a_part_of_a_slot() -> None:
    memory = random_bytes(2, 4, 16)
    wanted = memory.copy()
    wanted[:, 3, 4:12] = wanted[:, 1, 4:12]
    cache = cache_over(memory)
    assert LocalCopier(1).copy_slot(cache, cache, 3, 1, 4, 8, in_a_minute()) == LocalOutcome.DONE
    np.testing.assert_array_equal(memory, wanted)


def test_a_slot_onto_itself() -> None:
    memory = random_bytes(2, 2, 16)
    wanted = memory.copy()
    cache = cache_over(memory)
    assert LocalCopier(1).copy_slot(cache, cache, 1, 1, 0, 16, in_a_minute()) == LocalOutcome.DONE
    np.testing.assert_array_equal(memory, wanted)


def test_how_copies_end_early() -> None:
    memory, other = random_bytes(1, 2, 2 * MIB), random_bytes(1, 2, 2 * MIB)
    cache, released = cache_over(memory), cache_over(other)
    released.release()
    copier = LocalCopier(1)
    assert copier.copy_slot(cache, cache, 1, 0, 0, 2 * MIB, 0) == LocalOutcome.TIMED_OUT
    assert copier.copy_slot(released, cache, 1, 0, 0, 2 * MIB, in_a_minute()) == LocalOutcome.CACHE_RELEASED
    before = memory.copy()
    assert copier.close(in_a_minute())
    assert copier.copy_blocks(cache, block_pairs([0], [1]), in_a_minute()) == LocalOutcome.CLOSED
    assert copier.copy_blocks(released, block_pairs([0], [1]), in_a_minute()) == LocalOutcome.CLOSED
    np.testing.assert_array_equal(memory, before)
    assert not cache.pinned
    assert not released.pinned


def test_host_addresses_that_do_not_fit() -> None:
    cache, pairs = cache_over(random_bytes(2, 2, 16)), block_pairs([0], [0])
    copier = LocalCopier(1)
    for addresses in ([], [64], [64, 64, 64]):
        with pytest.raises(ValueError, match="addresses"):
            copier.swap_blocks(cache, addresses, pairs, 16, True, in_a_minute())
    with pytest.raises(TypeError):
        copier.swap_blocks(cache, ["64", 64], pairs, 16, True, in_a_minute())  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        copier.swap_blocks(cache, [-64, 64], pairs, 16, True, in_a_minute())
