"""Pulls in cache-manager mode: memory that its program has registered, in two processes, over every way to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LLMStatusCode,
    Placement,
)
from llm_datadist.introspection import describe_links
from llm_datadist.views import tensor_view
from tests.conformance import registering
from tests.conformance.conftest import Registering
from tests.conformance.expectations import INVALID_ID, NOT_EXIST, NOT_LINKED, OK, invalid, outcome, refused, wait_until
from tests.conformance.registering import Registered, State, There
from tests.conformance.remote import DECODER, PROMPT, SHAPE, payload_slot
from tests.datadist_member import MIB, payload

TIMEOUT = LLMStatusCode.LLM_TIMEOUT
KEY = CacheKey(PROMPT, 7)
BLOCKS_KEY = BlocksCacheKey(PROMPT)

Link = Callable[..., Registering]


def by_id(there: There, slot: int = 0) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(PROMPT, there.cache_id, slot)


def assert_only(mine: Registered, arrived: dict[int, bytes], tensor: int) -> None:
    """Expect these slots of a tensor, and sentinels in the others."""
    assert {index: mine.slot(tensor, index) for index in arrived} == arrived
    assert mine.untouched(tensor, *(index for index in range(len(mine.tensors[tensor])) if index not in arrived))


def allocate_there(state: State, shape: tuple[int, int], keys: list[CacheKey]) -> int:
    """Allocate in the pool, filled with the payload of seed 1."""
    desc = CacheDesc(4, shape, DataType.DT_UINT8)
    cache = state["datadist"].cache_manager.allocate_cache(desc, keys)
    there = Registered(cache, [tensor_view(cache, tensor) for tensor in range(4)])
    for tensor, array in enumerate(there.tensors):
        array[:] = payload(1, tensor, array.size).reshape(shape)
    state["registered"][cache.cache_id] = there
    return cache.cache_id


# ---- pull_cache


def test_C239_a_pull_by_id(link_registering: Link) -> None:
    linked = link_registering()
    there, mine = linked.peer.register(seed=1), linked.register()
    for slot in (1, 3):
        linked.manager.pull_cache(by_id(there, slot), mine.cache, 2)
        for tensor in range(4):
            assert_only(mine, {2: payload_slot(1, tensor, slot)}, tensor)


def test_C239_a_pull_by_key_does_not_release_it(link_registering: Link) -> None:
    linked = link_registering()
    prefix = CacheKey(PROMPT, INVALID_ID, 0, 5)
    linked.peer.register(seed=1, keys=[CacheKey(PROMPT, INVALID_ID), KEY, prefix])
    mine = linked.register()
    for _ in range(3):
        linked.manager.pull_cache(KEY, mine.cache, 0)
        linked.manager.pull_cache(prefix, mine.cache, batch_index=3)
    for tensor in range(4):
        assert_only(mine, {0: payload_slot(1, tensor, 1), 3: payload_slot(1, tensor, 2)}, tensor)


def test_C239_registered_after_linking_and_unregistered(link_registering: Link) -> None:
    """Caches that are registered after linking are seen at once."""
    linked = link_registering()
    mine = linked.register()
    refused(NOT_EXIST, linked.manager.pull_cache, KEY, mine.cache)
    there = linked.peer.register(seed=1, keys=[KEY])
    linked.manager.pull_cache(KEY, mine.cache)
    assert linked.peer.outcome("unregister_cache", there.cache_id) is OK
    refused(NOT_EXIST, linked.manager.pull_cache, KEY, mine.cache)
    refused(NOT_EXIST, linked.manager.pull_cache, by_id(there), mine.cache)
    linked.manager.unregister_cache(mine.cache.cache_id)
    refused(NOT_EXIST, linked.manager.pull_cache, KEY, mine.cache)


def test_C239_pulls_in_the_other_direction(link_registering: Link) -> None:
    """Either side pulls, in every role."""
    linked = link_registering()
    mine = linked.register(seed=2, keys=[CacheKey(DECODER, 9)])
    there = linked.peer.register()
    assert linked.peer.outcome("pull_cache", CacheKey(DECODER, 9), there, 1) is OK
    assert linked.peer.slot(there, 3, 1) == payload_slot(2, 3, 0) == mine.slot(3, 0)
    assert linked.peer.untouched(there, 3, 0, 2, 3)


def test_C239_a_block_by_its_number(link_registering: Link) -> None:
    """By the id of a blocks cache a slot is one of its blocks."""
    linked = link_registering()
    there, mine = linked.peer.register(seed=1, blocks=True), linked.register()
    linked.manager.pull_cache(by_id(there, 2), mine.cache, 1)
    for tensor in range(4):
        assert_only(mine, {1: payload_slot(1, tensor, 2)}, tensor)


def test_C239_size_and_layers(link_registering: Link) -> None:
    """Offsets are ignored in this mode."""
    linked = link_registering()
    there, mine = linked.peer.register(seed=1), linked.register()
    ignored: Any = {"src_cache_offset": 16, "dst_cache_offset": "x", "unknown": 1}
    linked.manager.pull_cache(by_id(there), mine.cache, 1, 64, **ignored)
    for tensor in range(4):
        assert mine.slot(tensor, 1)[:64] == payload_slot(1, tensor, 0)[:64]
        assert (mine.tensors[tensor][1, 64:] == mine.tensors[tensor][0, 64:]).all()
    other = linked.register()
    linked.manager.pull_cache(by_id(there), other.cache, src_layer_range=range(1), dst_layer_range=range(1, 2))
    linked.manager.pull_cache(
        by_id(there),
        other.cache,
        src_layer_range=range(3, 4),
        dst_layer_range=range(1),
        tensor_num_per_layer=1,
    )
    assert [other.slot(tensor, 0) for tensor in (0, 2, 3)] == [payload_slot(1, tensor, 0) for tensor in (3, 0, 1)]
    assert other.untouched(1)


def test_C241_with_remote_access_by_id_only(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, mine = linked.peer.register(seed=1, keys=[KEY]), linked.register()
    for key in (KEY, CacheKey(DECODER, INVALID_ID), BLOCKS_KEY):
        with pytest.raises(TypeError):
            linked.manager.pull_cache(key, mine.cache)  # type: ignore[arg-type]
    linked.manager.pull_cache(by_id(there, 1), mine.cache)
    assert_only(mine, {0: payload_slot(1, 2, 1)}, 2)


def test_C241_what_is_not_accessible(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    hidden, host = linked.peer.register(accessible=False), linked.peer.register(placement=Placement.HOST)
    shown = linked.peer.register(seed=1, placement=Placement.HOST, accessible=True)
    mine = linked.register()
    for there in (hidden, host):
        refused(NOT_EXIST, linked.manager.pull_cache, by_id(there), mine.cache)
    linked.manager.pull_cache(by_id(shown), mine.cache)
    assert_only(mine, {0: payload_slot(1, 1, 0)}, 1)


@pytest.mark.parametrize("remote_access", [False, True])
def test_C241_arguments(link_registering: Link, remote_access: bool) -> None:
    linked = link_registering(remote_access=remote_access)
    there, mine, blocks = linked.peer.register(seed=1), linked.register(), linked.register(blocks=True)
    pull = linked.manager.pull_cache
    invalid(pull, CacheKeyByIdAndIndex(DECODER, there.cache_id), mine.cache)  # its own cluster
    invalid(pull, by_id(there), blocks.cache, match="can not be blocks cache")
    for size in (0, -2):
        invalid(pull, by_id(there), mine.cache, 0, size)
    invalid(pull, by_id(there), mine.cache, SHAPE[0])
    for wrong in ((1, mine.cache), (by_id(there), KvCache(1, mine.cache.cache_desc, [], None)), (None, mine.cache)):
        with pytest.raises(TypeError):
            pull(*wrong)
    for batch_index, size in ((-1, -1), (2**32, -1), (0, 2**63)):
        with pytest.raises(ValueError, match="out of range"):
            pull(by_id(there), mine.cache, batch_index, size)
    refused(NOT_EXIST, pull, by_id(there, SHAPE[0]), mine.cache)
    refused(NOT_EXIST, pull, CacheKeyByIdAndIndex(PROMPT, 99), mine.cache)
    refused(NOT_LINKED, pull, CacheKeyByIdAndIndex(5, there.cache_id), mine.cache)
    assert all(mine.untouched(tensor) for tensor in range(4))


def test_C241_a_timeout_leaves_the_link_usable(link_registering: Link) -> None:
    linked = link_registering(sync_kv_timeout=5, device_pool=8 * MIB)
    times, shape = 512, (1, 4 * MIB)  # more than any memory moves in the time
    there = There(linked.peer.call(registering.register_one_tensor_many_times, times, shape))
    one = linked.register(1, shape)
    mine = linked.manager.register_cache(CacheDesc(times, shape, DataType.DT_UINT8), one.cache.tensor_addrs * times)
    refused(TIMEOUT, linked.manager.pull_cache, by_id(there), mine)
    small, target = linked.peer.register(seed=1), linked.register()
    wait_until(lambda: outcome(linked.manager.pull_cache, by_id(small), target.cache) is OK)
    assert target.slot(3, 0) == payload_slot(1, 3, 0)


# ---- pull_blocks


def test_C242_blocks_into_blocks(link_registering: Link) -> None:
    linked = link_registering()
    linked.peer.register(seed=1, blocks_key=BLOCKS_KEY)
    for sequence in (list, tuple):
        mine = linked.register(blocks=True)
        linked.manager.pull_blocks(BLOCKS_KEY, mine.cache, sequence((0, 3, 0)), sequence((2, 1, 3)))
        for tensor in range(4):
            wanted = {target: payload_slot(1, tensor, source) for source, target in ((0, 2), (3, 1), (0, 3))}
            assert_only(mine, wanted, tensor)


WIDE = (2, 3 * SHAPE[1])


def cut(slot: int, tensor: int, pieces: list[int]) -> dict[int, bytes]:
    """A slot of a cache of the shape WIDE, cut: piece i is in the i-th of the given blocks."""
    whole = payload_slot(1, tensor, slot, WIDE)
    return {block: whole[SHAPE[1] * index : SHAPE[1] * (index + 1)] for index, block in enumerate(pieces)}


@pytest.mark.parametrize("remote_access", [False, True])
def test_C242_a_slot_is_cut_into_blocks(link_registering: Link, remote_access: bool) -> None:
    linked = link_registering(remote_access=remote_access)
    there = linked.peer.register(4, WIDE, seed=1, keys=[CacheKey(PROMPT, INVALID_ID), KEY])
    for key, slot, pieces in ((KEY, 1, [3, 0, 1]), (KEY, 1, [2]), (by_id(there), 0, [1, 2])):
        mine = linked.register(blocks=True)
        linked.manager.pull_blocks(key, mine.cache, dst_blocks=pieces)
        for tensor in range(4):
            assert_only(mine, cut(slot, tensor, pieces), tensor)


def test_C242_the_key_of_an_allocated_cache_is_released(link_registering: Link) -> None:
    linked = link_registering()
    linked.peer.call(allocate_there, WIDE, [KEY])
    mine = linked.register(blocks=True)
    invalid(linked.manager.pull_blocks, KEY, mine.cache, [], [0, 1, 2, 3])  # more than the slot has
    linked.manager.pull_blocks(KEY, mine.cache, (), (0, 1, 2))
    for tensor in range(4):
        assert_only(mine, cut(0, tensor, [0, 1, 2]), tensor)
    refused(NOT_EXIST, linked.manager.pull_blocks, KEY, mine.cache, [], [0, 1, 2])


def test_C242_arguments(link_registering: Link) -> None:
    linked = link_registering()
    there = linked.peer.register(seed=1, blocks_key=BLOCKS_KEY)
    mine, plain = linked.register(blocks=True), linked.register()
    pull = linked.manager.pull_blocks
    for key in (KEY, by_id(there)):
        invalid(pull, key, mine.cache, [0], [0], match="src_blocks")
        invalid(pull, key, mine.cache, [], [], match="can not be empty")
    invalid(pull, BLOCKS_KEY, plain.cache, [0], [0], match="should be blocks cache")
    invalid(pull, BLOCKS_KEY, mine.cache, [], [0], match="can not be empty")
    invalid(pull, BLOCKS_KEY, mine.cache, [0], [], match="can not be empty")
    invalid(pull, BLOCKS_KEY, mine.cache, [0, 1], [0], match="size should be same")
    invalid(pull, BLOCKS_KEY, mine.cache, [0], [SHAPE[0]])
    invalid(pull, BLOCKS_KEY, mine.cache, [SHAPE[0]], [0])
    invalid(pull, BlocksCacheKey(DECODER), mine.cache, [0], [0])
    refused(NOT_EXIST, pull, BlocksCacheKey(PROMPT, 1), mine.cache, [0], [0])
    refused(NOT_LINKED, pull, BlocksCacheKey(5), mine.cache, [0], [0])
    for wrong in ((BLOCKS_KEY, mine.cache, {0}, [0]), (BLOCKS_KEY, mine.cache, ["0"], [0]), (1, mine.cache, [0], [0])):
        with pytest.raises(TypeError):
            pull(*wrong)
    with pytest.raises(ValueError, match="-1"):
        pull(BLOCKS_KEY, mine.cache, [0, 1], [0, -1])
    assert all(mine.untouched(tensor) for tensor in range(4))


def test_C242_layers_of_blocks(link_registering: Link) -> None:
    linked = link_registering()
    linked.peer.register(seed=1, blocks_key=BLOCKS_KEY)
    mine = linked.register(blocks=True)
    linked.manager.pull_blocks(
        BLOCKS_KEY,
        mine.cache,
        [3],
        [0],
        src_layer_range=range(1, 3),
        dst_layer_range=range(2, 4),
        tensor_num_per_layer=1,
    )
    assert_only(mine, {0: payload_slot(1, 1, 3)}, 2)
    assert_only(mine, {0: payload_slot(1, 2, 3)}, 3)
    assert mine.untouched(0)
    assert mine.untouched(1)


def test_C242_random_tables_of_blocks(link_registering: Link) -> None:
    """Block sizes, numbers of blocks and layers of every kind; neighbours are as likely as blocks far apart."""
    linked, choice = link_registering(remote_access=True, device_pool=64 * MIB), random.Random(242)
    for model_id in range(40):
        blocks, nbytes, tensors = (
            choice.randint(1, 80),
            choice.choice([1, 7, 64, 511, 4096, 4097]),
            choice.randint(1, 6),
        )
        key, shape = BlocksCacheKey(PROMPT, model_id), (blocks, nbytes)
        there = linked.peer.register(tensors, shape, seed=1, blocks_key=key)
        mine = linked.register(tensors, (blocks + choice.randint(0, 9), nbytes), blocks=True)
        expected = [array.copy() for array in mine.tensors]
        sent = [payload(1, tensor, blocks * nbytes).reshape(shape) for tensor in range(tensors)]
        for _ in range(3):
            count = choice.randint(1, blocks)
            source = sorted(choice.choices(range(blocks), k=count)) if choice.random() < 0.5 else list(range(count))
            target = choice.sample(range(len(expected[0])), count)
            if choice.random() < 0.5:
                target.sort()
            layers = choice.randint(1, tensors)
            src_first, dst_first = choice.randint(0, tensors - layers), choice.randint(0, tensors - layers)
            linked.manager.pull_blocks(
                key,
                mine.cache,
                source,
                target,
                src_layer_range=range(src_first, src_first + layers),
                dst_layer_range=range(dst_first, dst_first + layers),
                tensor_num_per_layer=1,
            )
            for layer in range(layers):
                expected[dst_first + layer][target] = sent[src_first + layer][source]
        assert all(np.array_equal(array, wanted) for array, wanted in zip(mine.tensors, expected))
        linked.manager.unregister_cache(mine.cache.cache_id)
        assert linked.peer.outcome("unregister_cache", there.cache_id) is OK


def test_C242_the_way_is_in_the_description_of_the_link(link_registering: Link) -> None:
    linked = link_registering()
    (link,) = describe_links(linked.datadist)
    if linked.memory.private is not None:
        assert link.private_memory == linked.memory.private
    assert link.transport == linked.memory.link
    assert link.reason
