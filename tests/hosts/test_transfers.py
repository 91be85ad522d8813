"""Pulls and transfers between two hosts, which share no memory."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMException, LLMStatusCode
from tests import datadist_member as dd
from tests.hosts.instances import (
    DECODER,
    LINKED,
    MIB,
    NOT_EXIST,
    OK,
    PROMPT,
    TCP,
    Apart,
    assert_bytes,
    link_apart,
    pull_and_compare,
)
from tests.hosts.network import Network, wait_until
from tests.integration.test_busy_prompt import HOLD_S, hold_lock_in_a_c_call
from tests.integration.test_links import links
from tests.integration.test_transfer import addresses, assert_slots, results, target, transfer

NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
STAYS = CacheKey(PROMPT, 2**64 - 1, 0, 9)  # a prefix key, which no pull consumes


@pytest.fixture
def apart(network: Network) -> Apart:
    return link_apart(network, pool_bytes=200 * MIB)


def test_the_transport_is_tcp_on_both_sides(apart: Apart) -> None:
    assert apart.decoder.call(links) == [(PROMPT, "LINKED", TCP)]
    assert apart.prompt.call(links) == [(DECODER, "LINKED", TCP)]
    apart.decoder.call(dd.check_link, PROMPT)


@pytest.mark.parametrize("nbytes", [1, 4096, 3 * MIB + 5, 64 * MIB])
def test_an_ordinary_key_is_consumed_by_one_pull(apart: Apart, nbytes: int) -> None:
    cache = apart.offer(7, seed=3, nbytes=nbytes)
    apart.prompt.call(dd.deallocate, cache)  # only its key holds it from here on
    assert apart.prompt.call(dd.pool_used) > 0
    apart.pull_and_compare(7, 3, nbytes)
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 0, "memory given back")
    with pytest.raises(LLMException) as caught:
        apart.pull_and_compare(7, 3, nbytes)
    assert caught.value.status_code is NOT_EXIST
    apart.assert_works(8)


def test_a_pull_by_id_and_one_with_a_prefix_key_consume_nothing(apart: Apart) -> None:
    cache = apart.prompt.call(dd.allocate, 2, (3, 4096), keys=[STAYS, CacheKey(PROMPT, 5), CacheKey(PROMPT, 6)])
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    for key, slot in [(STAYS, 0), (CacheKeyByIdAndIndex(PROMPT, cache, 2), 2)] * 3:
        apart.decoder.call(dd.clear, mine)
        apart.decoder.call(dd.pull_cache, key, mine)
        for tensor in range(2):
            wanted = dd.payload(1, tensor, 3 * 4096).reshape(3, 4096)[slot]
            assert apart.decoder.call(dd.read, mine, tensor) == wanted.tobytes()


@pytest.mark.parametrize(("block", "count"), [(1, 50), (4096, 700), (64 << 10, 200)])
def test_blocks_in_random_order(apart: Apart, block: int, count: int) -> None:
    shape = (count, block)
    key = BlocksCacheKey(PROMPT, 4)
    cache = apart.prompt.call(dd.allocate_blocks, 3, shape, key=key)
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate_blocks, 3, shape)
    apart.decoder.call(dd.fill, mine, 2)
    chosen = random.Random(count)
    moved = count * 2 // 3
    source, to = chosen.sample(range(count), moved), chosen.sample(range(count), moved)
    apart.decoder.call(dd.pull_blocks, key, mine, source, to)
    for tensor in range(3):
        wanted = dd.payload(2, tensor, count * block).reshape(shape).copy()
        wanted[to] = dd.payload(1, tensor, count * block).reshape(shape)[source]
        assert apart.decoder.call(dd.read, mine, tensor) == wanted.tobytes()


def test_a_wrong_pull_changes_nothing_and_leaves_the_link_whole(apart: Apart) -> None:
    apart.offer(7, seed=3)
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    other = apart.decoder.call(dd.allocate, 3, (1, 4096))
    apart.decoder.call(dd.fill, mine, 5)
    for key, cache, code in [
        (CacheKey(PROMPT, 99), mine, NOT_EXIST),
        (CacheKey(PROMPT, 7), other, LLMStatusCode.LLM_PARAM_INVALID),
        (CacheKeyByIdAndIndex(PROMPT, 12345, 0), mine, NOT_EXIST),
        (CacheKey(99, 7), mine, NOT_LINKED),
    ]:
        with pytest.raises(LLMException) as caught:
            apart.decoder.call(dd.pull_cache, key, cache)
        assert caught.value.status_code is code
    assert_bytes(apart.decoder, mine, 5, 4096)
    apart.pull_and_compare(7, 3)


def test_a_transfer_of_layers_to_addresses(apart: Apart) -> None:
    """One slot, as the prompt writes it layer by layer."""
    cache = apart.prompt.call(dd.allocate, 8, (3, 4096))
    mine, addrs = target(apart.decoder)
    config = (DECODER, [address + 2 * 4096 for address in addrs], None, 1)
    apart.prompt.call(transfer, cache, [config], writes=1)
    assert apart.prompt.call(results) == [OK]
    for tensor in range(8):
        assert_slots(apart.decoder, mine, tensor, {2: 1})


def test_large_transfers_of_layers(apart: Apart) -> None:
    nbytes = 16 * MIB
    cache = apart.prompt.call(dd.allocate, 4, (1, nbytes))
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate, 4, (1, nbytes))
    config = (DECODER, apart.decoder.call(addresses, mine), None, 0)
    for _ in range(3):
        apart.decoder.call(dd.clear, mine)
        apart.prompt.call(transfer, cache, [config])
        assert apart.prompt.call(results) == [OK]
        assert_bytes(apart.decoder, mine, 1, nbytes, 4)


def test_a_transfer_of_blocks_to_addresses(apart: Apart) -> None:
    cache = apart.prompt.call(dd.allocate_blocks, 2, (16, 1024))
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate_blocks, 2, (16, 1024))
    apart.decoder.call(dd.fill, mine, 2)
    source, to = [3, 9, 0, 15], [1, 14, 15, 4]
    config = (DECODER, apart.decoder.call(addresses, mine), None, 0)
    blocks = {"src_block_indices": source, "dst_block_indices": to, "dst_block_memory_size": 1024}
    apart.prompt.call(transfer, cache, [config], **blocks)
    assert apart.prompt.call(results) == [OK]
    for tensor in range(2):
        wanted = dd.payload(2, tensor, 16 * 1024).reshape(16, 1024).copy()
        wanted[to] = dd.payload(1, tensor, 16 * 1024).reshape(16, 1024)[source]
        assert apart.decoder.call(dd.read, mine, tensor) == wanted.tobytes()


def test_a_transfer_to_a_wrong_address_writes_nothing(apart: Apart) -> None:
    cache = apart.prompt.call(dd.allocate, 2, (1, 4096))
    mine, addrs = target(apart.decoder, 2, (1, 4096))
    for wrong in ([addrs[0], addrs[1] + 1], [addrs[0], 4096], [addrs[1] + 8192, addrs[1]]):
        apart.prompt.call(transfer, cache, [(DECODER, wrong, None, 0)])
        assert apart.prompt.call(results) == [LLMStatusCode.LLM_PARAM_INVALID]
    for tensor in range(2):
        assert_slots(apart.decoder, mine, tensor, {}, shape=(1, 4096))
    apart.assert_works(1)


def pull_from_threads(
    state: dd.State, first: int, count: int, nbytes: int, num_threads: int = 4
) -> list[LLMStatusCode]:
    """Pull ordinary keys from several threads, each into a cache of its own, and compare the bytes."""
    caches = threading.local()

    def pull(req_id: int) -> LLMStatusCode:
        if not hasattr(caches, "mine"):
            caches.mine = dd.allocate(state, 2, (1, nbytes))
        try:
            dd.pull_cache(state, CacheKey(PROMPT, req_id), caches.mine)
        except LLMException as error:
            return error.status_code
        for tensor in range(2):
            got = np.frombuffer(dd.read(state, caches.mine, tensor), np.uint8)
            np.testing.assert_array_equal(got, dd.payload(req_id, tensor, nbytes))
        return OK

    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(pull, range(first, first + count)))


def offer_many(state: dd.State, first: int, count: int, nbytes: int) -> None:
    for req_id in range(first, first + count):
        cache = dd.allocate(state, 2, (1, nbytes), keys=[CacheKey(PROMPT, req_id)])
        dd.fill(state, cache, req_id)
        dd.deallocate(state, cache)


@pytest.mark.parametrize("nbytes", [1000, 300_000])
@pytest.mark.parametrize("num_threads", [4, 40])
def test_many_pulls_at_the_same_time(apart: Apart, nbytes: int, num_threads: int) -> None:
    """Also from more threads than a link has connections."""
    apart.prompt.call(offer_many, 1, 100, nbytes)
    assert apart.decoder.call(pull_from_threads, 1, 100, nbytes, num_threads) == [OK] * 100
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 0, "memory given back")


def test_pulls_and_transfers_side_by_side(apart: Apart) -> None:
    nbytes = 2 * MIB
    apart.prompt.call(offer_many, 1, 30, nbytes)
    cache = apart.prompt.call(dd.allocate, 2, (1, nbytes))
    apart.prompt.call(dd.fill, cache, 1000)
    mine = apart.decoder.call(dd.allocate, 2, (1, nbytes))
    config: Any = (DECODER, apart.decoder.call(addresses, mine), None, 0)
    pulling = apart.decoder.start(pull_from_threads, 1, 30, nbytes)
    transfers = 0
    while transfers == 0 or not pulling.done():
        apart.decoder.call(dd.clear, mine)
        apart.prompt.call(transfer, cache, [config])
        assert apart.prompt.call(results) == [OK]
        assert_bytes(apart.decoder, mine, 1000, nbytes)
        transfers += 1
    assert pulling.result() == [OK] * 30


def test_a_prompt_that_holds_its_interpreter_lock_is_no_obstacle(apart: Apart) -> None:
    cache = apart.prompt.call(dd.allocate, 2, (1, 4 * MIB), keys=[STAYS])
    apart.prompt.call(dd.fill, cache, 1)
    pull_and_compare(apart.decoder, STAYS, 1, 4 * MIB)
    holding = apart.prompt.start(hold_lock_in_a_c_call)
    pulls = 0
    while not holding.done():
        pull_and_compare(apart.decoder, STAYS, 1, 4 * MIB)
        pulls += 1
    assert holding.result() >= HOLD_S
    assert pulls >= 5, "one pull may have waited for the lock, many cannot"


def test_unlink_and_link_again(apart: Apart) -> None:
    for req_id in range(1, 4):
        assert apart.unlink() == LINKED
        assert apart.decoder.call(links) == []
        wait_until(lambda: apart.prompt.call(links) == [], "prompt without links")
        apart.offer(req_id, req_id)
        with pytest.raises(LLMException) as caught:
            apart.pull_and_compare(req_id, req_id)
        assert caught.value.status_code is NOT_LINKED
        assert apart.link() == LINKED
        apart.pull_and_compare(req_id, req_id)


def held(_: dd.State) -> tuple[int, int]:
    """Count descriptors and threads of the process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_links_come_and_go_without_a_trace(apart: Apart) -> None:
    members = apart.prompt, apart.decoder
    for req_id in range(1, 3):
        assert (apart.unlink(), apart.link()) == (LINKED, LINKED)
        apart.assert_works(req_id)
    before = [member.call(held) for member in members]
    for req_id in range(3, 33):
        assert (apart.unlink(), apart.link()) == (LINKED, LINKED)
        apart.assert_works(req_id)
    for member, (descriptors, threads) in zip(members, before):
        wait_until(
            lambda member=member, most=(descriptors + 3, threads + 3): all(  # what is on its way out
                count <= allowed for count, allowed in zip(member.call(held), most)
            ),
            f"descriptors and threads given back by {member.name}",
        )


def test_finalize_ends_the_link(apart: Apart) -> None:
    apart.assert_works(1)
    apart.prompt.call(dd.finalize)
    wait_until(lambda: apart.decoder.call(links) == [(PROMPT, "BROKEN", TCP)], "word of the end")
    apart.decoder.call(dd.finalize)
