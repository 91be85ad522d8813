"""The key directory: its owner on one side, pulls by a mapped peer on the other, in one process.

A model in plain Python says which keys exist; every pull must agree with it and deliver the bytes of its own key.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_datadist._directory import Claims, Directory, DirectoryFull
from llm_datadist._local import LocalCache, block_pairs
from llm_datadist._outcome import Outcome, TransferFault
from llm_datadist._pull import PeerSource
from llm_datadist._segment import Segment

ORDINARY, PREFIX, BLOCKS, CACHE = 1, 2, 3, 4
SLOT = 64
MAX_TENSORS = 8


class Sides:
    """Owner and peer of one link, and a local cache of the peer to pull into."""

    def __init__(self, num_entries: int = 256, pool_bytes: int = 1 << 20) -> None:
        self.pool = Segment.create("test:pool", pool_bytes, peers_may_write=False)
        self.directory = Directory(pool_bytes, self.pool.address, num_entries)
        self.claims = Claims()
        self.directory.add_claims(self.claims)
        self.peer = self.attach()
        self.local_memory = Segment.create("test:local", 1 << 20, peers_may_write=False)
        self.local = LocalCache(1, self.local_memory.address, 4096, 4 * SLOT, SLOT, MAX_TENSORS, 4)

    def attach(self) -> PeerSource:
        parts = (
            (self.pool, False),
            (self.directory.segment, False),
            (self.directory.ledger, True),
            (self.claims.segment, True),
        )
        return PeerSource(*[Segment.attach(os.dup(part.fileno()), writable=writable) for part, writable in parts])

    def publish(self, cache_id: int, tensors: int = 2, slots: int = 4) -> int:
        """Publish a cache at an offset of its own; every slot starts with its number and the cache's id."""
        base = (cache_id % 64) * 16384
        for tensor in range(tensors):
            for slot in range(slots):
                at = base + tensor * slots * SLOT + slot * SLOT
                memoryview(self.pool)[at : at + 3] = bytes((cache_id % 256, tensor, slot))
        return self.directory.publish_cache(cache_id, base, slots * SLOT, slots * SLOT, SLOT, tensors, slots)

    def pull(
        self,
        kind: int,
        number: int,
        model: int = 0,
        *,
        slot: int = 0,
        tensors: int = 2,
        first: int = 0,
        count: int = -1,
        nbytes: int = SLOT,
        offset: int = 0,
        consume: bool = True,
        seconds: float = 1.0,
    ) -> bytes:
        deadline = time.monotonic_ns() + int(seconds * 1e9)
        self.peer.pull_cache(
            self.local, kind, number, model, slot, 0, nbytes, first, count, 0, tensors, offset, 0, consume, deadline
        )
        return bytes(memoryview(self.local_memory)[:3])

    def fails(self, *args: object, **kwargs: object) -> Outcome:
        with pytest.raises(TransferFault) as caught:
            self.pull(*args, **kwargs)  # type: ignore[arg-type]
        return caught.value.outcome

    def close(self) -> None:
        self.peer.close(time.monotonic_ns())
        self.claims.close()
        self.directory.close()
        self.pool.close()
        self.local_memory.close()


@pytest.fixture
def sides() -> Iterator[Sides]:
    both = Sides()
    yield both
    both.close()


# ---- finding


def test_each_kind_of_key_has_a_name_space_of_its_own(sides: Sides) -> None:
    for cache_id, kind in ((1, ORDINARY), (2, PREFIX)):
        sides.directory.publish_key(sides.publish(cache_id), kind, 7, 0, 3)
    assert sides.pull(ORDINARY, 7) == bytes((1, 0, 3))
    assert sides.pull(PREFIX, 7) == bytes((2, 0, 3))
    assert sides.pull(CACHE, 2, slot=1) == bytes((2, 0, 1))
    assert sides.fails(ORDINARY, 7, 1) is Outcome.KEY_UNKNOWN
    assert sides.fails(CACHE, 3) is Outcome.KEY_UNKNOWN
    assert sides.fails(CACHE, 2, slot=4) is Outcome.SLOT_UNKNOWN


