"""What copy_cache, copy_blocks and swap_blocks check before they ask the engine, in which order, and what they ask."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import pytest

from llm_datadist import (
    CacheDesc,
    DataType,
    KvCache,
    KvCacheManager,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.local_copy_arguments import check_swap_blocks
from tests.recording_engine import RecordingEngine

HOST = Placement.HOST


def desc(num_tensors: int = 2, shape: Any = (10, 16), **kwargs: Any) -> CacheDesc:
    return CacheDesc(num_tensors, shape, DataType.DT_FLOAT16, **kwargs)


def host_cache(num_tensors: int = 2, shape: Any = (10, 16), devices: int = 1, **kwargs: Any) -> KvCache:
    addresses = [[4096 * (index + 1) for index in range(num_tensors)] for _ in range(devices)]
    return KvCache.create_cpu_cache(desc(num_tensors, shape, placement=HOST, **kwargs), addresses)


def asked(manager: KvCacheManager) -> list[tuple[str, tuple[Any, ...]]]:
    """What the engine was asked since the caches were allocated."""
    engine: Any = manager._engine
    return [call for call in engine.calls if call[0] != "allocate"]


def refused(match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert isinstance(caught.value, ValueError)


@pytest.fixture(params=LLMRole)
def manager(request: pytest.FixtureRequest) -> KvCacheManager:
    return KvCacheManager(RecordingEngine(), request.param)  # type: ignore[arg-type]


@pytest.fixture
def cache(manager: KvCacheManager) -> KvCache:
    return manager.allocate_cache(desc())


# ---- copy_cache


def test_copy_cache_asks_for_slots_and_bytes(manager: KvCacheManager, cache: KvCache) -> None:
    other = manager.allocate_cache(desc())
    manager.copy_cache(other, cache)
    manager.copy_cache(other, cache, 3, 4, 5, 6, 7)
    manager.copy_cache(dst=cache, src=cache, src_batch_index=True)
    assert asked(manager) == [
        ("copy_cache", (2, 1, 0, 0, 0, -1)),
        ("copy_cache", (2, 1, 3, 4, 5, 6)),
        ("copy_cache", (1, 1, 0, True, 0, -1)),
    ]


def test_the_request_of_a_copy_is_logged(
    manager: KvCacheManager, cache: KvCache, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "llm_datadist"):
        manager.copy_cache(cache, cache, 1, 2, req_id=77)
    assert "req_id 77" in caplog.text
    assert "cache 1 slot 2 -> cache 1 slot 1" in caplog.text


def test_the_first_wrong_argument_of_copy_cache_counts(manager: KvCacheManager, cache: KvCache) -> None:
    """Arguments are made right one after the other, in the documented order of the checks."""
    args: list[Any] = ["dst", "src", "1", "1", -1, "1"]
    rest: dict[str, Any] = {"req_id": "1"}
    copy = manager.copy_cache
    for wrong, error in (("dst", TypeError), (None, TypeError)):
        args[0] = wrong
        with pytest.raises(error, match="dst only support KvCache"):
            copy(*args, **rest)
    args[0] = host_cache()
    refused("Only support device cache.*dst", copy, *args, **rest)
    args[0] = cache
    with pytest.raises(TypeError, match="src only support KvCache"):
        copy(*args, **rest)
    args[1] = host_cache()
    refused("Only support device cache.*src", copy, *args, **rest)
    args[1] = cache
    for position, name in ((2, "dst_batch_index"), (3, "src_batch_index")):
        with pytest.raises(TypeError, match=f"{name} only support int"):
            copy(*args, **rest)
        for number in (-1, 2**32):
            args[position] = number
            with pytest.raises(ValueError, match=f"{name} .* out of range"):
                copy(*args, **rest)
        args[position] = 2**32 - 1
    for number in (-1, 2**64):
        args[4] = number
        with pytest.raises(ValueError, match="offset .* out of range"):
            copy(*args, **rest)
    args[4] = 2**64 - 1
    with pytest.raises(TypeError, match="size only support int"):
        copy(*args, **rest)
    args[5] = 2**63
    with pytest.raises(ValueError, match="size .* out of range"):
        copy(*args, **rest)
    for number in (0, -2):
        args[5] = number
        refused("size .* is invalid", copy, *args, **rest)
    args[5] = 2**63 - 1
    with pytest.raises(TypeError, match="req_id only support int"):
        copy(*args, **rest)
    assert asked(manager) == []
    copy(*args)
    assert len(asked(manager)) == 1


def test_a_cache_of_another_instance_is_unknown(manager: KvCacheManager, cache: KvCache) -> None:
    other = KvCacheManager(RecordingEngine(), LLMRole.MIX)  # type: ignore[arg-type]
    other.copy_cache(cache, cache)
    other.copy_blocks(cache, {0: [1]})
    assert [args[0] for _, args in asked(other)] == [-1, -1]


# ---- copy_blocks


def test_copy_blocks_asks_for_pairs_in_order(manager: KvCacheManager, cache: KvCache) -> None:
    manager.copy_blocks(cache, {4: [2, 3], 1: [], 0: [4]})
    manager.copy_blocks(cache, {})
    manager.copy_blocks(cache, {1: []})
    manager.copy_blocks(cache, defaultdict(list, {4: [2, 3], True: [0]}))
    assert asked(manager) == [
        ("copy_blocks", (1, [4, 4, 0], [2, 3, 4])),
        ("copy_blocks", (1, [], [])),
        ("copy_blocks", (1, [], [])),
        ("copy_blocks", (1, [4, 4, 1], [2, 3, 0])),
    ]


def test_wrong_arguments_of_copy_blocks(manager: KvCacheManager, cache: KvCache) -> None:
    for other in (None, 1):
        with pytest.raises(TypeError, match="cache only support KvCache"):
            manager.copy_blocks(other, None)  # type: ignore[arg-type]
    cases: list[tuple[Any, str]] = [
        (None, "copy_block_info only support dict"),
        ([(0, [1])], "copy_block_info only support dict"),
        ({"1": 0}, "dict key only support int"),
        ({1: 0}, "dict value only support list"),
        ({1: (0,)}, "dict value only support list"),
        ({1: [0], 2: ["0"]}, "inner type only support int"),
        ({-1: [None]}, "inner type only support int"),
    ]
    for info, text in cases:
        for any_cache in (cache, host_cache()):  # the types count before the placement
            with pytest.raises(TypeError, match=text):
                manager.copy_blocks(any_cache, info)
    refused("Only support device cache", manager.copy_blocks, host_cache(), {-1: [0]})
    for info in ({-1: [0]}, {0: [-1]}, {2**64: [0]}, {0: [1, 2**64]}, {-1: []}):
        with pytest.raises(ValueError, match="out of range of uint64"):
            manager.copy_blocks(cache, info)
    assert asked(manager) == []


# ---- swap_blocks


def test_swap_blocks_asks_for_addresses_and_pairs(manager: KvCacheManager, cache: KvCache) -> None:
    host = host_cache()
    manager.swap_blocks(host, cache, {3: 4, 0: 0})
    manager.swap_blocks(cache, host, {3: 4, 1: 4})
    manager.swap_blocks(cache, host, {})
    addresses = [[4096, 8192]]
    assert asked(manager) == [
        ("swap_blocks", (1, addresses, 32, [3, 0], [4, 0], True)),
        ("swap_blocks", (1, addresses, 32, [3, 1], [4, 4], False)),
        ("swap_blocks", (1, addresses, 32, [], [], False)),
    ]


def test_wrong_types_of_swap_blocks(manager: KvCacheManager, cache: KvCache) -> None:
    right: list[Any] = [cache, host_cache(3), {0: 0}]
    for position, name in enumerate(("src", "dst", "src_to_dst")):
        args = right[:position] + [None] * (3 - position)
        for error in (TypeError, AttributeError):
            with pytest.raises(error, match=f"^{name} only support"):
                manager.swap_blocks(*args)
        with pytest.raises(TypeError, match=f"^{name} only support"):
            manager.swap_blocks(*args[:position], [(0, 0)], *args[position + 1 :])
    with pytest.raises(TypeError, match="inner type only support int"):
        manager.swap_blocks(cache, host_cache(3), {"0": 0})  # type: ignore[dict-item]
    for value in ("0", None, 0.5):
        refused("num_tensors .* must be equal", manager.swap_blocks, cache, host_cache(3), {0: value})
        with pytest.raises(TypeError, match="only support int"):
            manager.swap_blocks(cache, host_cache(), {0: value})  # type: ignore[dict-item]


def test_the_first_mismatch_of_swap_blocks_counts(manager: KvCacheManager, cache: KvCache) -> None:
    swap, wrong = manager.swap_blocks, {10: 10}
    refused("block sizes .* must be equal", swap, cache, manager.allocate_cache(desc(3, (10, 17))), wrong)
    refused("num_tensors .* must be equal", swap, cache, manager.allocate_cache(desc(3)), wrong)
    smaller = host_cache(2, (5, 16), devices=2)
    for table in ({10: 0}, {-1: 0}, {0: 5}, {0: -1}, {0: 0, 9: 5}):
        refused(r"must be in \[0,", swap, cache, smaller, table)
        refused(r"must be in \[0,", swap, smaller, cache, {target: source for source, target in table.items()})
    refused("is not support", swap, cache, cache, {9: 9})
    refused("is not support", swap, smaller, smaller, {4: 4})
    refused("equally many", swap, cache, smaller, {9: 4})
    host = host_cache()
    host.per_device_tensor_addrs[0].pop()
    refused("equally many", swap, cache, host, {})
    manager.deallocate_cache(cache)
    refused("deallocated", swap, cache, host_cache(), {})
    assert "swap_blocks" not in [name for name, _ in asked(manager)]


def test_a_block_is_an_index_of_the_batch_dimension(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(2, (3, 4, 5), batch_dim_index=1))
    host = host_cache(2, (4, 15))
    arguments = check_swap_blocks(host, cache, {3: 0})
    assert (arguments.block_nbytes, arguments.swap_in) == (30, True)
    assert (arguments.device, arguments.host) == (cache, host)


def test_a_description_without_blocks(manager: KvCacheManager, cache: KvCache) -> None:
    shape = [0, 16]
    empty = KvCache.create_cpu_cache(desc(2, shape, placement=HOST), [512, 1024])
    refused("dimension 0", manager.swap_blocks, empty, cache, {})
    empty.cache_desc.update_dim(0, 10)
    refused("batch_size of src is 0", manager.swap_blocks, empty, cache, {})
