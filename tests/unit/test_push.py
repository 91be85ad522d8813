"""One-sided pushes: addresses are resolved before a byte is written, and claims hold what is written into."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from llm_datadist._directory import Claims, Directory
from llm_datadist._local import LocalCache, block_pairs
from llm_datadist._outcome import Outcome, TransferFault
from llm_datadist._push import PeerTarget
from llm_datadist._segment import Segment

POOL = 1 << 20
STRIDE = 64
SLOTS = 4
STEP = 512


class Sides:
    """A decoder's memory and the prompt that pushes into it."""

    def __init__(self) -> None:
        self.pool = Segment.create("test:pool", POOL, peers_may_write=True)
        self.directory = Directory(POOL, self.pool.address, 64)
        self.claims = Claims()
        self.directory.add_claims(self.claims)
        parts = (
            (self.pool, True),
            (self.directory.segment, False),
            (self.directory.ledger, True),
            (self.claims.segment, True),
        )
        self.peer = PeerTarget(*[Segment.attach(os.dup(part.fileno()), writable=write) for part, write in parts])
        self.memory = Segment.create("test:source", POOL, peers_may_write=False)
        view = memoryview(self.memory)
        for tensor in range(4):
            for slot in range(SLOTS):
                at = tensor * STEP + slot * STRIDE
                view[at : at + STRIDE] = bytes([16 * tensor + slot + 1]) * STRIDE
        self.source = LocalCache(1, self.memory.address, STEP, SLOTS * STRIDE, STRIDE, 4, SLOTS)

    def publish(self, cache_id: int, base: int, tensors: int = 2) -> int:
        return self.directory.publish_cache(cache_id, base, STEP, SLOTS * STRIDE, STRIDE, tensors, SLOTS)

    def push(self, offsets: list[int], slot: int = 0, table: dict[int, int] | None = None, first: int = 0) -> None:
        pairs = None if table is None else block_pairs(list(table), list(table.values()))
        addresses = [self.pool.address + offset for offset in offsets]
        self.peer.push(self.source, first, addresses, slot, pairs, 0, time.monotonic_ns() + 10**9)

    def fails(self, offsets: list[int], slot: int = 0, table: dict[int, int] | None = None, first: int = 0) -> Outcome:
        before = bytes(memoryview(self.pool))
        with pytest.raises(TransferFault) as caught:
            self.push(offsets, slot, table, first)
        assert bytes(memoryview(self.pool)) == before
        return caught.value.outcome

    def at(self, offset: int) -> int:
        return memoryview(self.pool)[offset]

    def close(self) -> None:
        self.peer.close(time.monotonic_ns())
        for part in (self.claims, self.directory, self.pool, self.memory):
            part.close()


@pytest.fixture
def sides() -> Iterator[Sides]:
    both = Sides()
    yield both
    both.close()


def test_a_slot_goes_to_its_addresses(sides: Sides) -> None:
    sides.publish(1, 0)
    sides.push([STRIDE, STEP + STRIDE], slot=3, first=2)
    assert [sides.at(STRIDE), sides.at(2 * STRIDE - 1), sides.at(STEP + STRIDE)] == [36, 36, 52]
    assert [sides.at(0), sides.at(2 * STRIDE), sides.at(STEP)] == [0, 0, 0]
    assert not sides.claims.busy


def test_blocks_go_where_the_block_tables_say(sides: Sides) -> None:
    sides.publish(1, 4096)
    sides.push([4096, 4096 + STEP], table={0: 3, 1: 2, 2: 0})
    assert [sides.at(4096 + slot * STRIDE) for slot in range(4)] == [3, 0, 2, 1]
    assert [sides.at(4096 + STEP + slot * STRIDE) for slot in range(4)] == [19, 0, 18, 17]


def test_two_caches_in_one_push(sides: Sides) -> None:
    sides.publish(1, 0)
    sides.publish(2, 8192)
    sides.push([8192, STEP])
    assert [sides.at(8192), sides.at(STEP)] == [1, 17]


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2 * STEP],  # behind the last tensor
        [0, POOL],
        [0, -8],
        [0, SLOTS * STRIDE],  # between two tensors
        [0, SLOTS * STRIDE - STRIDE + 1],  # a byte too far
        [2048, 0],
    ],
)
def test_a_wrong_address_writes_nothing(sides: Sides, offsets: list[int]) -> None:
    sides.publish(1, 0)
    assert sides.fails(offsets) is Outcome.TARGET_ADDRESS
    assert not sides.claims.busy


def test_blocks_beyond_the_tensor_write_nothing(sides: Sides) -> None:
    sides.publish(1, 0)
    assert sides.fails([0, STEP], table={0: 0, 1: SLOTS}) is Outcome.TARGET_ADDRESS
    assert sides.fails([0, STEP], table={0: 2**64 - 1}) is Outcome.TARGET_ADDRESS
    assert sides.fails([STRIDE, STEP], table={0: SLOTS - 1}) is Outcome.TARGET_ADDRESS


def test_what_the_source_does_not_have(sides: Sides) -> None:
    sides.publish(1, 0)
    assert sides.fails([0, STEP], slot=SLOTS) is Outcome.SLOT_UNKNOWN
    assert sides.fails([0, STEP], table={SLOTS: 0}) is Outcome.SOURCE_BLOCK
    assert sides.fails([0, STEP], first=3) is Outcome.SOURCE_TENSORS
    sides.source.release()
    assert sides.fails([0, STEP]) is Outcome.CACHE_RELEASED


def test_a_deallocated_cache_takes_nothing(sides: Sides) -> None:
    entry = sides.publish(1, 0)
    sides.push([0, STEP])
    sides.directory.unpublish(entry)
    assert sides.fails([0, STEP]) is Outcome.TARGET_ADDRESS
    sides.directory.release(entry)
    sides.publish(2, 0)
    sides.push([0, STEP], slot=1)
    assert sides.at(0) == 2


def test_a_revoked_or_dead_peer_ends_pushes(sides: Sides) -> None:
    sides.publish(1, 0)
    sides.directory.drop_claims(sides.claims)
    assert sides.fails([0, STEP]) is Outcome.REVOKED
    sides.peer.mark_dead()
    assert sides.fails([0, STEP]) is Outcome.PEER_DEAD
