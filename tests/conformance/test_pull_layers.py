"""pull_cache with layer ranges, and the order of its checks."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, KvCache, LLMRole, Placement
from tests.conformance.conftest import Linked, Start
from tests.conformance.expectations import NOT_EXIST, NOT_LINKED, invalid, refused
from tests.conformance.remote import PROMPT, payload_slot, slot, target, untouched

KEY = CacheKey(PROMPT, 7)


def test_C181_source_and_destination_layers(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, src_layer_range=range(1), dst_layer_range=range(1, 2))
    for tensor in (0, 1):
        assert untouched(mine, tensor)
        assert slot(mine, tensor + 2, 0) == payload_slot(1, tensor, 0)


def test_C182_the_key_goes_with_its_last_layer(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager, tensors=2)
    for _ in range(2):
        linked.manager.pull_cache(KEY, mine, src_layer_range=range(1))
    linked.manager.pull_cache(KEY, mine, src_layer_range=range(1, 2))
    assert slot(mine, 0, 0) == payload_slot(1, 2, 0)
    refused(NOT_EXIST, linked.manager.pull_cache, KEY, mine, src_layer_range=range(1, 2))


def test_C183_only_a_source_range(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    invalid(linked.manager.pull_cache, KEY, target(linked.manager), src_layer_range=range(1))
    two = target(linked.manager, tensors=2)
    linked.manager.pull_cache(KEY, two, src_layer_range=range(1))
    assert slot(two, 1, 0) == payload_slot(1, 1, 0)


def test_C184_wrong_ranges(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    pull, mine = linked.manager.pull_cache, target(linked.manager)

    def both(layers: Any) -> dict[str, Any]:
        return {"src_layer_range": layers, "dst_layer_range": layers}

    invalid(pull, KEY, mine, **both(range(0, 4, 2)), match="step must be 1")
    invalid(pull, KEY, mine, **both(range(-1, 1)))
    with pytest.raises(TypeError):
        pull(KEY, mine, **both([0, 1]))
    with pytest.raises(ValueError, match="out of range"):
        pull(KEY, mine, **both(range(2**33, 2**33 + 1)))
    invalid(pull, KEY, mine, **both(range(3)))
    assert all(untouched(mine, tensor) for tensor in range(4))
    pull(KEY, mine, **both(range(2, 2)))
    assert slot(mine, 3, 0) == payload_slot(1, 3, 0)


def test_C185_tensors_of_a_layer(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    pull, mine = linked.manager.pull_cache, target(linked.manager)
    pull(KEY, mine, src_layer_range=range(3, 4), dst_layer_range=range(1), tensor_num_per_layer=1)
    assert slot(mine, 0, 0) == payload_slot(1, 3, 0)
    assert all(untouched(mine, tensor) for tensor in (1, 2, 3))
    invalid(pull, KEY, mine, tensor_num_per_layer=0, match=r"is invalid, should \[1,")
    with pytest.raises(ValueError, match="out of range"):
        pull(KEY, mine, tensor_num_per_layer=-1)
    with pytest.raises(TypeError):
        pull(KEY, mine, tensor_num_per_layer="2")
    invalid(pull, KEY, mine, src_layer_range=range(1), dst_layer_range=range(1), tensor_num_per_layer=3)


@pytest.mark.parametrize("tensors", [1, 3])
def test_C186_odd_numbers_of_tensors(linked: Linked, tensors: int) -> None:
    linked.prompt.offer(KEY, tensors=tensors)
    mine = target(linked.manager, tensors=tensors)
    linked.manager.pull_cache(KEY, mine)
    assert [slot(mine, tensor, 0) for tensor in range(tensors)] == [payload_slot(1, t, 0) for t in range(tensors)]


def test_C187_different_numbers_of_tensors(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    invalid(linked.manager.pull_cache, KEY, target(linked.manager, tensors=2))


def test_C188_unknown_keywords(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, no_such_keyword=object())
    assert slot(mine, 0, 0) == payload_slot(1, 0, 0)


def test_C189_a_prompt_does_not_pull(start: Start) -> None:
    manager = start(LLMRole.PROMPT).kv_cache_manager
    invalid(manager.pull_cache, KEY, target(manager), match="is not supported by")
    invalid(manager.pull_cache, "wrong", None, match="is not supported by")


def test_C189_types_and_placement(start: Start) -> None:
    manager = start(LLMRole.DECODER).kv_cache_manager
    with pytest.raises(TypeError):
        manager.pull_cache(BlocksCacheKey(PROMPT), target(manager))  # type: ignore[arg-type]
    host = KvCache.create_cpu_cache(CacheDesc(1, [4, 8], DataType.DT_FLOAT16, Placement.HOST), [4096])
    invalid(manager.pull_cache, KEY, host, match="Only support device cache")


def test_C190_the_local_cache_comes_before_the_link(start: Start) -> None:
    manager = start(LLMRole.DECODER).kv_cache_manager
    mine = target(manager)
    refused(NOT_LINKED, manager.pull_cache, KEY, mine)
    manager.deallocate_cache(mine)
    refused(NOT_EXIST, manager.pull_cache, KEY, mine)


def test_C191_layers_to_tensors() -> None:
    from llm_datadist.v2.llm_utils import layer_range_to_tensor_indices

    assert layer_range_to_tensor_indices(range(1, 2), range(1, 2)) == ([2, 3], [2, 3])
    assert layer_range_to_tensor_indices(None, None) == ([], [])
    indices = list(range(3, 9))
    assert layer_range_to_tensor_indices(range(1, 3), range(1, 3), 3) == (indices, indices)
