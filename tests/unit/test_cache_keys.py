"""Keys of caches."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMException, LLMStatusCode

INVALID_ID = 2**64 - 1


def fields(key: CacheKey) -> tuple[int, int, int, int]:
    assert key.prompt_cluster_id == key.cluster_id
    return key.cluster_id, key.req_id, key.model_id, key.prefix_id


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, 2), {}, (1, 2, 0, INVALID_ID)),
        ((1, 2, 3, 4), {}, (1, 2, 3, 4)),
        ((), {"prompt_cluster_id": 1, "req_id": 2, "model_id": 3}, (1, 2, 3, INVALID_ID)),
        ((), {"cluster_id": 1, "req_id": 2, "prefix_id": 4}, (1, 2, 0, 4)),
        ((1,), {"req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((), {"prompt_cluster_id": 9, "cluster_id": 1, "req_id": 2}, (1, 2, 0, INVALID_ID)),
        ((1, 2), {"req_id": 9}, (1, 2, 0, INVALID_ID)),
        ((1, 2), {"prompt_cluster_id": 9}, (1, 2, 0, INVALID_ID)),
    ],
)
def test_a_cache_key(args: Any, kwargs: Any, expected: tuple[int, ...]) -> None:
    assert fields(CacheKey(*args, **kwargs)) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((1, 2, 3, 4, 5), {}, "Param num is over limit"),
        ((1, 2, 3), {"prefix_id": 4, "model_id": 5}, "over limit"),
        ((), {}, "cluster_id is required"),
        ((), {"req_id": 1}, "cluster_id is required"),
        ((1,), {}, "req_id is required"),
        ((1, 2), {"foo": 3}, "Unsupported param: foo"),
        ((1,), {"foo": 3}, "req_id is required"),
    ],
)
def test_a_cache_key_that_cannot_be(args: Any, kwargs: Any, match: str) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        CacheKey(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("name", ["cluster_id", "req_id", "model_id", "prefix_id"])
def test_numbers_of_a_cache_key_are_uint64(name: str) -> None:
    good = {"cluster_id": 1, "req_id": 2, "model_id": 3, "prefix_id": 4}
    for value in (0, INVALID_ID):
        assert getattr(CacheKey(**{**good, name: value}), name) == value
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match=f"{name} {value} is out of range"):
            CacheKey(**{**good, name: value})
    for other in ("1", None, 1.0):
        with pytest.raises(TypeError, match=f"{name} only support int"):
            CacheKey(**{**good, name: other})  # type: ignore[dict-item]


def test_a_key_by_id() -> None:
    key = CacheKeyByIdAndIndex(0, 1)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (0, 1, 0)
    assert CacheKeyByIdAndIndex(0, -1).cache_id == -1
    assert repr(CacheKeyByIdAndIndex(5, 6, 7)) == "CacheKeyByIdAndIndex(cluster_id=5, cache_id=6, batch_index=7)"
    for args in ((-1, 1), (2**64, 1), (0, 2**63), (0, 1, -1), (0, 1, 2**32)):
        with pytest.raises(ValueError, match="out of range"):
            CacheKeyByIdAndIndex(*args)
    bad: list[Any] = [("0", 1), (0, "1"), (0, 1, "0"), (0, None)]
    for args in bad:
        with pytest.raises(TypeError, match="only support"):
            CacheKeyByIdAndIndex(*args)


def test_a_blocks_key() -> None:
    assert (BlocksCacheKey(7).cluster_id, BlocksCacheKey(7).prompt_cluster_id, BlocksCacheKey(7).model_id) == (7, 7, 0)
    assert (BlocksCacheKey(1, 2).model_id, BlocksCacheKey(prompt_cluster_id=3, model_id=4).cluster_id) == (2, 3)
    assert BlocksCacheKey(-1).cluster_id == -1
    assert BlocksCacheKey(0, 2**64).model_id == 2**64


def test_the_text_of_a_blocks_key_names_what_was_given() -> None:
    assert repr(BlocksCacheKey(3)) == "BlocksCacheKey(cluster_id=3, model_id=0)"
    assert repr(BlocksCacheKey(cluster_id=3)) == "BlocksCacheKey(cluster_id=3, model_id=0)"
    assert repr(BlocksCacheKey(prompt_cluster_id=3)) == "BlocksCacheKey(prompt_cluster_id=3, model_id=0)"


def test_a_blocks_key_that_cannot_be() -> None:
    bad: list[tuple[Any, Any, str]] = [
        ((1, 2, 3), {}, "over limit"),
        ((), {}, "cluster_id is required"),
        ((), {"model_id": 1}, "cluster_id is required"),
        ((1,), {"foo": 2}, "Unsupported param: foo"),
    ]
    for args, kwargs, match in bad:
        with pytest.raises(LLMException, match=match):
            BlocksCacheKey(*args, **kwargs)
    with pytest.raises(TypeError, match="^The first param .*only support int"):
        BlocksCacheKey("0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^The second param .*only support int"):
        BlocksCacheKey(0, "0")  # type: ignore[arg-type]


def test_the_text_of_a_cache_key() -> None:
    assert repr(CacheKey(1, 2, 3, 4)) == "CacheKey(cluster_id=1, req_id=2, prefix_id=4, model_id=3)"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CacheKey(1, 2), CacheKey(1, 2)),
        (CacheKeyByIdAndIndex(1, 2), CacheKeyByIdAndIndex(1, 2)),
        (BlocksCacheKey(1), BlocksCacheKey(1)),
    ],
)
def test_keys_are_told_apart_by_identity(one: object, other: object) -> None:
    assert one != other
    assert len({one, other, one}) == 2
