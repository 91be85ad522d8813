"""What `KvCacheManager` checks before it asks the engine, in which order, and what it asks."""

from __future__ import annotations

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
    KvCacheManager,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.engine.keys import KeyKind
from tests.recording_engine import RecordingEngine

INVALID_ID = 2**64 - 1
PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX


def desc(num_tensors: int = 4, shape: Any = (4, 256), **kwargs: Any) -> CacheDesc:
    return CacheDesc(num_tensors, shape, DataType.DT_FLOAT16, **kwargs)


def make(role: LLMRole) -> KvCacheManager:
    return KvCacheManager(RecordingEngine(), role)  # type: ignore[arg-type]


def asked(manager: KvCacheManager) -> list[tuple[str, tuple[Any, ...]]]:
    """What the engine was asked since the caches were allocated."""
    engine: Any = manager._engine
    return [call for call in engine.calls if call[0] != "allocate"]


def refused(match: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert isinstance(caught.value, ValueError)


@pytest.fixture
def decoder() -> KvCacheManager:
    return make(DECODER)


@pytest.fixture
def cache(decoder: KvCacheManager) -> KvCache:
    return decoder.allocate_cache(desc())


HOST_CACHE = KvCache.create_cpu_cache(desc(2, (4, 256), placement=Placement.HOST), [512, 1024])


# ---- allocation


def test_a_manager_is_initialized_until_it_is_closed() -> None:
    manager = make(PROMPT)
    assert manager.is_initialized() is True
    manager._close()
    assert manager.is_initialized() is False


def test_allocation_asks_for_bytes_slots_and_names() -> None:
    manager = make(PROMPT)
    description = desc(2, [4, 256])
    keys = (CacheKey(1, 10), CacheKey(1, INVALID_ID), CacheKey(1, 10, 3, 30), CacheKey(1, INVALID_ID, 3, 31))
    cache = manager.allocate_cache(description, keys)
    names = [(KeyKind.ORDINARY, 10, 0), None, (KeyKind.PREFIX, 30, 3), (KeyKind.PREFIX, 31, 3)]
    assert manager._engine.calls == [("allocate", (2, 2048, 4, names, None))]  # type: ignore[attr-defined]
    assert cache.cache_desc is description
    assert (cache.cache_id, cache.per_device_tensor_addrs) == (1, [[512, 1024]])


def test_allocation_of_blocks_asks_for_the_model() -> None:
    manager = make(PROMPT)
    keyed = manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(1, 7))
    plain = manager.allocate_blocks_cache(desc(1, [10, 128]))
    assert (keyed.cache_id, plain.cache_id) == (1, 2)
    calls: Any = manager._engine.calls  # type: ignore[attr-defined]
    assert calls == [("allocate", (2, 2560, 10, [], 7)), ("allocate", (1, 2560, 10, [], None))]


@pytest.mark.parametrize("name", ["allocate_cache", "allocate_blocks_cache"])
def test_descriptions_that_cannot_be_allocated(name: str) -> None:
    allocate = getattr(make(PROMPT), name)
    for other in (None, 1):
        with pytest.raises(TypeError, match="cache_desc only support CacheDesc"):
            allocate(other, "no key")
    refused("num_tensors should be bigger than zero", allocate, desc(0, placement=Placement.HOST))
    refused("Only support allocate device cache", allocate, desc(placement=Placement.HOST))
    refused("32 dimensions", allocate, desc(1, [1] * 32))
    for shape in ([0, 4], [4, 0], [-1, 4], [2**62, 2]):
        refused("shape", allocate, desc(1, shape))
    refused("do not fit into int64", allocate, desc(2**32 - 1, [2**32]))
    allocate(desc(1, [1] * 31))


