"""Size classes of the pool, against a model that keeps a plain list of what is allocated in each class."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from llm_datadist.engine.cache_pool import ALIGNMENT, CachePool, CachePoolExhausted
from llm_datadist.engine.options import SizeClass

MIB = 1 << 20
EXAMPLE = (SizeClass(2 * MIB, 256, 8192), SizeClass(10 * MIB, 8192, 8 * MIB), SizeClass(66 * MIB, 8192, 64 * MIB))


@st.composite
def size_classes(draw: st.DrawFn) -> list[SizeClass]:
    """One to four classes that keep every rule of the option."""
    classes, largest = [], 0
    for _ in range(draw(st.integers(1, 4))):
        total = 2 * MIB * draw(st.integers(max(1, (largest + 2) // (2 * MIB) + 1), 6 + largest // (2 * MIB)))
        blk = 1 << draw(st.integers(0, 21))
        low = max(blk, largest + 1)
        if low >= total:
            break
        largest = draw(st.integers(low, total - 1))
        classes.append(SizeClass(total, blk, largest))
    return classes or [SizeClass(2 * MIB, 256, 8192)]


class CachePoolMachine(RuleBasedStateMachine):
    offsets = Bundle("offsets")

    @initialize(classes=size_classes())
    def make(self, classes: list[SizeClass]) -> None:
        self.classes = classes
        self.bases = [sum(entry.total_size for entry in classes[:index]) for index in range(len(classes))]
        self.pool = CachePool(sum(entry.total_size for entry in classes), classes)
        self.live: list[dict[int, int]] = [{} for _ in classes]

    def gaps(self, index: int) -> list[int]:
        base, live = self.bases[index], self.live[index]
        ends = [base, *(offset + size for offset, size in sorted(live.items()))]
        starts = [*sorted(live), base + self.classes[index].total_size]
        return [start - end for end, start in zip(ends, starts)]

    @rule(target=offsets, tensors=st.integers(1, 8), which=st.integers(0, 4), data=st.data())
    def allocate(self, tensors: int, which: int, data: st.DataObject) -> object:
        bounds = [0, *(entry.max_buf_size for entry in self.classes), 1 << 40]
        which = min(which, len(self.classes))
        nbytes = data.draw(st.integers(bounds[which] + 1, bounds[which + 1]))
        if which == len(self.classes):
            with pytest.raises(CachePoolExhausted, match=f"tensors up to {bounds[which]} bytes") as raised:
                self.pool.allocate(tensors, nbytes)
            assert raised.value.hopeless
            return multiple()
        unit = max(self.classes[which].blk_size, ALIGNMENT)
        step = -(-nbytes // unit) * unit
        if step * tensors > max(self.gaps(which)):
            with pytest.raises(CachePoolExhausted) as raised:
                self.pool.allocate(tensors, nbytes)
            level = (step * tensors, sum(self.gaps(which)), max(self.gaps(which)))
            assert "wanted {} bytes, free {} bytes, largest free range {} bytes".format(*level) in str(raised.value)
            assert raised.value.hopeless == (step * tensors > self.classes[which].total_size)
            return multiple()
        extent = self.pool.allocate(tensors, nbytes)
        assert extent.step == step
        first, end, base = extent.offset, extent.offset + step * tensors, self.bases[which]
        assert base <= first <= end <= base + self.classes[which].total_size
        assert (first - base) % unit == 0
        assert all(end <= other or other + size <= first for other, size in self.live[which].items()), "overlap"
        self.live[which][first] = step * tensors
        return first

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        self.pool.free(offset)
        assert sum(live.pop(offset, 0) > 0 for live in self.live) == 1

    @rule(data=st.data())
    def free_what_is_not_allocated(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(-1, self.pool.capacity))
        if any(offset in live for live in self.live):
            return
        with pytest.raises(ValueError, match=f"no cache begins at offset {offset}"):
            self.pool.free(offset)

    @invariant()
    def statistics_agree(self) -> None:
        assert self.pool.capacity == sum(entry.total_size for entry in self.classes)
        assert self.pool.used == sum(sum(live.values()) for live in self.live)
        assert self.pool.available == self.pool.capacity - self.pool.used
        assert self.pool.largest_free == max(max(self.gaps(index)) for index in range(len(self.classes)))
        assert self.pool.allocations == sum(map(len, self.live))


CachePoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCachePoolAgainstModel = CachePoolMachine.TestCase


def example_pool() -> CachePool:
    return CachePool(78 * MIB, EXAMPLE)


@pytest.mark.parametrize(
    ("nbytes", "offset"),
    [(1, 0), (4096, 0), (8192, 0), (8193, 2 * MIB), (4 * MIB, 2 * MIB), (8 * MIB + 1, 12 * MIB), (64 * MIB, 12 * MIB)],
)
def test_the_first_class_that_covers_a_tensor_serves(nbytes: int, offset: int) -> None:
    assert example_pool().allocate(1, nbytes).offset == offset


def test_a_tensor_is_rounded_up_to_the_unit_of_its_class() -> None:
    pool = example_pool()
    assert pool.allocate(2, 257).step == ALIGNMENT
    assert pool.allocate(2, 9000).step == 16384
    assert pool.used == 2 * ALIGNMENT + 2 * 16384


def test_a_full_class_does_not_spill_into_another() -> None:
    pool = example_pool()
    for _ in range(256):
        pool.allocate(1, 8192)
    with pytest.raises(
        CachePoolExhausted, match="wanted 512 bytes, free 0 bytes.*tensors up to 8192 bytes.*total_size"
    ) as raised:
        pool.allocate(1, 1)
    assert not raised.value.hopeless
    assert pool.available == 76 * MIB


def test_more_tensors_than_a_class_holds() -> None:
    with pytest.raises(CachePoolExhausted) as raised:
        example_pool().allocate(3, 4 * MIB)
    assert raised.value.hopeless


def test_without_classes_there_is_one_region() -> None:
    pool = CachePool(MIB + 100)
    assert pool.capacity == MIB
    assert pool.allocate(2, 1000) == (0, 1024)
    assert pool.allocate(1, MIB - 2048) == (2048, MIB - 2048)
    with pytest.raises(CachePoolExhausted, match="ge.flowGraphMemMaxSize") as raised:
        pool.allocate(1, MIB)
    assert not raised.value.hopeless
    with pytest.raises(CachePoolExhausted, match=f"wanted {2 * MIB} bytes") as raised:
        pool.allocate(2, MIB)
    assert raised.value.hopeless