def test_what_does_not_fit_the_remote_cache(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    assert sides.fails(ORDINARY, 7, nbytes=SLOT, offset=1) is Outcome.SOURCE_RANGE
    assert sides.fails(ORDINARY, 7, nbytes=1, offset=2**64 - 1) is Outcome.SOURCE_RANGE
    assert sides.fails(ORDINARY, 7, first=1, count=2) is Outcome.SOURCE_TENSORS
    assert sides.fails(ORDINARY, 7, first=2**63, count=2**62) is Outcome.SOURCE_TENSORS
    assert sides.fails(ORDINARY, 7, tensors=3) is Outcome.TENSOR_COUNT
    assert sides.pull(ORDINARY, 7) == bytes((1, 0, 0))  # none of these released the key


def test_many_keys_in_few_buckets() -> None:
    sides = Sides(num_entries=64)
    indices = [sides.directory.publish_key(sides.publish(1), ORDINARY, 0, 0, 0)]
    indices += [sides.directory.publish_key(0, ORDINARY, number, 0, number % 4) for number in range(1, 63)]
    with pytest.raises(DirectoryFull, match="all 64 entries"):
        sides.directory.publish_key(0, ORDINARY, 99, 0, 0)
    for number in range(0, 63, 2):
        sides.directory.unpublish(indices[number])
    for number in range(63):
        if number % 2:
            assert sides.pull(ORDINARY, number, consume=False) == bytes((1, 0, number % 4))
        else:
            assert sides.fails(ORDINARY, number) is Outcome.KEY_UNKNOWN
    sides.close()


def test_entries_are_used_again_only_after_release(sides: Sides) -> None:
    cache = sides.publish(1)
    key = sides.directory.publish_key(cache, ORDINARY, 7, 0, 0)
    sides.directory.unpublish(key)
    with pytest.raises(ValueError, match="not published"):
        sides.directory.unpublish(key)
    assert sides.directory.used_entries == 2
    with pytest.raises(ValueError, match="still published"):
        sides.directory.release(cache)
    sides.directory.unpublish(cache)
    sides.directory.release(cache)
    sides.directory.release(key)
    assert sides.directory.used_entries == 0


# ---- consuming


def test_a_complete_pull_consumes_an_ordinary_key_once(sides: Sides) -> None:
    key = sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 2)
    assert not sides.directory.has_hints
    sides.pull(ORDINARY, 7)
    assert sides.directory.is_consumed(key)
    assert sides.fails(ORDINARY, 7) is Outcome.KEY_UNKNOWN
    assert sides.directory.has_hints
    assert sides.directory.take_consumed() == [key]
    assert sides.directory.take_consumed() == []
    assert sides.directory.scan_consumed() == [key]


def test_prefix_keys_and_pulls_that_do_not_consume_leave_the_key(sides: Sides) -> None:
    cache = sides.publish(1)
    sides.directory.publish_key(cache, PREFIX, 7, 0, 1)
    sides.directory.publish_key(cache, ORDINARY, 8, 0, 2)
    for _ in range(3):
        sides.pull(PREFIX, 7)
        sides.pull(ORDINARY, 8, consume=False)
        sides.pull(CACHE, 1, slot=1)  # its key is a prefix key
    assert sides.directory.take_consumed() == []


def test_a_pull_by_id_consumes_the_key_of_its_slot(sides: Sides) -> None:
    cache = sides.publish(1)
    keys = [sides.directory.publish_key(cache, ORDINARY, 10 + slot, 0, slot) for slot in range(3)]
    sides.directory.unpublish(keys[0])  # a gap at the front of the chain
    sides.pull(CACHE, 1, slot=2)
    assert sides.directory.take_consumed() == [keys[2]]
    sides.pull(CACHE, 1, slot=3)  # a slot without a key
    assert sides.directory.take_consumed() == []


@pytest.mark.parametrize("tensors", [2, 48, 49, 336, 337, 1000])
def test_partial_pulls_add_up(sides: Sides, tensors: int) -> None:
    base = sides.directory.publish_cache(1, 0, SLOT, SLOT, SLOT, tensors, 1)
    key = sides.directory.publish_key(base, ORDINARY, 7, 0, 0)
    sides.local = LocalCache(1, sides.local_memory.address, SLOT, SLOT, SLOT, tensors, 1)
    half = tensors // 2
    sides.pull(ORDINARY, 7, first=0, count=half, tensors=half)
    sides.pull(ORDINARY, 7, first=0, count=half, tensors=half)  # the same ones again
    assert not sides.directory.is_consumed(key)
    for tensor in range(tensors - 1, half, -1):
        sides.pull(ORDINARY, 7, first=tensor, count=1, tensors=1)
    assert not sides.directory.is_consumed(key)
    sides.pull(ORDINARY, 7, first=half, count=1, tensors=1)
    assert sides.directory.is_consumed(key)


