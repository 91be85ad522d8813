"""pull_cache while the prompt computes, dies, or re-uses its memory."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, KvCacheManager, LLMException, LLMRole
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.conftest import Linked, Start, StartRemote
from tests.conformance.expectations import INVALID_ID, LITTLE_S, NOT_EXIST, OK, TIMEOUT, outcome, wait_until
from tests.conformance.remote import PROMPT, SENTINEL, link_to, payload_slot, slot, target
from tests.datadist_member import cluster_info
from tests.processes import Member

MIB = 1 << 20
HOLD_S = 2.0
PREFIX = CacheKey(PROMPT, INVALID_ID, 0, 7)


def hold_the_interpreter(state: dd.State) -> None:
    """Compute in pure Python without handing the lock over."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(HOLD_S)
    end = time.monotonic() + HOLD_S
    try:
        while time.monotonic() < end:
            pass
    finally:
        sys.setswitchinterval(interval)


def test_C192_a_busy_prompt(linked: Linked) -> None:
    linked.prompt.offer(PREFIX)
    mine = target(linked.manager)
    holding = linked.prompt.member.start(hold_the_interpreter)
    end = time.monotonic() + HOLD_S / 2
    slowest = 0.0
    while time.monotonic() < end:
        started = time.monotonic()
        linked.manager.pull_cache(PREFIX, mine)
        slowest = max(slowest, time.monotonic() - started)
    assert not holding.done()
    assert slowest < HOLD_S / 4
    assert slot(mine, 0, 0) == payload_slot(1, 0, 0)
    holding.result()


def test_C193_a_prompt_killed_in_a_pull(
    start: Start, start_remote: StartRemote, members: Callable[[str], Member]
) -> None:
    prompt = start_remote(members("prompt"), LLMRole.PROMPT, PROMPT, pool_bytes=20 * MIB)
    decoder = start(LLMRole.DECODER, sync_kv_timeout=2000, pool_bytes=20 * MIB)
    link_to(decoder, prompt)
    shape = (1, 16 * MIB)
    prompt.offer(PREFIX, tensors=1, shape=shape)
    mine = target(decoder.kv_cache_manager, 1, shape)
    pulled, ended = threading.Event(), []

    def pull_until_it_fails() -> None:
        try:
            while True:
                decoder.kv_cache_manager.pull_cache(PREFIX, mine)
                pulled.set()
        except LLMException:
            ended.append(time.monotonic())

    puller = threading.Thread(target=pull_until_it_fails)
    puller.start()
    assert pulled.wait(10)
    killed = time.monotonic()
    prompt.member.kill()
    puller.join(10)
    assert ended
    assert ended[0] - killed < 2 + LITTLE_S
    assert decoder.kv_cache_manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_INT8)).cache_id > 0


def test_C194_a_millisecond_for_a_large_pull(process: Member, start_remote: StartRemote, start: Start) -> None:
    remote_prompt = start_remote(process, LLMRole.PROMPT, PROMPT, pool_bytes=50 * MIB)
    decoder = start(LLMRole.DECODER, sync_kv_timeout=1, pool_bytes=50 * MIB)
    link_to(decoder, remote_prompt)
    shape = (1, 48 * MIB)
    remote_prompt.offer(PREFIX, tensors=1, shape=shape)
    mine = target(decoder.kv_cache_manager, 1, shape)
    started = time.monotonic()
    assert outcome(decoder.kv_cache_manager.pull_cache, PREFIX, mine) in (OK, TIMEOUT)
    assert time.monotonic() - started < LITTLE_S
    decoder.unlink_clusters([cluster_info(PROMPT, remote_prompt.port or 0)])
    link_to(decoder, remote_prompt)
    # A millisecond may be short for that too: over HCCL the link first makes itself another communicator.
    wait_until(lambda: outcome(decoder.kv_cache_manager.pull_cache, PREFIX, mine, size=64) == OK)
    assert slot(mine, 0, 0)[:64] == payload_slot(1, 0, 0, shape)[:64]


