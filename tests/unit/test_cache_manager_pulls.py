"""What `CacheManager` checks before it pulls or pushes, in which order, and what it asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, Cache, CacheKey, CacheKeyByIdAndIndex, KvCache, LLMException
from llm_datadist.cache_manager import CacheManager
from llm_datadist.engine.keys import KeyKind
from tests.recording_manager import (
    HOST,
    INVALID_ID,
    OWN_CLUSTER,
    Check,
    asked,
    cpu_cache,
    desc,
    expect_first,
    make_manager,
    refused,
)

KV_CACHE = KvCache(1, desc(), [], None)


@pytest.fixture
def manager() -> CacheManager:
    return make_manager()


@pytest.fixture
def pusher() -> CacheManager:
    return make_manager(remote_access=True)


# ---- pull_cache


def test_a_plain_pull(manager: CacheManager) -> None:
    cache, on_host = manager.allocate_cache(desc()), manager.allocate_cache(desc(placement=HOST))
    manager.pull_cache(CacheKey(7, 10, 3), cache)
    manager.pull_cache(CacheKey(prompt_cluster_id=7, req_id=INVALID_ID, model_id=3, prefix_id=11), on_host, 2, 64)
    manager.pull_cache(CacheKeyByIdAndIndex(8, 5, 1), cache, batch_index=True, size=-1)
    assert asked(manager) == [
        ("pull_cache", (7, (KeyKind.ORDINARY, 10, 3), 1, 0, -1, None, None, 0, 0, True)),
        ("pull_cache", (7, (KeyKind.PREFIX, 11, 3), 2, 2, 64, None, None, 0, 0, True)),
        ("pull_cache", (8, (KeyKind.CACHE, 5, 1), 1, True, -1, None, None, 0, 0, True)),
    ]


def test_keywords_of_a_pull(manager: CacheManager) -> None:
    cache = manager.allocate_cache(desc())
    for keywords in (
        {"src_cache_offset": "x", "dst_cache_offset": -1, "unknown": 1},
        {"src_layer_range": range(1), "dst_layer_range": range(1, 2)},
        {"dst_layer_range": range(3), "tensor_num_per_layer": 1},
    ):
        manager.pull_cache(CacheKey(7, 10), cache, **keywords)
        manager.pull_cache(CacheKey(7, 10), cache, True, **keywords)
    ranges = [args[5:7] for _, args in asked(manager)]
    assert ranges == [each for each in [(None, None), ((0, 2), (2, 2)), (None, (0, 3))] for _ in range(2)]
    assert {args[7:] for _, args in asked(manager)} == {(0, 0, True)}, "offsets are ignored"


PULL_CACHE_CHECKS: list[Check] = [
    (TypeError, "cache_key only support", "cache_key", BlocksCacheKey(0)),
    (TypeError, "cache only support Cache", "cache", KV_CACHE),
    (TypeError, "batch_index only support", "batch_index", "0"),
    (ValueError, "batch_index .*out of range", "batch_index", -1),
    (TypeError, "size only support", "size", "1"),
    (ValueError, "size .*out of range", "size", 2**63),
    (LLMException, "can not be blocks cache", "cache", cpu_cache()),
    (LLMException, "size 0 is invalid", "size", 0),
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", "2"),
    (ValueError, "tensor_num_per_layer .*out of range", "tensor_num_per_layer", -1),
    (LLMException, r"is invalid, should \[1,", "tensor_num_per_layer", 0),
    (LLMException, "one of req id and prefix id", "cache_key", CacheKey(0, INVALID_ID)),
    (TypeError, "src_layer_range only support", "src_layer_range", [0, 1]),
    (TypeError, "dst_layer_range only support", "dst_layer_range", (0, 1)),
    (LLMException, "step must be 1", "src_layer_range", range(0, 4, 2)),
    (LLMException, "start value", "src_layer_range", range(-1, 1)),
    (ValueError, "out of range", "dst_layer_range", range(2**33, 2**33 + 1)),
    (LLMException, "is the own one", "cache_key", CacheKey(OWN_CLUSTER, 1)),
]


@pytest.mark.parametrize("row", range(len(PULL_CACHE_CHECKS)))
def test_the_first_failing_check_of_a_pull_counts(manager: CacheManager, row: int) -> None:
    good = {"cache_key": CacheKey(0, 1), "cache": manager.allocate_cache(desc())}
    expect_first(manager.pull_cache, good, PULL_CACHE_CHECKS, row)
    assert asked(manager) == []


def test_with_remote_access_slots_are_pulled_by_id_only(pusher: CacheManager) -> None:
    cache = pusher.allocate_cache(desc())
    for key in (CacheKey(0, 1), CacheKey(OWN_CLUSTER, INVALID_ID), BlocksCacheKey(0)):
        with pytest.raises(TypeError, match="cache_key only support CacheKeyByIdAndIndex"):
            pusher.pull_cache(key, cache)  # type: ignore[arg-type]
    pusher.pull_cache(CacheKeyByIdAndIndex(0, 1), cache)
    refused("is the own one", pusher.pull_cache, CacheKeyByIdAndIndex(OWN_CLUSTER, 1), cache)
    assert len(asked(pusher)) == 1


def test_a_layer_must_divide_the_tensors_when_a_range_is_given(manager: CacheManager) -> None:
    plain, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    keywords: Any = {"src_layer_range": range(1), "tensor_num_per_layer": 3}
    refused(r"is invalid, should \[1, 4\]", manager.pull_cache, CacheKey(0, 1), plain, **keywords)
    refused(r"is invalid, should \[1, 4\]", manager.pull_blocks, BlocksCacheKey(0), blocks, [0], [0], **keywords)
    manager.pull_cache(CacheKey(0, 1), plain, tensor_num_per_layer=3)


# ---- pull_blocks


def test_pulls_of_blocks(manager: CacheManager) -> None:
    cache = manager.allocate_blocks_cache(desc())
    source, target = [0, True], [2, 3]
    manager.pull_blocks(BlocksCacheKey(7, 3), cache, source, target)
    manager.pull_blocks(
        src_cache_key=BlocksCacheKey(prompt_cluster_id=7), dst_cache=cache, src_blocks=(5,), dst_blocks=(6,)
    )
    manager.pull_blocks(BlocksCacheKey(7), cache, [0], [1], token=b"t", src_layer_range=range(1))
    assert asked(manager) == [
        ("pull_blocks", (7, (KeyKind.BLOCKS, 0, 3), 1, source, target, None, None, None)),
        ("pull_blocks", (7, (KeyKind.BLOCKS, 0, 0), 1, (5,), (6,), None, None, None)),
        ("pull_blocks", (7, (KeyKind.BLOCKS, 0, 0), 1, [0], [1], (0, 2), None, b"t")),
    ]


def test_a_slot_is_cut_into_blocks(manager: CacheManager) -> None:
    cache = manager.allocate_blocks_cache(desc(placement=HOST))
    manager.pull_blocks(CacheKey(7, 10, 3), cache, dst_blocks=[2, 3])
    manager.pull_blocks(
        CacheKey(7, INVALID_ID, 3, 4), cache, [], (1,), tensor_num_per_layer=1, src_layer_range=range(2)
    )
    manager.pull_blocks(CacheKeyByIdAndIndex(7, 5, 1), cache, (), [0])
    assert asked(manager) == [
        ("pull_blocks", (7, (KeyKind.ORDINARY, 10, 3), 1, None, [2, 3], None, None, None)),
        ("pull_blocks", (7, (KeyKind.PREFIX, 4, 3), 1, None, (1,), (0, 2), None, None)),
        ("pull_blocks", (7, (KeyKind.CACHE, 5, 1), 1, None, [0], None, None, None)),
    ]
    for key in (CacheKey(7, 10), CacheKeyByIdAndIndex(7, 5)):
        refused("src_blocks should be empty", manager.pull_blocks, key, cache, [0], [0])
        refused("token is given with", manager.pull_blocks, key, cache, dst_blocks=[0], token=b"t")
    for key in (CacheKey(7, INVALID_ID), CacheKey(7, 1, 0, 2)):
        refused("one of req id and prefix id", manager.pull_blocks, key, cache, dst_blocks=[0])
    refused("is the own one", manager.pull_blocks, CacheKey(OWN_CLUSTER, 1), cache, dst_blocks=[0])
    with pytest.raises(ValueError, match="dst_blocks.* out of range"):
        manager.pull_blocks(CacheKey(7, 1), cache, dst_blocks=[-1])
    assert len(asked(manager)) == 3


def test_with_remote_access_blocks_are_pulled_by_every_key(pusher: CacheManager) -> None:
    cache = pusher.allocate_blocks_cache(desc())
    pusher.pull_blocks(BlocksCacheKey(7), cache, [0], [0])
    pusher.pull_blocks(CacheKey(7, 1), cache, dst_blocks=[0])
    pusher.pull_blocks(CacheKeyByIdAndIndex(7, 1), cache, dst_blocks=[0])
    assert len(asked(pusher)) == 3


PULL_BLOCKS_CHECKS: list[Check] = [
    (TypeError, "src_cache_key only support", "src_cache_key", 1),
    (TypeError, "dst_cache only support Cache", "dst_cache", KV_CACHE),
    (TypeError, "src_blocks only support list", "src_blocks", None),
    (TypeError, "src_blocks inner type only support", "src_blocks", ["0"]),
    (TypeError, "dst_blocks only support list", "dst_blocks", {1}),
    (TypeError, "dst_blocks inner type only support", "dst_blocks", [np.int64(1)]),
    (TypeError, "token only support bytes", "token", bytearray(40)),
    (LLMException, "should be blocks cache", "dst_cache", make_manager().allocate_cache(desc())),
    (LLMException, "dst_blocks can not be empty", "dst_blocks", []),
    (LLMException, "src_blocks can not be empty", "src_blocks", ()),
    (LLMException, "size should be same", "dst_blocks", [1, 2]),
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", "2"),
    (LLMException, r"is invalid, should \[1,", "tensor_num_per_layer", 0),
    (TypeError, "src_layer_range only support", "src_layer_range", [0, 1]),
    (LLMException, "step must be 1", "dst_layer_range", range(0, 4, 2)),
    (ValueError, "model_id .*out of range", "src_cache_key", BlocksCacheKey(0, -1)),
    (ValueError, "src_blocks.* -1 is out of range", "src_blocks", [-1]),
    (ValueError, "dst_blocks.*out of range", "dst_blocks", [2**64]),
    (LLMException, "is the own one", "src_cache_key", BlocksCacheKey(OWN_CLUSTER)),
]


@pytest.mark.parametrize("row", range(len(PULL_BLOCKS_CHECKS)))
def test_the_first_failing_check_of_a_pull_of_blocks_counts(manager: CacheManager, row: int) -> None:
    cache = manager.allocate_blocks_cache(desc())
    good = {"src_cache_key": BlocksCacheKey(0), "dst_cache": cache, "src_blocks": [0], "dst_blocks": [1]}
    expect_first(manager.pull_blocks, good, PULL_BLOCKS_CHECKS, row)
    assert asked(manager) == []


def test_caches_of_another_instance_are_unknown_to_this_one(pusher: CacheManager) -> None:
    other = make_manager()
    plain, blocks = other.allocate_cache(desc()), other.allocate_blocks_cache(desc())
    pusher.pull_cache(CacheKeyByIdAndIndex(0, 1), plain)
    pusher.pull_blocks(BlocksCacheKey(0), cpu_cache(), [0], [0])
    pusher.push_cache(CacheKeyByIdAndIndex(0, 1), plain)
    pusher.push_blocks(BlocksCacheKey(0), blocks, [0], [0])
    assert [args[2] for _, args in asked(pusher)] == [-1] * 4


def test_handles_and_keys_of_derived_classes(manager: CacheManager) -> None:
    class MyKey(CacheKey):
        pass

    class MyCache(Cache):
        pass

    cache = MyCache(3, desc(), [1], manager, False, False)
    manager.pull_cache(MyKey(7, 10), cache)
    assert asked(manager) == [("pull_cache", (7, (KeyKind.ORDINARY, 10, 0), 3, 0, -1, None, None, 0, 0, True))]


# ---- pushes


def test_pushes_of_slots(pusher: CacheManager) -> None:
    cache = pusher.register_cache(desc(), [512] * 4)
    key = CacheKeyByIdAndIndex(7, 5, 1)
    pusher.push_cache(key, cache)
    pusher.push_cache(key, cache, 3, range(1), range(1, 2), -1, 2)
    pusher.push_cache(key, cache, dst_layer_range=range(4, 8), tensor_num_per_layer=1)
    name = (KeyKind.CACHE, 5, 1)
    assert asked(pusher) == [
        ("push_cache", (7, name, 1, 0, (0, 4), (0, 4))),
        ("push_cache", (7, name, 1, 3, (0, 2), (2, 2))),
        ("push_cache", (7, name, 1, 0, (0, 4), (4, 4))),
    ]


def test_pushes_of_blocks(pusher: CacheManager) -> None:
    cache = pusher.register_blocks_cache(desc(), [512] * 4)
    pusher.push_blocks(BlocksCacheKey(7, 3), cache, (0, 1), [2, 3])
    pusher.push_blocks(BlocksCacheKey(7), cache, [0], [0], range(1, 2), range(1), 2)
    assert asked(pusher) == [
        ("push_blocks", (7, (KeyKind.BLOCKS, 0, 3), 1, (0, 1), [2, 3], (0, 4), (0, 4))),
        ("push_blocks", (7, (KeyKind.BLOCKS, 0, 0), 1, [0], [0], (2, 2), (0, 2))),
    ]


def test_pushes_need_remote_access(manager: CacheManager) -> None:
    refused(r"\[push_cache\].*llm.EnableRemoteCacheAccessible", manager.push_cache, None, None)
    refused(r"\[push_blocks\].*llm.EnableRemoteCacheAccessible", manager.push_blocks, None, None)


LAYER_CHECKS: list[Check] = [
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", 2.0),
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", "x"),
    (ValueError, "tensor_num_per_layer .*out of range", "tensor_num_per_layer", -1),
    (LLMException, r"tensor_num_per_layer 0 is invalid, should \[1, 10\]", "tensor_num_per_layer", 0),
    (LLMException, r"tensor_num_per_layer 3 is invalid, should \[1, 10\]", "tensor_num_per_layer", 3),
    (TypeError, "src_layer_range only support range", "src_layer_range", [0]),
    (LLMException, "src_layer_range is .*step must be 1", "src_layer_range", range(0, 4, 2)),
    (LLMException, "src_layer_range is .*start < stop", "src_layer_range", range(0)),
    (TypeError, "dst_layer_range only support range", "dst_layer_range", (0, 1)),
    (LLMException, "dst_layer_range is .*start < stop", "dst_layer_range", range(-1, 1)),
    (LLMException, "src_layer_range .* is out of range", "src_layer_range", range(5, 6)),
    (LLMException, "differ in length", "dst_layer_range", range(2)),
]
PUSH_CACHE_CHECKS: list[Check] = [
    (TypeError, "dst_cache_key only support CacheKeyByIdAndIndex", "dst_cache_key", None),
    (TypeError, "dst_cache_key only support CacheKeyByIdAndIndex", "dst_cache_key", BlocksCacheKey(0)),
    (TypeError, "src_cache only support Cache", "src_cache", KV_CACHE),
    (LLMException, "can not be blocks cache", "src_cache", cpu_cache(10)),
    (TypeError, "src_batch_index only support", "src_batch_index", None),
    (ValueError, "src_batch_index .*out of range", "src_batch_index", 2**32),
    *LAYER_CHECKS,
    (TypeError, "size only support", "size", None),
    (ValueError, "size .*out of range", "size", 2**63),
    (LLMException, "size 5 is invalid", "size", 5),
    (LLMException, "is the own one", "dst_cache_key", CacheKeyByIdAndIndex(OWN_CLUSTER, 1)),
]
PUSH_BLOCKS_CHECKS: list[Check] = [
    (TypeError, "dst_cache_key only support BlocksCacheKey", "dst_cache_key", CacheKeyByIdAndIndex(0, 1)),
    (TypeError, "src_cache only support Cache", "src_cache", None),
    (TypeError, "src_blocks only support list", "src_blocks", None),
    (TypeError, "src_blocks inner type only support", "src_blocks", ["0"]),
    (TypeError, "dst_blocks only support list", "dst_blocks", 5),
    (TypeError, "dst_blocks inner type only support", "dst_blocks", (None,)),
    (LLMException, "should be blocks cache", "src_cache", make_manager().allocate_cache(desc(10))),
    (LLMException, "dst_blocks can not be empty", "dst_blocks", ()),
    (LLMException, "size should be same", "dst_blocks", [1, 2]),
    *LAYER_CHECKS,
    (ValueError, "cluster_id .*out of range", "dst_cache_key", BlocksCacheKey(-1)),
    (ValueError, "src_blocks.*out of range", "src_blocks", [-1]),
    (ValueError, "dst_blocks.*out of range", "dst_blocks", [2**64]),
    (LLMException, "is the own one", "dst_cache_key", BlocksCacheKey(OWN_CLUSTER)),
]


@pytest.mark.parametrize("row", range(len(PUSH_CACHE_CHECKS)))
def test_the_first_failing_check_of_a_push_counts(pusher: CacheManager, row: int) -> None:
    good = {"dst_cache_key": CacheKeyByIdAndIndex(0, 1), "src_cache": pusher.allocate_cache(desc(10))}
    expect_first(pusher.push_cache, good, PUSH_CACHE_CHECKS, row)
    assert asked(pusher) == []


@pytest.mark.parametrize("row", range(len(PUSH_BLOCKS_CHECKS)))
def test_the_first_failing_check_of_a_push_of_blocks_counts(pusher: CacheManager, row: int) -> None:
    cache = pusher.allocate_blocks_cache(desc(10))
    good = {"dst_cache_key": BlocksCacheKey(0), "src_cache": cache, "src_blocks": [0], "dst_blocks": [1]}
    expect_first(pusher.push_blocks, good, PUSH_BLOCKS_CHECKS, row)
    assert asked(pusher) == []