def test_a_new_key_in_an_old_entry_starts_unpulled(sides: Sides) -> None:
    for cache_id in range(1, 20):
        cache = sides.publish(cache_id)
        key = sides.directory.publish_key(cache, ORDINARY, 7, 0, 0)
        sides.pull(ORDINARY, 7, first=cache_id % 2, count=1, tensors=1)
        assert not sides.directory.is_consumed(key)
        for index in (key, cache):
            sides.directory.unpublish(index)
            sides.directory.release(index)


# ---- blocks


def test_blocks_go_where_the_block_tables_say(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), BLOCKS, 0, 5, 0)
    deadline = time.monotonic_ns() + 10**9
    sides.peer.pull_blocks(sides.local, BLOCKS, 0, 5, 0, block_pairs([3, 0, 1], [0, 2, 3]), 0, -1, 0, 2, None, deadline)
    view = memoryview(sides.local_memory)
    assert [view[tensor * 4096 + slot * SLOT + 2] for tensor in (0, 1) for slot in (0, 2, 3)] == [3, 0, 1, 3, 0, 1]
    assert bytes(view[SLOT : 2 * SLOT]) == bytes(SLOT)


@pytest.mark.parametrize(
    ("blocks", "stride", "outcome"),
    [([4], SLOT, Outcome.SOURCE_BLOCK), ([2**64 - 1], SLOT, Outcome.SOURCE_BLOCK), ([0], 32, Outcome.BLOCK_SIZE)],
)
def test_blocks_that_do_not_fit(sides: Sides, blocks: list[int], stride: int, outcome: Outcome) -> None:
    sides.directory.publish_key(sides.publish(1), BLOCKS, 0, 0, 0)
    local = LocalCache(1, sides.local_memory.address, 4096, 4 * stride, stride, 2, 4)
    with pytest.raises(TransferFault) as caught:
        sides.peer.pull_blocks(
            local, BLOCKS, 0, 0, 0, block_pairs(blocks, [0]), 0, -1, 0, 2, None, time.monotonic_ns() + 10**9
        )
    assert caught.value.outcome is outcome
    assert caught.value.remote_slots == 4


@pytest.mark.parametrize("make", [list, tuple, lambda blocks: array("q", blocks), lambda blocks: array("H", blocks)])
def test_block_pairs_of_lists_tuples_and_arrays(make: Callable[[list[int]], Any]) -> None:
    pairs = block_pairs(make([3, 0, 700]), make([1, 2, 0]))
    assert (pairs.count, pairs.max_source, pairs.max_target) == (3, 700, 2)


@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_block_pairs_of_numpy_arrays(sides: Sides, name: str) -> None:
    sides.directory.publish_key(sides.publish(1), BLOCKS, 0, 0, 0)
    source, target = np.array([9, 3, 9, 0, 9, 1], name)[1::2], np.array([0, 2, 3], name)
    pairs = block_pairs(source, target)
    sides.peer.pull_blocks(sides.local, BLOCKS, 0, 0, 0, pairs, 0, -1, 0, 2, None, time.monotonic_ns() + 10**9)
    view = memoryview(sides.local_memory)
    assert [view[slot * SLOT + 2] for slot in (0, 2, 3)] == [3, 0, 1]


