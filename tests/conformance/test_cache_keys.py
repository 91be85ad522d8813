"""CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from tests.conformance.expectations import INVALID_ID, invalid


def parts(key: CacheKey) -> tuple[int, int, int, int]:
    return key.cluster_id, key.req_id, key.model_id, key.prefix_id


def test_C085_a_key_of_a_request() -> None:
    key = CacheKey(1, 2)
    assert parts(key) == (1, 2, 0, INVALID_ID)
    assert key.prompt_cluster_id == key.cluster_id


def test_C086_positions_and_keywords() -> None:
    assert parts(CacheKey(1, 2, 3, 4)) == (1, 2, 3, 4)
    assert parts(CacheKey(prompt_cluster_id=1, req_id=2, model_id=3)) == (1, 2, 3, INVALID_ID)


def test_C087_wrong_arguments() -> None:
    invalid(CacheKey, 1, 2, 3, 4, 5, match="over limit")
    invalid(CacheKey, 1, match="req_id is required")
    invalid(CacheKey, req_id=1, match="cluster_id is required")
    invalid(CacheKey, 1, 2, foo=3, match="Unsupported.*foo")


@pytest.mark.parametrize("name", ["cluster_id", "prompt_cluster_id", "req_id", "model_id", "prefix_id"])
def test_C088_every_field_is_a_uint64(name: str) -> None:
    given: dict[str, Any] = {"req_id": 2} if name == "prompt_cluster_id" else {"cluster_id": 1, "req_id": 2}
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range"):
            CacheKey(**{**given, name: number})
    with pytest.raises(TypeError):
        CacheKey(**{**given, name: "1"})


def test_C089_what_wins() -> None:
    assert CacheKey(cluster_id=1, prompt_cluster_id=2, req_id=3).cluster_id == 1
    assert parts(CacheKey(1, 2, cluster_id=5, req_id=6))[:2] == (1, 2)


def test_C090_repr() -> None:
    assert repr(CacheKey(1, 2, 3, 4)) == "CacheKey(cluster_id=1, req_id=2, prefix_id=4, model_id=3)"


def test_C091_by_id_and_index() -> None:
    assert CacheKeyByIdAndIndex(0, 1).batch_index == 0
    with pytest.raises(TypeError):
        CacheKeyByIdAndIndex("0", 1)  # type: ignore[arg-type]
    for numbers in ((-1, 1), (0, 2**63), (0, 1, -1)):
        with pytest.raises(ValueError, match="out of range"):
            CacheKeyByIdAndIndex(*numbers)
    assert CacheKeyByIdAndIndex(0, -1).cache_id == -1
    assert repr(CacheKeyByIdAndIndex(1, 2, 3)) == "CacheKeyByIdAndIndex(cluster_id=1, cache_id=2, batch_index=3)"


def test_C092_keys_of_blocks_caches() -> None:
    assert BlocksCacheKey(0).model_id == 0
    assert repr(BlocksCacheKey(prompt_cluster_id=3)) == "BlocksCacheKey(prompt_cluster_id=3, model_id=0)"
    with pytest.raises(TypeError, match="The first param "):
        BlocksCacheKey("0")
    with pytest.raises(TypeError, match="The second param "):
        BlocksCacheKey(0, "0")
    invalid(BlocksCacheKey, 1, 2, 3)
    invalid(BlocksCacheKey)
    invalid(BlocksCacheKey, 1, foo=2)
    assert BlocksCacheKey(-1).cluster_id == -1


def test_C093_keys_are_equal_only_to_themselves() -> None:
    for make in (lambda: CacheKey(1, 2), lambda: CacheKeyByIdAndIndex(1, 2), lambda: BlocksCacheKey(1)):
        first, second = make(), make()
        assert first != second
        assert len({first, second, first}) == 2
