"""Pushes in cache-manager mode: into memory that the program of another process has registered, over every way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LLMStatusCode,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests.conformance.conftest import Registering
from tests.conformance.expectations import INVALID, NOT_EXIST, NOT_LINKED, OK, invalid, refused
from tests.conformance.registering import RegisteringRemote, State, There
from tests.conformance.remote import DECODER, PROMPT, SHAPE, SLOTS, payload_slot
from tests.conformance.test_transfer import ENOUGH_MS, Computing, Ready

TIMEOUT = LLMStatusCode.LLM_TIMEOUT
BLOCKS_KEY = BlocksCacheKey(PROMPT)
ALL = range(SLOTS)

Link = Callable[..., Registering]


def by_id(there: There, slot: int = 0) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(PROMPT, there.cache_id, slot)


def assert_only(peer: RegisteringRemote, there: There, arrived: dict[int, bytes], tensor: int) -> None:
    """Expect these slots of a tensor of the peer, and sentinels in the others."""
    assert {index: peer.slot(there, tensor, index) for index in arrived} == arrived
    others = [index for index in ALL if index not in arrived]
    assert not others or peer.untouched(there, tensor, *others)


# ---- push_cache, push_blocks


def test_C243_push_cache(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, mine = linked.peer.register(), linked.register(seed=1)
    linked.manager.push_cache(by_id(there, 3), mine.cache, 1)
    for tensor in range(4):
        assert_only(linked.peer, there, {3: payload_slot(1, tensor, 1)}, tensor)


def test_C243_push_blocks(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, mine = linked.peer.register(blocks_key=BLOCKS_KEY), linked.register(seed=1, blocks=True)
    linked.manager.push_blocks(BLOCKS_KEY, mine.cache, [3, 0], (1, 2))
    for tensor in range(4):
        wanted = {1: payload_slot(1, tensor, 3), 2: payload_slot(1, tensor, 0)}
        assert_only(linked.peer, there, wanted, tensor)


def test_C243_pushes_of_layers(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, mine = linked.peer.register(), linked.register(seed=1)
    blocks, my_blocks = linked.peer.register(blocks_key=BLOCKS_KEY), linked.register(seed=1, blocks=True)
    linked.manager.push_cache(by_id(there), mine.cache, src_layer_range=range(1), dst_layer_range=range(1, 2))
    linked.manager.push_blocks(BLOCKS_KEY, my_blocks.cache, [2], [0], range(2, 4), range(1, 3), tensor_num_per_layer=1)
    for tensor, wanted in enumerate(({}, {}, {0: payload_slot(1, 0, 0)}, {0: payload_slot(1, 1, 0)})):
        assert_only(linked.peer, there, wanted, tensor)
    for tensor, wanted in enumerate(({}, {0: payload_slot(1, 2, 2)}, {0: payload_slot(1, 3, 2)}, {})):
        assert_only(linked.peer, blocks, wanted, tensor)


def test_C243_pushes_in_the_other_direction(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    mine, theirs = linked.register(), linked.peer.register(seed=3)
    key = CacheKeyByIdAndIndex(DECODER, mine.cache.cache_id, 2)
    assert linked.peer.outcome("push_cache", key, theirs, 1) is OK
    assert [mine.slot(tensor, 2) for tensor in range(4)] == [payload_slot(3, tensor, 1) for tensor in range(4)]
    assert all(mine.untouched(tensor, 0, 1, 3) for tensor in range(4))


@pytest.mark.parametrize("placements", [(0, 0), (0, 1), (1, 0)])
def test_C243_any_placement(link_registering: Link, placements: tuple[int, int]) -> None:
    linked = link_registering(remote_access=True, host_pool=1 << 20)
    source, target = map(Placement, placements)
    there = linked.peer.register(placement=target, accessible=True)
    linked.manager.push_cache(by_id(there), linked.register(seed=1, placement=source).cache)
    assert_only(linked.peer, there, {0: payload_slot(1, 3, 0)}, 3)


def test_C243_without_remote_access(link_registering: Link) -> None:
    linked = link_registering()
    mine, blocks = linked.register(), linked.register(blocks=True)
    there = linked.peer.register(blocks_key=BLOCKS_KEY)
    invalid(linked.manager.push_cache, by_id(there), mine.cache)
    invalid(linked.manager.push_blocks, BLOCKS_KEY, blocks.cache, [0], [0])
    invalid(linked.manager.push_cache, None, None)  # before the arguments
    invalid(linked.manager.push_blocks, None, None)


def test_C243_arguments(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, theirs = linked.peer.register(10), linked.peer.register(10, blocks_key=BLOCKS_KEY)
    mine, blocks = linked.register(10, seed=1), linked.register(10, seed=1, blocks=True)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (linked.manager.push_cache, (by_id(there), mine.cache)),
        (linked.manager.push_blocks, (BLOCKS_KEY, blocks.cache, [0], [0])),
    ]
    for push, arguments in calls:
        for number, error in ((-1, ValueError), (2**32, ValueError), (2.0, TypeError), ("x", TypeError)):
            with pytest.raises(error):
                push(*arguments, tensor_num_per_layer=number)
        for number in (0, 3):
            invalid(push, *arguments, tensor_num_per_layer=number)
        invalid(push, *arguments, src_layer_range=range(2))  # and all five of the destination
        invalid(push, *arguments, src_layer_range=range(4, 6), dst_layer_range=range(2))
        invalid(push, *arguments, src_layer_range=range(2), dst_layer_range=range(4, 6))
        for layers in (range(0), range(0, 4, 2), range(-1, 1)):
            invalid(push, *arguments, src_layer_range=layers, dst_layer_range=range(1))
        with pytest.raises(TypeError):
            push(*arguments, src_layer_range=[0, 1])
        for key in (None, 1, CacheKey(PROMPT, 1)):
            with pytest.raises(TypeError):
                push(key, *arguments[1:])
    push_cache, push_blocks = linked.manager.push_cache, linked.manager.push_blocks
    for size in (5, 0, SHAPE[1]):
        invalid(push_cache, by_id(there), mine.cache, size=size)
    with pytest.raises(ValueError, match="out of range"):
        push_cache(by_id(there), mine.cache, size=2**63)
    with pytest.raises(ValueError, match="out of range"):
        push_cache(by_id(there), mine.cache, -1)
    invalid(push_cache, by_id(there), blocks.cache, match="can not be blocks cache")
    invalid(push_blocks, BLOCKS_KEY, mine.cache, [0], [0], match="should be blocks cache")
    invalid(push_blocks, BLOCKS_KEY, blocks.cache, [0], [], match="can not be empty")
    invalid(push_blocks, BLOCKS_KEY, blocks.cache, [0, 1], [0], match="size should be same")
    invalid(push_blocks, BLOCKS_KEY, blocks.cache, [0], [SLOTS])
    invalid(push_blocks, BLOCKS_KEY, blocks.cache, [SLOTS], [0])
    invalid(push_cache, by_id(there), mine.cache, SLOTS)
    refused(NOT_EXIST, push_blocks, BlocksCacheKey(PROMPT, 5), blocks.cache, [0], [0])
    refused(NOT_EXIST, push_cache, CacheKeyByIdAndIndex(PROMPT, 99), mine.cache)
    refused(NOT_LINKED, push_cache, CacheKeyByIdAndIndex(5, there.cache_id), mine.cache)
    assert all(linked.peer.untouched(cache, tensor) for cache in (there, theirs) for tensor in range(10))


# ---- layer by layer


def test_C245_layers_go_where_the_destination_says(link_registering: Link) -> None:
    # two tensors a layer: layers 4 and 5 are tensors 8 to 11
    linked = link_registering(remote_access=True)
    there, theirs = linked.peer.register(12), linked.peer.register(12, blocks_key=BLOCKS_KEY)
    mine, blocks = linked.register(8, seed=1), linked.register(8, seed=1, blocks=True)
    transfer = linked.manager.transfer_cache_async
    task = transfer(
        mine.cache, Ready(), [TransferWithCacheKeyConfig(by_id(there, 3), range(2), range(4, 6), src_batch_index=1)]
    )
    assert task.synchronize(ENOUGH_MS) is OK
    config = TransferWithCacheKeyConfig(BLOCKS_KEY, range(1, 3), range(4, 6))
    task = transfer(blocks.cache, Ready(), [config], [0, 3], [2, 1])
    assert task.get_results(ENOUGH_MS) == [OK]
    for tensor in range(12):
        wanted = {3: payload_slot(1, tensor - 8, 1)} if tensor >= 8 else {}
        assert_only(linked.peer, there, wanted, tensor)
        source = tensor - 6
        wanted = {2: payload_slot(1, source, 0), 1: payload_slot(1, source, 3)} if tensor >= 8 else {}
        assert_only(linked.peer, theirs, wanted, tensor)


def test_C245_a_slot_is_cut_into_blocks(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    theirs = linked.peer.register(4, blocks_key=BLOCKS_KEY)
    wide = (2, 3 * SHAPE[1])
    mine = linked.register(4, wide, seed=1)
    config = TransferWithCacheKeyConfig(BLOCKS_KEY, range(2), range(2))
    transfer = linked.manager.transfer_cache_async
    for size in (None, 0):
        invalid(transfer, mine.cache, Ready(), [config], None, [3, 0, 1], size, match="must be set")
    task = transfer(mine.cache, Ready(), [config], None, [3, 0, 1], SHAPE[1])
    assert task.synchronize(ENOUGH_MS) is OK
    for tensor in range(4):
        whole = payload_slot(1, tensor, 0, wide)
        wanted = {block: whole[SHAPE[1] * index : SHAPE[1] * (index + 1)] for index, block in enumerate((3, 0, 1))}
        assert_only(linked.peer, theirs, wanted, tensor)


def test_C245_a_running_task(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    there, mine, go_on = linked.peer.register(), linked.register(seed=1), threading.Event()
    configs = [TransferWithCacheKeyConfig(by_id(there), range(2), range(2))]
    task = linked.manager.transfer_cache_async(mine.cache, Computing(lambda layer: go_on.wait(20)), configs)
    assert task.synchronize(0) is TIMEOUT
    assert task.get_results(0) == [TIMEOUT]
    go_on.set()
    assert task.synchronize(ENOUGH_MS) is OK
    assert_only(linked.peer, there, {0: payload_slot(1, 3, 0)}, 3)


def addresses_of(state: State, cache_id: int) -> list[int]:
    return list(state["registered"][cache_id].cache.tensor_addrs)


def test_C245_to_addresses_without_remote_access(link_registering: Link) -> None:
    linked = link_registering()
    there, mine = linked.peer.register(), linked.register(seed=1)
    at = [address + 2 * SHAPE[1] for address in linked.peer.call(addresses_of, there.cache_id)]
    config = TransferConfig(PROMPT, at, src_batch_index=1)
    task = linked.manager.transfer_cache_async(mine.cache, Ready(), [config])
    assert task.synchronize(ENOUGH_MS) is OK
    for tensor in range(4):
        assert_only(linked.peer, there, {2: payload_slot(1, tensor, 1)}, tensor)
    beyond = TransferConfig(PROMPT, [address + SLOTS * SHAPE[1] for address in at])
    assert linked.manager.transfer_cache_async(mine.cache, Ready(), [beyond]).get_results(ENOUGH_MS) == [INVALID]


@pytest.mark.parametrize("remote_access", [False, True])
def test_C245_arguments(link_registering: Link, remote_access: bool) -> None:
    linked = link_registering(remote_access=remote_access)
    there, mine = linked.peer.register(), linked.register()
    host = linked.register(placement=Placement.HOST)
    by_address = TransferConfig(PROMPT, linked.peer.call(addresses_of, there.cache_id))
    by_key = TransferWithCacheKeyConfig(by_id(there), range(2), range(2))
    good, wrong = (by_key, by_address) if remote_access else (by_address, by_key)
    transfer = linked.manager.transfer_cache_async
    with pytest.raises(TypeError):
        transfer(mine.cache, Ready(), [wrong])
    with pytest.raises(TypeError):
        transfer(None, Ready(), [good])  # type: ignore[arg-type]
    invalid(transfer, host.cache, Ready(), [good])
    invalid(transfer, mine.cache, Ready(), [good], [0], None, match="transfer from blocks to cache is not supported")
    assert transfer(mine.cache, Ready(), [good]).synchronize(ENOUGH_MS) is OK


def test_C245_the_destination_is_not_there(link_registering: Link) -> None:
    linked = link_registering(remote_access=True)
    mine = linked.register()
    for key, code in (
        (CacheKeyByIdAndIndex(PROMPT, 99), NOT_EXIST),
        (CacheKeyByIdAndIndex(5, 1), NOT_LINKED),
    ):
        config = TransferWithCacheKeyConfig(key, range(2), range(2))
        assert linked.manager.transfer_cache_async(mine.cache, Ready(), [config]).get_results(ENOUGH_MS) == [code]