def test_cache_keys_of_wrong_types() -> None:
    manager = make(PROMPT)
    bad: list[Any] = [[1], CacheKey(0, 1), {}, None, [CacheKeyByIdAndIndex(0, 1)], [BlocksCacheKey(0)], (None,)]
    for keys in bad:
        with pytest.raises(TypeError, match="only support"):
            manager.allocate_cache(desc(0), keys)
    with pytest.raises(TypeError, match="only support"):
        manager.allocate_blocks_cache(desc(0), CacheKey(0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("role", [DECODER, MIX])
def test_only_a_prompt_has_cache_keys(role: LLMRole) -> None:
    manager = make(role)
    refused(f"cache_keys is not supported by {role.name}", manager.allocate_cache, desc(1, [1] * 32), [CacheKey(0, 1)])
    refused("num_tensors", manager.allocate_cache, desc(0), [CacheKey(0, 1)])
    manager.allocate_cache(desc(), [])
    manager.allocate_cache(desc())


def test_a_decoder_has_no_blocks_key() -> None:
    match = "blocks_cache_key is not supported by DECODER"
    refused(match, make(DECODER).allocate_blocks_cache, desc(1, [1] * 32), BlocksCacheKey(-1))
    make(DECODER).allocate_blocks_cache(desc())
    make(MIX).allocate_blocks_cache(desc(), BlocksCacheKey(0))


def test_more_keys_than_slots() -> None:
    keys = [CacheKey(0, index) for index in range(5)]
    refused("5 cache_keys for 4 slots", make(PROMPT).allocate_cache, desc(1, [4, 8]), keys)


@pytest.mark.parametrize(
    "key", [BlocksCacheKey(-1), BlocksCacheKey(0, -1), BlocksCacheKey(2**64), BlocksCacheKey(0, 2**64)]
)
def test_numbers_of_a_blocks_key_are_checked_where_it_is_used(
    key: BlocksCacheKey, decoder: KvCacheManager, cache: KvCache
) -> None:
    with pytest.raises(ValueError, match="out of range") as caught:
        make(PROMPT).allocate_blocks_cache(desc(), key)
    assert not isinstance(caught.value, LLMException)
    with pytest.raises(ValueError, match="out of range") as caught:
        decoder.pull_blocks(key, cache, [0], [0])
    assert not isinstance(caught.value, LLMException)
    assert asked(decoder) == []


# ---- deallocation and removal


def test_what_cannot_be_deallocated() -> None:
    manager = make(MIX)
    with pytest.raises(AttributeError, match="cache only support KvCache"):
        manager.deallocate_cache(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cache only support KvCache"):
        manager.deallocate_cache(1)  # type: ignore[arg-type]
    refused("Only support device cache", manager.deallocate_cache, HOST_CACHE)
    assert asked(manager) == []


def test_a_cache_of_another_instance_is_unknown_to_this_one(decoder: KvCacheManager) -> None:
    other = make(DECODER)
    foreign = other.allocate_cache(desc())
    decoder.pull_cache(CacheKey(0, 1), foreign)
    decoder.pull_blocks(BlocksCacheKey(0), foreign, [0], [0])
    decoder.get_cache_tensors(foreign)
    decoder.deallocate_cache(foreign)
    ids = [args[2] if name.startswith("pull") else args[0] for name, args in asked(decoder)]
    assert ids == [-1, -1, -1, -1]


def test_a_key_is_removed_by_its_name() -> None:
    manager = make(PROMPT)
    manager.remove_cache_key(CacheKey(9, 5, 6))
    manager.remove_cache_key(CacheKey(9, 5, 6, 7))
    manager.remove_cache_key(CacheKey(9, INVALID_ID))
    assert asked(manager) == [("remove_key", ((KeyKind.ORDINARY, 5, 6),)), ("remove_key", ((KeyKind.PREFIX, 7, 6),))]


def test_what_cannot_be_removed() -> None:
    bad: list[Any] = [BlocksCacheKey(0), CacheKeyByIdAndIndex(0, 1), None, 1]
    for key in bad:
        with pytest.raises(TypeError, match="cache_key only support CacheKey"):
            make(PROMPT).remove_cache_key(key)
        for role in (DECODER, MIX):
            refused(r"\[remove_cache_key\] is not supported by " + role.name, make(role).remove_cache_key, key)


# ---- pull_cache


def test_a_plain_pull(decoder: KvCacheManager, cache: KvCache) -> None:
    decoder.pull_cache(CacheKey(7, 10, 3), cache)
    decoder.pull_cache(CacheKey(7, INVALID_ID, 3, 11), cache, 2, 64)
    decoder.pull_cache(CacheKeyByIdAndIndex(8, 5, 1), cache, batch_index=1, size=-1)
    assert asked(decoder) == [
        ("pull_cache", (7, (KeyKind.ORDINARY, 10, 3), 1, 0, -1, None, None, 0, 0, True)),
        ("pull_cache", (7, (KeyKind.PREFIX, 11, 3), 1, 2, 64, None, None, 0, 0, True)),
        ("pull_cache", (8, (KeyKind.CACHE, 5, 1), 1, 1, -1, None, None, 0, 0, True)),
    ]


def test_a_negative_id_names_a_cache_that_cannot_be(decoder: KvCacheManager, cache: KvCache) -> None:
    decoder.pull_cache(CacheKeyByIdAndIndex(8, -1), cache)
    assert asked(decoder)[0][1][1] == (KeyKind.CACHE, INVALID_ID, 0)


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, (None, None, 0, 0, True)),
        ({"unknown": "x", "timeout": -1}, (None, None, 0, 0, True)),
        ({"src_cache_offset": None, "dst_cache_offset": None}, (None, None, 0, 0, True)),
        ({"src_cache_offset": 0}, (None, None, 0, 0, False)),
        ({"dst_cache_offset": 0}, (None, None, 0, 0, False)),
        ({"src_cache_offset": 32, "dst_cache_offset": 128}, (None, None, 32, 128, False)),
        ({"src_layer_range": range(1), "dst_layer_range": range(1, 2)}, ((0, 2), (2, 2), 0, 0, True)),
        ({"src_layer_range": range(1, 2)}, ((2, 2), None, 0, 0, True)),
        ({"src_layer_range": range(2, 2), "tensor_num_per_layer": 3}, (None, None, 0, 0, True)),
        ({"src_layer_range": range(1, 3), "tensor_num_per_layer": 1}, ((1, 2), None, 0, 0, True)),
        ({"dst_layer_range": range(1), "tensor_num_per_layer": 4}, (None, (0, 4), 0, 0, True)),
        ({"tensor_num_per_layer": 2**32 - 1}, (None, None, 0, 0, True)),
    ],
)
def test_keywords_of_a_pull(
    decoder: KvCacheManager, cache: KvCache, keywords: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    decoder.pull_cache(CacheKey(7, 10), cache, **keywords)
    assert asked(decoder)[0][1][5:] == expected


def test_keys_and_caches_of_derived_classes(decoder: KvCacheManager, cache: KvCache) -> None:
    class MyKey(CacheKey):
        pass

    decoder.pull_cache(MyKey(7, 10), cache, True, True)
    assert asked(decoder) == [("pull_cache", (7, (KeyKind.ORDINARY, 10, 0), 1, 1, 1, None, None, 0, 0, True))]


# One row for each check of a pull, in their order. A row keeps its error whatever is wrong in the rows below it.
PULL_CACHE_CHECKS: list[tuple[type[Exception], str, str, Any]] = [
    (TypeError, "cache_key only support", "cache_key", BlocksCacheKey(0)),
    (TypeError, "kv_cache only support", "kv_cache", 1),
    (LLMException, "Only support device cache", "kv_cache", HOST_CACHE),
    (TypeError, "size only support", "size", "1"),
    (ValueError, "size .*out of range", "size", 2**63),
    (TypeError, "batch_index only support", "batch_index", "0"),
    (ValueError, "batch_index .*out of range", "batch_index", -1),
    (LLMException, "size 0 is invalid", "size", 0),
    (TypeError, "src_cache_offset only support", "src_cache_offset", "0"),
    (ValueError, "src_cache_offset is -1", "src_cache_offset", -1),
    (TypeError, "dst_cache_offset only support", "dst_cache_offset", 1.0),
    (ValueError, "dst_cache_offset is -1", "dst_cache_offset", -1),
    (LLMException, "one of req id and prefix id", "cache_key", CacheKey(0, INVALID_ID)),
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", "2"),
    (ValueError, "tensor_num_per_layer .*out of range", "tensor_num_per_layer", -1),
    (LLMException, r"is invalid, should \[1,", "tensor_num_per_layer", 0),
    (TypeError, "src_layer_range only support", "src_layer_range", [0, 1]),
    (TypeError, "dst_layer_range only support", "dst_layer_range", (0, 1)),
    (LLMException, "step must be 1", "src_layer_range", range(0, 4, 2)),
    (LLMException, "start value", "src_layer_range", range(-1, 1)),
    (ValueError, "out of range", "dst_layer_range", range(2**33, 2**33 + 1)),
]


@pytest.mark.parametrize("row", range(len(PULL_CACHE_CHECKS)))
def test_the_first_failing_check_of_a_pull_counts(decoder: KvCacheManager, cache: KvCache, row: int) -> None:
    error, match, name, value = PULL_CACHE_CHECKS[row]
    wrong: dict[str, Any] = {"cache_key": CacheKey(0, 1), "kv_cache": cache, name: value}
    with pytest.raises(error, match=match) as caught:
        decoder.pull_cache(**wrong)
    assert isinstance(caught.value, LLMException) is (error is LLMException)
    for _, _, later_name, later_value in PULL_CACHE_CHECKS[row + 1 :]:
        wrong.setdefault(later_name, later_value)
        if later_name in ("cache_key", "kv_cache") and later_name != name:
            wrong[later_name] = later_value
    with pytest.raises(error, match=match):
        decoder.pull_cache(**wrong)
    assert asked(decoder) == []


def test_a_batch_index_is_a_uint32(decoder: KvCacheManager, cache: KvCache) -> None:
    with pytest.raises(ValueError, match="batch_index .*out of range"):
        decoder.pull_cache(CacheKey(0, 1), cache, 2**32)
    decoder.pull_cache(CacheKey(0, 1), cache, 2**32 - 1)
    assert [args[3] for _, args in asked(decoder)] == [2**32 - 1]


@pytest.mark.parametrize("size", [0, -2, -(2**63)])
def test_sizes_that_no_slot_has(decoder: KvCacheManager, cache: KvCache, size: int) -> None:
    refused("size .* is invalid", decoder.pull_cache, CacheKey(0, 1), cache, size=size)


def test_numpy_numbers_are_no_ints(decoder: KvCacheManager, cache: KvCache) -> None:
    with pytest.raises(TypeError, match="batch_index only support"):
        decoder.pull_cache(CacheKey(0, 1), cache, np.int64(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inner type only support"):
        decoder.pull_blocks(BlocksCacheKey(0), cache, [np.int64(0)], [0])  # type: ignore[list-item]
    assert asked(decoder) == []


def test_a_key_with_both_or_neither_of_request_and_prefix(decoder: KvCacheManager, cache: KvCache) -> None:
    for key in (CacheKey(0, INVALID_ID), CacheKey(0, 1, 0, 2)):
        refused("one of req id and prefix id", decoder.pull_cache, key, cache)
        refused("one of req id and prefix id", decoder.pull_cache, key, cache, src_cache_offset=0)


def test_layers_divide_the_tensors_when_a_range_is_given(decoder: KvCacheManager, cache: KvCache) -> None:
    for name in ("src_layer_range", "dst_layer_range"):
        keywords: Any = {name: range(1), "tensor_num_per_layer": 3}
        refused(r"is invalid, should \[1, 4\]", decoder.pull_cache, CacheKey(0, 1), cache, **keywords)
        refused(r"is invalid, should \[1, 4\]", decoder.pull_blocks, BlocksCacheKey(0), cache, [0], [0], **keywords)


@pytest.mark.parametrize("role", [PROMPT, MIX])
def test_only_a_decoder_pulls(role: LLMRole) -> None:
    manager = make(role)
    refused(r"\[pull_cache\] is not supported by " + role.name, manager.pull_cache, 1, 1, "0")
    refused(r"\[pull_blocks\] is not supported by " + role.name, manager.pull_blocks, 1, 1, (), ())


# ---- pull_blocks


def test_a_plain_pull_of_blocks(decoder: KvCacheManager, cache: KvCache) -> None:
    source, target = [0, True], [2, 3]
    decoder.pull_blocks(BlocksCacheKey(7, 3), cache, source, target)
    assert asked(decoder) == [("pull_blocks", (7, (KeyKind.BLOCKS, 0, 3), 1, source, target, None, None, None))]


def test_keywords_of_a_pull_of_blocks(decoder: KvCacheManager, cache: KvCache) -> None:
    key = BlocksCacheKey(7)
    decoder.pull_blocks(
        key, cache, [0], [1], src_layer_range=range(1), dst_layer_range=range(1, 2), src_cache_offset="x"
    )
    decoder.pull_blocks(key, cache, [0], [1], dst_layer_range=range(3), tensor_num_per_layer=1)
    assert [args[5:] for _, args in asked(decoder)] == [((0, 2), (2, 2), None), (None, (0, 3), None)]


def test_no_blocks_at_all(decoder: KvCacheManager, cache: KvCache) -> None:
    refused("prompt_blocks can not be empty", decoder.pull_blocks, BlocksCacheKey(0), cache, [], [])


PULL_BLOCKS_CHECKS: list[tuple[type[Exception], str, str, Any]] = [
    (TypeError, "prompt_cache_key only support", "prompt_cache_key", CacheKey(0, 1)),
    (TypeError, "decoder_kv_cache only support", "decoder_kv_cache", None),
    (TypeError, "prompt_blocks only support list", "prompt_blocks", (0, 1)),
    (TypeError, "prompt_blocks inner type only support", "prompt_blocks", ["0"]),
    (TypeError, "decoder_blocks only support list", "decoder_blocks", None),
    (TypeError, "decoder_blocks inner type only support", "decoder_blocks", [1.0]),
    (LLMException, "Only support device cache", "decoder_kv_cache", HOST_CACHE),
    (LLMException, "prompt_blocks can not be empty", "prompt_blocks", []),
    (LLMException, "decoder_blocks can not be empty", "decoder_blocks", []),
    (LLMException, "size should be same", "decoder_blocks", [1, 2]),
    (TypeError, "tensor_num_per_layer only support", "tensor_num_per_layer", "2"),
    (LLMException, r"is invalid, should \[1,", "tensor_num_per_layer", 0),
    (TypeError, "src_layer_range only support", "src_layer_range", [0, 1]),
    (LLMException, "step must be 1", "dst_layer_range", range(0, 4, 2)),
    (ValueError, "block number -1 is out of range|prompt_blocks.* -1 is out of range", "prompt_blocks", [-1]),
    (ValueError, "out of range", "decoder_blocks", [2**64]),
]


@pytest.mark.parametrize("row", range(len(PULL_BLOCKS_CHECKS)))
def test_the_first_failing_check_of_a_pull_of_blocks_counts(decoder: KvCacheManager, cache: KvCache, row: int) -> None:
    error, match, name, value = PULL_BLOCKS_CHECKS[row]
    good: dict[str, Any] = {"prompt_cache_key": BlocksCacheKey(0), "decoder_kv_cache": cache}
    wrong: dict[str, Any] = {**good, "prompt_blocks": [0], "decoder_blocks": [1], name: value}
    with pytest.raises(error, match=match) as caught:
        decoder.pull_blocks(**wrong)
    assert isinstance(caught.value, LLMException) is (error is LLMException)
    for _, _, later_name, later_value in PULL_BLOCKS_CHECKS[row + 1 :]:
        if later_name != name:
            wrong[later_name] = later_value
    if match != "size should be same":  # which needs two good lists
        with pytest.raises(error, match=match):
            decoder.pull_blocks(**wrong)
    assert asked(decoder) == []


# ---- get_cache_tensors


def test_a_tensor_that_is_not_there(decoder: KvCacheManager, cache: KvCache) -> None:
    bad: list[Any] = [None, 1]
    for other in bad:
        with pytest.raises(TypeError, match="cache only support KvCache"):
            decoder.get_cache_tensors(other, "0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor_index only support int"):
        decoder.get_cache_tensors(cache, "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range") as caught:
        decoder.get_cache_tensors(cache, 2**31)
    assert not isinstance(caught.value, LLMException)
    for index in (-1, 4):
        refused("out of range", decoder.get_cache_tensors, cache, index)
    assert asked(decoder) == []
    decoder.get_cache_tensors(cache, 3)
    assert asked(decoder) == [("tensor_contents", (1, 3))]
