"""The pool allocator, against a model that keeps a plain list of what is allocated."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from llm_datadist._pool import Pool, PoolExhausted

ALIGNMENT = 512


def rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class PoolMachine(RuleBasedStateMachine):
    offsets = Bundle("offsets")

    @initialize(capacity=st.one_of(st.integers(ALIGNMENT, 200 * ALIGNMENT), st.sampled_from([1 << 30, (1 << 63) - 1])))
    def make(self, capacity: int) -> None:
        self.pool = Pool(capacity)
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.live: dict[int, int] = {}

    def gaps(self) -> list[int]:
        ends = [0, *(offset + size for offset, size in sorted(self.live.items()))]
        starts = [*sorted(self.live), self.capacity]
        return [start - end for end, start in zip(ends, starts)]

    def allocate(self, nbytes: int) -> object:
        if rounded(nbytes) > max(self.gaps()):
            with pytest.raises(PoolExhausted) as raised:
                self.pool.allocate(nbytes)
            error = raised.value
            assert (error.wanted, error.free, error.largest) == (nbytes, sum(self.gaps()), max(self.gaps()))
            return multiple()
        offset = self.pool.allocate(nbytes)
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= self.capacity - rounded(nbytes)
        assert all(offset + rounded(nbytes) <= other or other + size <= offset for other, size in self.live.items()), (
            "overlap"
        )
        self.live[offset] = rounded(nbytes)
        return offset

    @rule(target=offsets, nbytes=st.integers(1, 100 * ALIGNMENT))
    def allocate_some(self, nbytes: int) -> object:
        return self.allocate(nbytes)

    @rule(target=offsets, more=st.integers(-1, 1))
    def allocate_about_the_largest(self, more: int) -> object:
        return self.allocate(max(1, self.pool.largest_free + more))

    @rule(target=offsets, divisor=st.integers(1, 20))
    def allocate_part_of_the_pool(self, divisor: int) -> object:
        return self.allocate(max(1, self.capacity // divisor))

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        self.pool.free(offset)
        del self.live[offset]

    @rule(offset=st.one_of(st.integers(-1, 200 * ALIGNMENT), st.integers(0, 200).map(lambda k: k * ALIGNMENT)))
    def free_what_is_not_allocated(self, offset: int) -> None:
        if offset in self.live:
            return
        with pytest.raises(ValueError, match=f"no allocation begins at offset {offset}"):
            self.pool.free(offset)

    @invariant()
    def statistics_agree(self) -> None:
        assert self.pool.capacity == self.capacity
        assert self.pool.used == sum(self.live.values())
        assert self.pool.available == self.capacity - self.pool.used
        assert self.pool.largest_free == max(self.gaps())
        assert self.pool.allocations == len(self.live)

    def teardown(self) -> None:
        for offset in self.live:
            self.pool.free(offset)
        self.live = {}
        self.statistics_agree()
        assert self.pool.allocate(self.capacity) == 0


PoolMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestPoolAgainstModel = PoolMachine.TestCase


def test_whole_pool_and_nothing_more() -> None:
    pool = Pool(1000 * ALIGNMENT + 511)
    assert pool.capacity == 1000 * ALIGNMENT
    assert pool.allocate(1000 * ALIGNMENT) == 0
    assert pool.largest_free == 0
    with pytest.raises(PoolExhausted, match="wanted 1 bytes, free 0 bytes, largest free block 0 bytes"):
        pool.allocate(1)


def test_freed_twice() -> None:
    pool = Pool(1 << 20)
    offset = pool.allocate(1)
    pool.free(offset)
    with pytest.raises(ValueError, match="no allocation"):
        pool.free(offset)


def test_offset_inside_an_allocation_is_unknown() -> None:
    pool = Pool(1 << 20)
    pool.allocate(4 * ALIGNMENT)
    with pytest.raises(ValueError, match="no allocation"):
        pool.free(ALIGNMENT)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_request_must_be_positive(nbytes: int) -> None:
    with pytest.raises(ValueError, match="should be > 0"):
        Pool(1 << 20).allocate(nbytes)


def test_request_beyond_64_bits_is_exhaustion() -> None:
    with pytest.raises(PoolExhausted) as raised:
        Pool(1 << 20).allocate(1 << 70)
    assert raised.value.wanted == 1 << 70


def test_capacity_too_small() -> None:
    with pytest.raises(ValueError, match="should be >= 512"):
        Pool(511)


def test_a_size_inside_a_class_gets_its_blocks_back() -> None:
    # 1000 units lie inside the class of 992 to 1007; larger blocks must stay whole while these are free.
    pool = Pool(1 << 30)
    blocks = [pool.allocate(1000 * ALIGNMENT) for _ in range(3)]
    pool.allocate(ALIGNMENT)
    largest = pool.largest_free
    pool.free(blocks[1])
    assert pool.allocate(1000 * ALIGNMENT) == blocks[1]
    assert pool.largest_free == largest


def test_hundred_thousand_allocations_in_any_order() -> None:
    rng = random.Random(7)
    pool = Pool(1 << 40)
    sizes = {pool.allocate(size): rounded(size) for size in (rng.randrange(1, 1 << 20) for _ in range(100_000))}
    offsets = sorted(sizes)
    assert all(first + sizes[first] <= second for first, second in zip(offsets, offsets[1:]))
    rng.shuffle(offsets)
    for offset in offsets:
        pool.free(offset)
    assert (pool.used, pool.allocations, pool.largest_free) == (0, 0, pool.capacity)
