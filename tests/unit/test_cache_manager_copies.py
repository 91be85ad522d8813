"""What copies and swaps of `CacheManager` check before they ask the engine, in which order, and what they ask."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llm_datadist import Cache, CacheDesc, DataType, KvCache, LLMException
from llm_datadist.cache_manager import CacheManager
from tests.recording_manager import HOST, Check, asked, cpu_cache, desc, expect_first, make_manager, refused

KV_CACHE = KvCache(1, desc(), [], None)


@pytest.fixture
def manager() -> CacheManager:
    return make_manager()


@pytest.fixture
def plain(manager: CacheManager) -> Cache:
    return manager.allocate_cache(desc())


@pytest.fixture
def blocks(manager: CacheManager) -> Cache:
    return manager.allocate_blocks_cache(desc())


# ---- copy_cache


def test_copy_cache_asks_for_slots_and_bytes(
    manager: CacheManager, plain: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    other = manager.register_cache(desc(), [512] * 4)
    with caplog.at_level(logging.DEBUG, "llm_datadist"):
        manager.copy_cache(other, plain)
        manager.copy_cache(
            dst=plain, src=other, dst_batch_index=3, src_batch_index=4, offset=5, size=6, req_id=2**64 - 1
        )
    assert asked(manager) == [("copy_cache", (2, 1, 0, 0, 0, -1)), ("copy_cache", (1, 2, 3, 4, 5, 6))]
    assert f"req_id {2**64 - 1}" in caplog.text


COPY_CACHE_CHECKS: list[Check] = [
    (TypeError, "dst only support Cache", "dst", KV_CACHE),
    (LLMException, "dst can not be blocks cache", "dst", cpu_cache()),
    (LLMException, "Only support device cache.*dst", "dst", make_manager().allocate_cache(desc(placement=HOST))),
    (TypeError, "src only support Cache", "src", None),
    (LLMException, "src can not be blocks cache", "src", cpu_cache()),
    (LLMException, "Only support device cache.*src", "src", make_manager().allocate_cache(desc(placement=HOST))),
    (TypeError, "dst_batch_index only support int", "dst_batch_index", "1"),
    (ValueError, "dst_batch_index .*out of range", "dst_batch_index", -1),
    (ValueError, "src_batch_index .*out of range", "src_batch_index", 2**32),
    (ValueError, "offset .*out of range", "offset", -1),
    (ValueError, "size .*out of range", "size", 2**63),
    (LLMException, "size 0 is invalid", "size", 0),
    (TypeError, "req_id only support int", "req_id", "1"),
    (ValueError, "req_id .*out of range", "req_id", -1),
]


@pytest.mark.parametrize("row", range(len(COPY_CACHE_CHECKS)))
def test_the_first_failing_check_of_a_copy_counts(manager: CacheManager, plain: Cache, row: int) -> None:
    expect_first(manager.copy_cache, {"dst": plain, "src": plain}, COPY_CACHE_CHECKS, row)
    assert asked(manager) == []


# ---- copy_blocks


def test_copy_blocks_asks_for_pairs_in_order(manager: CacheManager, blocks: Cache) -> None:
    manager.copy_blocks(blocks, {4: [2, 3], 1: [], 0: [4]})
    manager.copy_blocks(blocks, {})
    assert asked(manager) == [("copy_blocks", (1, [4, 4, 0], [2, 3, 4])), ("copy_blocks", (1, [], []))]


COPY_BLOCKS_CHECKS: list[Check] = [
    (TypeError, "cache only support Cache", "cache", KV_CACHE),
    (TypeError, "copy_block_info only support dict", "copy_block_info", [1]),
    (TypeError, "dict key only support int", "copy_block_info", {"0": [1]}),
    (TypeError, "dict value only support list", "copy_block_info", {0: (1,)}),
    (TypeError, "inner type only support int", "copy_block_info", {0: ["1"]}),
    (LLMException, "should be blocks cache", "cache", make_manager().allocate_cache(desc())),
    (LLMException, "Only support device cache", "cache", cpu_cache()),
    (ValueError, "out of range", "copy_block_info", {0: [-1]}),
]


@pytest.mark.parametrize("row", range(len(COPY_BLOCKS_CHECKS)))
def test_the_first_failing_check_of_a_copy_of_blocks_counts(manager: CacheManager, blocks: Cache, row: int) -> None:
    expect_first(manager.copy_blocks, {"cache": blocks, "copy_block_info": {0: [1]}}, COPY_BLOCKS_CHECKS, row)
    assert asked(manager) == []


# ---- swap_blocks


def test_swaps_in_both_directions(manager: CacheManager, blocks: Cache) -> None:
    manager.swap_blocks(cpu_cache(), blocks, {0: 1, 2: 3})
    manager.swap_blocks(src_cache=blocks, dst_cache=cpu_cache(), src_to_dst={3: 0})
    pooled = manager.allocate_blocks_cache(desc(placement=HOST))
    registered = manager.register_blocks_cache(desc(placement=HOST), [7, 8, 9, 10])
    manager.swap_blocks(pooled, blocks, {})
    manager.swap_blocks(blocks, registered, {})
    addresses = [[512, 1024, 1536, 2048]]
    assert asked(manager) == [
        ("swap_blocks", (1, addresses, 512, [0, 2], [1, 3], True)),
        ("swap_blocks", (1, addresses, 512, [3], [0], False)),
        ("swap_blocks", (1, addresses, 512, [], [], True)),
        ("swap_blocks", (1, [[7, 8, 9, 10]], 512, [], [], False)),
    ]


SWAP_CHECKS: list[Check] = [
    (TypeError, "src_cache only support Cache", "src_cache", KV_CACHE),
    (TypeError, "dst_cache only support Cache", "dst_cache", 1),
    (TypeError, "src_to_dst only support dict", "src_to_dst", [(0, 1)]),
    (TypeError, "src_to_dst inner type only support int", "src_to_dst", {"0": 1}),
    (LLMException, "src_cache should be blocks cache", "src_cache", make_manager().allocate_cache(desc())),
    (LLMException, "dst_cache should be blocks cache", "dst_cache", make_manager().allocate_cache(desc())),
    (LLMException, "block sizes .* must be equal", "src_cache", cpu_cache(2, (4, 128))),
    (LLMException, "num_tensors .* must be equal", "src_cache", cpu_cache(2)),
    (TypeError, "dict value only support int", "src_to_dst", {0: "1"}),
    (LLMException, r"must be in \[0, 4\)", "src_to_dst", {0: 4}),
    (LLMException, "is not support", "dst_cache", cpu_cache()),
]


@pytest.mark.parametrize("row", range(len(SWAP_CHECKS)))
def test_the_first_failing_check_of_a_swap_counts(manager: CacheManager, blocks: Cache, row: int) -> None:
    good = {"src_cache": cpu_cache(), "dst_cache": blocks, "src_to_dst": {0: 1}}
    expect_first(manager.swap_blocks, good, SWAP_CHECKS, row)
    assert asked(manager) == []


@pytest.mark.parametrize("wrong", ["src_cache", "dst_cache", "src_to_dst"])
def test_none_is_two_kinds_of_error(manager: CacheManager, blocks: Cache, wrong: str) -> None:
    arguments: dict[str, Any] = {"src_cache": blocks, "dst_cache": cpu_cache(), "src_to_dst": {}, wrong: None}
    with pytest.raises(AttributeError) as caught:
        manager.swap_blocks(**arguments)
    assert isinstance(caught.value, TypeError)


def test_caches_without_addresses(manager: CacheManager, blocks: Cache) -> None:
    host = manager.allocate_blocks_cache(desc(placement=HOST))
    manager.deallocate_blocks_cache(host)
    refused("equally many", manager.swap_blocks, host, blocks, {})
    manager.deallocate_blocks_cache(blocks)
    refused("was deallocated", manager.swap_blocks, cpu_cache(), blocks, {})


def test_a_block_is_an_index_of_the_batch_dimension(manager: CacheManager) -> None:
    device = manager.allocate_blocks_cache(CacheDesc(4, (256, 4), DataType.DT_FLOAT16, batch_dim_index=1))
    manager.swap_blocks(device, cpu_cache(), {3: 0})
    assert asked(manager)[0][1][2] == 512
