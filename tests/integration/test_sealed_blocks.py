"""Blocks that are sealed under a token: a pull with it delivers what was published, or fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import LLMStatusCode
from llm_datadist.engine.keys import KeyKind, KeyName
from tests import registering_engines as reg
from tests.integration.test_registered_memory import (
    BLOCKS,
    INVALID,
    KEY,
    NOT_EXIST,
    OK,
    ONE,
    POOL,
    SHAPE,
    TWO,
    Two,
    block,
    two,
    way,
)
from tests.processes import Member

__all__ = ["two", "way"]


def publish(pair: Two, cache_id: int, blocks: list[int], lease_s: float | None = None) -> bytes:
    token = pair.owner.call(reg.do, "publish_blocks", cache_id, blocks, lease_s)
    assert type(token) is bytes
    return token


def pull(pair: Two, mine: int, blocks: list[int], token: bytes | None, key: KeyName = BLOCKS) -> LLMStatusCode:
    code = pair.peer.call(reg.outcome, "pull_blocks", ONE, key, mine, blocks, blocks, None, None, token)
    assert isinstance(code, LLMStatusCode)
    return code


@pytest.mark.parametrize("in_pool", [False, True])
def test_a_token_is_good_until_it_is_retired(two: Two, in_pool: bool) -> None:
    theirs = two.owner.call(reg.register, 2, SHAPE, 1, (), 0, in_pool)
    mine = two.peer.call(reg.register, 2, SHAPE)
    token = publish(two, theirs, [1, 2, 5])
    assert pull(two, mine, [1, 2, 5], token) is OK
    assert pull(two, mine, [5], token) is OK
    assert two.blocks_at_peer(mine, 1)[2] == block(1, 1, 2)
    assert pull(two, mine, [1, 3], token) is NOT_EXIST  # block 3 was never published
    two.owner.call(reg.do, "retire_blocks", token)
    for blocks in ([1, 2, 5], [5]):
        assert pull(two, mine, blocks, token) is NOT_EXIST
    assert pull(two, mine, [1, 2, 5], None) is OK
    two.owner.call(reg.do, "retire_blocks", token)  # again: nothing happens


def test_a_block_that_is_published_anew_belongs_to_its_new_token(two: Two) -> None:
    theirs = two.owner.call(reg.register, 1, SHAPE, 1, (), 0)
    mine = two.peer.call(reg.register, 1, SHAPE)
    first, second = publish(two, theirs, [1, 2]), publish(two, theirs, [2, 3])
    assert first != second
    assert pull(two, mine, [1], first) is OK
    assert pull(two, mine, [1, 2], first) is NOT_EXIST
    assert pull(two, mine, [2, 3], second) is OK
    two.owner.call(reg.do, "retire_blocks", first)
    assert pull(two, mine, [1], first) is NOT_EXIST
    assert pull(two, mine, [2, 3], second) is OK


def test_tokens_of_allocated_caches_and_of_several_models(two: Two) -> None:
    nbytes = SHAPE[0] * SHAPE[1]
    theirs = two.owner.call(reg.do, "allocate", 1, nbytes, SHAPE[0], (), 3)[0]
    other = two.owner.call(reg.register, 1, SHAPE, 1, (), 4)
    mine = two.peer.call(reg.register, 1, SHAPE)
    key, other_key = (int(KeyKind.BLOCKS), 0, 3), (int(KeyKind.BLOCKS), 0, 4)
    token = publish(two, theirs, [0, 7])
    assert pull(two, mine, [0, 7], token, key) is OK
    assert pull(two, mine, [0], token, other_key) is NOT_EXIST
    other_token = publish(two, other, [0])
    assert pull(two, mine, [0], other_token, other_key) is OK
    two.owner.call(reg.do, "deallocate", theirs)
    again = two.owner.call(reg.do, "allocate", 1, nbytes, SHAPE[0], (), 3)[0]
    assert pull(two, mine, [0], token, key) is NOT_EXIST
    publish(two, again, [0])
    assert pull(two, mine, [0], token, key) is NOT_EXIST


def test_a_lease_ends_by_itself(two: Two) -> None:
    theirs = two.owner.call(reg.register, 1, SHAPE, 1, (), 0)
    mine = two.peer.call(reg.register, 1, SHAPE)
    long, short = publish(two, theirs, [0], 60.0), publish(two, theirs, [1, 2], 0.3)
    forever = publish(two, theirs, [4])
    renewed = publish(two, theirs, [2], 60.0)
    assert two.owner.call(reg.do, "retire_expired", theirs) == []
    deadline = time.monotonic() + 10
    while pull(two, mine, [1], short) is OK:
        assert time.monotonic() < deadline
    assert pull(two, mine, [1], short) is NOT_EXIST
    # Block 2 has another token by now and is not free.
    assert two.owner.call(reg.do, "retire_expired", theirs) == [1]
    assert two.owner.call(reg.do, "retire_expired", theirs) == []
    for blocks, token in (([0], long), ([4], forever), ([2], renewed)):
        assert pull(two, mine, blocks, token) is OK


def test_what_cannot_be_published_or_pulled(two: Two) -> None:
    theirs = two.owner.call(reg.register, 1, SHAPE, 1, [KEY], 0)
    mine = two.peer.call(reg.register, 1, SHAPE)
    assert two.owner.call(reg.do, "publish_blocks", theirs, [0, SHAPE[0]], None) is INVALID
    assert two.owner.call(reg.do, "publish_blocks", 99, [0], None) is NOT_EXIST
    token = publish(two, theirs, [0])
    assert two.owner.call(reg.do, "retire_blocks", b"no token") is INVALID
    for wrong in (b"", token[:-1], token + b"\0", b"x" * len(token)):
        assert pull(two, mine, [0], wrong) is INVALID
    for index in range(8, 24):  # the cache and the generation; the end of the lease is for the puller alone
        forged = token[:index] + bytes([token[index] ^ 1]) + token[index + 1 :]
        assert pull(two, mine, [0], forged) is NOT_EXIST
    code = two.peer.call(reg.outcome, "pull_blocks", ONE, KEY, mine, None, [0], None, None, token)
    assert code is NOT_EXIST  # parts of a slot are not what was sealed
    assert pull(two, mine, [0], token) is OK


def test_a_token_of_the_owner_that_died_does_not_fit_its_successor(
    members: Callable[[str], Member], free_port: Callable[[], int]
) -> None:
    port, peer = free_port(), members("peer")
    peer.call(reg.open_engine, TWO)
    mine = peer.call(reg.register, 1, SHAPE)
    tokens = []
    for life in range(2):
        owner = members(f"owner {life}")
        owner.call(reg.open_engine, ONE, port, **POOL)
        assert peer.call(reg.link, ONE, port) == (OK, [OK])
        theirs = owner.call(reg.register, 1, SHAPE, 1 + life, (), 0)
        pair = Two(owner, peer)
        tokens.append(publish(pair, theirs, [0]))
        assert pull(pair, mine, [0], tokens[-1]) is OK
        if life == 0:
            owner.kill()
            peer.call(reg.do, "unlink", [reg.address_of(ONE, port)], 1000, True)
    assert pull(pair, mine, [0], tokens[0]) is NOT_EXIST


# ---- an owner that uses its blocks again and again


def reuse_blocks(state: reg.State, cache_id: int, seconds: float, seed: int) -> int:
    """Write a number into blocks, publish them, retire them, and write the next; gives the last number."""
    engine, arrays = state["engine"], state["tensors"][cache_id]
    choice, end, number = random.Random(seed), time.monotonic() + seconds, 0
    views = [array.reshape(SHAPE) for array in arrays]
    while time.monotonic() < end:
        number = number % 250 + 1
        chosen = choice.sample(range(SHAPE[0]), 3)
        for view in views:
            view[chosen] = number
        token = engine.publish_blocks(cache_id, chosen)
        state["offer"] = (number, chosen, token)
        for _ in range(choice.randrange(200)):
            pass
        engine.retire_blocks(token)
        for view in views:
            view[chosen] = 0xFF  # what no pull with the token may deliver
    state["offer"] = None
    return number


def offer(state: reg.State) -> Any:
    return state.get("offer", ())


def pull_offers(state: reg.State, cache_id: int, offers: list[Any], with_token: bool) -> tuple[int, int, int]:
    """Pull each offer some times; gives how many pulls were good, wrong, and refused."""
    views = [array.reshape(SHAPE) for array in state["tensors"][cache_id]]
    good = wrong = refused = 0
    for number, chosen, token in offers:
        for _ in range(20):
            code = reg.outcome(
                state, "pull_blocks", ONE, BLOCKS, cache_id, chosen, chosen, None, None, token if with_token else None
            )
            if code is not OK:
                assert code is NOT_EXIST
                refused += 1
                break
            if all((view[chosen] == number).all() for view in views):
                good += 1
            else:
                wrong += 1
    return good, wrong, refused


@pytest.mark.parametrize("in_pool", [False, True])
@pytest.mark.parametrize("with_token", [True, False])
def test_blocks_that_are_used_again(two: Two, with_token: bool, in_pool: bool) -> None:
    """Without a token the same pulls deliver other bytes than were meant: this test can see them."""
    theirs = two.owner.call(reg.register, 2, SHAPE, 1, (), 0, in_pool)
    mine = two.peer.call(reg.register, 2, SHAPE)
    reusing = two.owner.start(reuse_blocks, theirs, 2.0, 7)
    total = np.zeros(3, int)
    while not reusing.done():
        offered = two.owner.call(offer)
        if offered:
            total += two.peer.call(pull_offers, mine, [offered], with_token)
    good, wrong, refused = total.tolist()
    if with_token:
        assert wrong == 0
        assert refused > 20
    else:
        assert wrong > 20
        assert good + refused >= 0