@pytest.mark.parametrize(
    ("blocks", "error", "text"),
    [
        (np.array([[1]]), TypeError, "one dimension, of integers"),
        (np.array([1.0]), TypeError, "one dimension, of integers"),
        (np.array([True]), TypeError, "one dimension, of integers"),
        (np.array([-1], np.int8), ValueError, "block number -1 is out of range"),
        (array("d", [1.0]), TypeError, "one dimension, of integers"),
        ({1: 2}, TypeError, "bytes-like"),
        ("1", TypeError, "bytes-like"),
    ],
)
def test_block_pairs_refuses_other_arrays(blocks: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        block_pairs(blocks, [0])


def test_block_pairs_checks_its_lists() -> None:
    pairs = block_pairs([5, 0, True], [1, 9, 2])
    assert (pairs.count, pairs.max_source, pairs.max_target) == (3, 5, 9)
    with pytest.raises(ValueError, match="out of range"):
        block_pairs([-1], [0])
    with pytest.raises(ValueError, match="out of range"):
        block_pairs([0], [2**64])
    with pytest.raises(TypeError, match="only support int"):
        block_pairs(["0"], [0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="size should be same"):
        block_pairs([0], [0, 1])


# ---- claims, death, lies


def test_a_revoked_link_delivers_nothing(sides: Sides) -> None:
    key = sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    sides.directory.drop_claims(sides.claims)
    assert sides.fails(ORDINARY, 7) is Outcome.REVOKED
    assert not sides.directory.is_consumed(key)


def test_a_dead_peer_ends_pulls_at_once(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    sides.peer.mark_dead()
    assert sides.peer.dead
    assert sides.fails(ORDINARY, 7, seconds=100) is Outcome.PEER_DEAD


def test_a_pull_waits_while_an_unlink_is_undecided(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), PREFIX, 7, 0, 0)
    assert sides.peer.begin_close()
    assert sides.fails(PREFIX, 7, seconds=0.05) is Outcome.LINK_CLOSED
    for decide, wanted in (
        (sides.peer.reopen, None),
        (lambda: sides.peer.close(time.monotonic_ns() + 10**9), "closed"),
    ):
        sides.peer.begin_close()
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(sides.pull if wanted is None else sides.fails, PREFIX, 7, seconds=20)
            with pytest.raises(FutureTimeoutError):
                waiting.result(0.05)
            decide()
            assert waiting.result(10) == (bytes((1, 0, 0)) if wanted is None else Outcome.LINK_CLOSED)


def test_an_unlink_that_finds_a_pull_running_does_not_disturb_it(sides: Sides) -> None:
    """Pulls go on while another thread asks again and again whether the link is in use."""
    sides.directory.publish_key(sides.publish(1), PREFIX, 7, 0, 0)
    done = threading.Event()

    def ask() -> int:
        refused = 0
        while not done.is_set():
            if sides.peer.begin_close():
                sides.peer.reopen()
            else:
                refused += 1
        return refused

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        try:
            for _ in range(5000):
                assert sides.pull(PREFIX, 7, seconds=10) == bytes((1, 0, 0))
        finally:
            done.set()
        assert asking.result(10) >= 0


def test_a_closed_link_starts_no_pull(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    assert sides.pull(ORDINARY, 7, consume=False) == bytes((1, 0, 0))
    assert sides.peer.close(time.monotonic_ns() + 10**9)
    assert sides.fails(ORDINARY, 7) is Outcome.LINK_CLOSED


def test_a_released_local_cache_takes_no_bytes(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    sides.local.release()
    assert sides.fails(ORDINARY, 7) is Outcome.CACHE_RELEASED
    assert bytes(memoryview(sides.local_memory)[:3]) == bytes(3)


def test_hazards_that_a_dead_peer_left_hold_memory_until_its_link_is_dropped(sides: Sides) -> None:
    cache = sides.publish(5)
    page = memoryview(sides.claims.segment).cast("Q")
    page[8 + 3] = 5  # hazard 3
    page[2] = 1 << 3  # in use
    assert sides.claims.busy
    sides.directory.unpublish(cache)
    assert sides.directory.is_claimed(5)
    assert not sides.directory.is_claimed(6)
    sides.directory.drop_claims(sides.claims)
    assert not sides.directory.is_claimed(5)
    page.release()


def test_a_full_claim_page_waits_until_the_deadline(sides: Sides) -> None:
    sides.directory.publish_key(sides.publish(1), ORDINARY, 7, 0, 0)
    page = memoryview(sides.claims.segment).cast("Q")
    page[2] = 0xFFFFFFFF
    assert sides.fails(ORDINARY, 7, seconds=0.02) is Outcome.TIMED_OUT
    page.release()


@pytest.mark.parametrize("word", range(8))
def test_entries_that_point_outside_of_the_pool_are_refused(word: int) -> None:
    geometry = [0, SLOT, SLOT, SLOT, 2, 1]  # base, step, tensor bytes, stride, tensors, slots
    lies = [(0, 1 << 20), (1, 1 << 20), (2, 2 << 20), (3, 0), (4, 1 << 40), (5, 2**63), (0, 2**64 - SLOT), (1, 2**63)]
    field, value = lies[word]
    geometry[field] = value
    sides = Sides()
    base, step, nbytes, stride, tensors, slots = geometry
    sides.directory.publish_cache(9, base, step, nbytes, stride, tensors, slots)
    assert sides.fails(CACHE, 9) is Outcome.BAD_DIRECTORY
    sides.close()


def test_a_peer_cannot_make_the_owner_lose_other_keys(sides: Sides) -> None:
    """Noise all over the memory that peers may write costs at most keys; the owner's tables stay sound."""
    cache = sides.publish(1)
    sides.directory.publish_key(cache, PREFIX, 7, 0, 0)
    view = memoryview(sides.directory.ledger)
    view[:] = b"\xff" * len(view)
    view.release()
    assert sides.directory.take_consumed() == []
    assert sides.directory.scan_consumed() == []
    sides.directory.unpublish(cache)


def test_segments_that_do_not_fit_together_are_refused() -> None:
    sides = Sides()
    small = Segment.create("test:small", 4096, peers_may_write=True)
    pool, directory, ledger, claims = sides.pool, sides.directory.segment, sides.directory.ledger, sides.claims.segment
    for parts in (
        (small, directory, ledger, claims),
        (pool, small, ledger, claims),
        (pool, directory, small, claims),
        (pool, directory, ledger, small),
    ):
        with pytest.raises(ValueError, match="layout|fit together"):
            PeerSource(*parts)
    small.close()
    sides.close()


# ---- a model


class Bound(NamedTuple):
    cache_id: int
    slot: int
    pulled: frozenset[int]
    index: int


Name = tuple[int, int, int]


class DirectoryMachine(RuleBasedStateMachine):
    """Random publishing, pulling and removing, compared with dictionaries."""

    @initialize()
    def start(self) -> None:
        self.sides = Sides(num_entries=64)
        self.keys: dict[Name, Bound] = {}
        self.caches: dict[int, list[int]] = {}
        self.consumed: set[int] = set()
        self.next_id = 0

    @rule(
        names=st.lists(
            st.tuples(st.sampled_from([ORDINARY, PREFIX]), st.integers(0, 5), st.integers(0, 1)),
            max_size=4,
            unique=True,
        )
    )
    def publish(self, names: list[Name]) -> None:
        names = [name for name in names if name not in self.keys]
        if self.sides.directory.used_entries + 1 + len(names) > 64:
            return
        self.next_id += 1
        cache = self.sides.publish(self.next_id)
        self.caches[self.next_id] = [cache]
        for slot, (kind, number, model) in enumerate(names):
            index = self.sides.directory.publish_key(cache, kind, number, model, slot)
            self.caches[self.next_id].append(index)
            self.keys[kind, number, model] = Bound(self.next_id, slot, frozenset(), index)

    @rule(
        kind=st.sampled_from([ORDINARY, PREFIX]),
        number=st.integers(0, 5),
        model=st.integers(0, 1),
        part=st.sampled_from([(0, -1), (0, 1), (1, 1), (0, 2)]),
        consume=st.booleans(),
    )
    def pull(self, kind: int, number: int, model: int, part: tuple[int, int], consume: bool) -> None:
        name = (kind, number, model)
        first, count = part
        tensors = 2 if count < 0 else count
        bound = self.keys.get(name)
        if bound is None:
            assert (
                self.sides.fails(kind, number, model, first=first, count=count, tensors=tensors) is Outcome.KEY_UNKNOWN
            )
            return
        got = self.sides.pull(kind, number, model, first=first, count=count, tensors=tensors, consume=consume)
        assert got == bytes((bound.cache_id % 256, first, bound.slot))
        if consume and kind == ORDINARY:
            pulled = bound.pulled | set(range(first, first + tensors))
            self.keys[name] = bound._replace(pulled=pulled)
            if pulled == {0, 1}:
                self.consumed.add(bound.index)
                del self.keys[name]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        cache_id = data.draw(st.sampled_from(sorted(self.caches)))
        indices = self.caches.pop(cache_id)
        self.sides.directory.unpublish(indices[0])
        for index in indices[1:]:
            self.sides.directory.unpublish(index)
            self.consumed.discard(index)
        for index in indices:
            self.sides.directory.release(index)
        self.keys = {name: bound for name, bound in self.keys.items() if bound.cache_id != cache_id}

    @rule()
    def take_hints(self) -> None:
        assert set(self.sides.directory.take_consumed()) <= self.consumed

    @invariant()
    def owner_and_model_agree(self) -> None:
        if hasattr(self, "sides"):
            assert set(self.sides.directory.scan_consumed()) == self.consumed
            assert self.sides.directory.used_entries == sum(len(indices) for indices in self.caches.values())

    def teardown(self) -> None:
        if hasattr(self, "sides"):
            self.sides.close()


TestDirectoryModel = DirectoryMachine.TestCase
TestDirectoryModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