def random_pull(choice: random.Random, manager: KvCacheManager, remote: tuple[int, int, int, tuple[int, int]]) -> None:
    """Pull some bytes of some tensors by id into a cache of another shape, and compare every byte of it."""
    cache, seed, tensors, shape = remote
    local_shape = (choice.randint(1, 5), choice.randint(1, 3000))
    size = choice.randint(1, min(shape[1], local_shape[1]))
    count = choice.randint(1, tensors)
    first, local_first = choice.randint(0, tensors - count), choice.randint(0, tensors - count)
    index, local_index = choice.randrange(shape[0]), choice.randrange(local_shape[0])
    source, destination = choice.randint(0, shape[1] - size), choice.randint(0, local_shape[1] - size)
    mine = target(manager, tensors, local_shape)
    manager.pull_cache(
        CacheKeyByIdAndIndex(PROMPT, cache, index),
        mine,
        local_index,
        size,
        src_layer_range=range(first, first + count),
        dst_layer_range=range(local_first, local_first + count),
        src_cache_offset=source,
        dst_cache_offset=destination,
        tensor_num_per_layer=1,
    )
    for tensor in range(tensors):
        wanted = np.full(local_shape, SENTINEL, np.uint8)
        if local_first <= tensor < local_first + count:
            data = payload_slot(seed, tensor - local_first + first, index, shape)[source : source + size]
            wanted[local_index, destination : destination + size] = np.frombuffer(data, np.uint8)
        np.testing.assert_array_equal(tensor_view(mine, tensor), wanted)
    manager.deallocate_cache(mine)


def test_C195_a_thousand_random_pulls(linked: Linked) -> None:
    choice = random.Random(195)
    caches = []
    for seed in range(12):
        tensors, shape = choice.randint(1, 6), (choice.randint(1, 8), choice.randint(1, 3000))
        caches.append((linked.prompt.offer(seed=seed, tensors=tensors, shape=shape), seed, tensors, shape))
    for _ in range(1000):
        random_pull(choice, linked.manager, choice.choice(caches))


def offer_for(state: dd.State, rounds: int) -> None:
    """Bind key after key to fresh memory, filled with the key's own number; free what was pulled or is too many."""
    manager = dd.manager(state)
    described = CacheDesc(2, (1, 64 * 1024), DataType.DT_UINT8)
    held: list[tuple[CacheKey, Any]] = []
    for number in range(rounds):
        cache = manager.allocate_cache(described)
        for tensor in range(2):
            tensor_view(cache, tensor)[:] = number % 251
        manager.deallocate_cache(cache)
        key = CacheKey(PROMPT, number)
        cache = manager.allocate_cache(described, [key])
        for tensor in range(2):
            tensor_view(cache, tensor)[:] = number % 251
        held.append((key, cache))
        if len(held) > 8:
            old_key, old = held.pop(0)
            manager.deallocate_cache(old)
            manager.remove_cache_key(old_key)
        state["offered"] = number


def offered(state: dd.State) -> int:
    return int(state.get("offered", -1))


@pytest.mark.timeout(60)
def test_C196_memory_that_is_used_again(linked: Linked) -> None:
    rounds, pulls = 3000, 0
    offering = linked.prompt.member.start(offer_for, rounds)
    mine = target(linked.manager, 2, (1, 64 * 1024))
    while not offering.done():
        latest = linked.prompt.call(offered)
        for number in range(max(0, latest - 8), latest):
            code = outcome(linked.manager.pull_cache, CacheKey(PROMPT, number), mine)
            assert code in (OK, NOT_EXIST)
            if code is OK:
                pulls += 1
                assert all((tensor_view(mine, tensor) == number % 251).all() for tensor in range(2))
    offering.result()
    assert pulls > 20
