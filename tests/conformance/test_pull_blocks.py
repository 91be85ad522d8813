"""pull_blocks: block tables between two processes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, KvCache, LLMException, LLMRole
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.conftest import Linked, Start
from tests.conformance.expectations import NOT_EXIST, invalid, refused
from tests.conformance.remote import PROMPT, SENTINEL, payload_slot, slot, target, untouched

KEY = BlocksCacheKey(PROMPT)
TENSORS, BLOCKS, STRIDE = 4, 10, 128
SHAPE = (BLOCKS, STRIDE)


def offer_blocks(linked: Linked, tensors: int = TENSORS, shape: tuple[int, int] = SHAPE) -> int:
    cache = linked.prompt.call(dd.allocate_blocks, tensors, shape, key=KEY)
    linked.prompt.call(dd.fill, cache, 1)
    return int(cache)


def blocks_target(linked: Linked, tensors: int = TENSORS, shape: tuple[int, int] = SHAPE) -> KvCache:
    cache = linked.manager.allocate_blocks_cache(CacheDesc(tensors, shape, DataType.DT_UINT8))
    for tensor in range(tensors):
        tensor_view(cache, tensor)[:] = SENTINEL
    return cache


def test_C197_blocks_into_blocks(linked: Linked) -> None:
    offer_blocks(linked)
    for _ in range(2):
        mine = blocks_target(linked)
        linked.manager.pull_blocks(KEY, mine, [0, 1], [2, 3])
        for tensor in range(TENSORS):
            assert [slot(mine, tensor, block) for block in (2, 3)] == [
                payload_slot(1, tensor, b, SHAPE) for b in (0, 1)
            ]
            assert untouched(mine, tensor, 0, 1, *range(4, BLOCKS))


@pytest.mark.parametrize(
    ("source", "destination", "error"),
    [
        ([], [0], LLMException),
        ([0], [], LLMException),
        ([0, 1], [0], LLMException),
        ((0,), [0], TypeError),
        ([0], (0,), TypeError),
        (["0"], [0], TypeError),
        ([0], ["0"], TypeError),
        ([-1], [0], ValueError),
        ([0], [-1], ValueError),
    ],
)
def test_C198_wrong_lists(linked: Linked, source: Any, destination: Any, error: type[Exception]) -> None:
    offer_blocks(linked)
    mine = blocks_target(linked)
    with pytest.raises(error):
        linked.manager.pull_blocks(KEY, mine, source, destination)
    assert all(untouched(mine, tensor) for tensor in range(TENSORS))


def test_C199_blocks_that_do_not_fit(linked: Linked) -> None:
    offer_blocks(linked)
    pull, mine = linked.manager.pull_blocks, blocks_target(linked)
    invalid(pull, KEY, mine, [0, 1], [0, BLOCKS])
    assert all(untouched(mine, tensor) for tensor in range(TENSORS))
    invalid(pull, KEY, mine, [BLOCKS], [0])
    invalid(pull, KEY, blocks_target(linked, shape=(BLOCKS, STRIDE // 2)), [0], [0])
    invalid(pull, KEY, blocks_target(linked, tensors=2), [0], [0])


def test_C200_unknown_models(linked: Linked) -> None:
    cache = offer_blocks(linked)
    mine = blocks_target(linked)
    refused(NOT_EXIST, linked.manager.pull_blocks, BlocksCacheKey(PROMPT, 5), mine, [0], [0])
    linked.prompt.call(dd.deallocate, cache)
    refused(NOT_EXIST, linked.manager.pull_blocks, KEY, mine, [0], [0])


def test_C201_layers(linked: Linked) -> None:
    offer_blocks(linked, tensors=6)
    mine = blocks_target(linked, tensors=6)
    linked.manager.pull_blocks(KEY, mine, [1], [1], src_layer_range=range(2), dst_layer_range=range(2))
    for tensor in range(4):
        assert slot(mine, tensor, 1) == payload_slot(1, tensor, 1, SHAPE)
    assert untouched(mine, 4)
    assert untouched(mine, 5)


def test_C202_keys_and_roles(start: Start) -> None:
    prompt = start(LLMRole.PROMPT)
    mine = target(prompt.kv_cache_manager)
    invalid(prompt.kv_cache_manager.pull_blocks, KEY, mine, [0], [0], match="is not supported by")
    prompt.finalize()
    manager = start(LLMRole.DECODER).kv_cache_manager
    with pytest.raises(TypeError):
        manager.pull_blocks(CacheKey(PROMPT, 1), target(manager), [0], [0])  # type: ignore[arg-type]


def test_C203_into_a_plain_cache(linked: Linked) -> None:
    offer_blocks(linked)
    mine = target(linked.manager, TENSORS, (2, STRIDE))
    linked.manager.pull_blocks(KEY, mine, [9, 4], [0, 1])
    assert [slot(mine, 3, block) for block in (0, 1)] == [payload_slot(1, 3, block, SHAPE) for block in (9, 4)]


def test_C204_long_lists(linked: Linked) -> None:
    count, blocks, shape = 10_000, 300, (300, 64)
    choice = random.Random(204)
    offer_blocks(linked, tensors=2, shape=shape)
    mine = blocks_target(linked, tensors=2, shape=(count, 64))
    source = [choice.randrange(blocks) for _ in range(count)]
    destination = choice.sample(range(count), count)
    linked.manager.pull_blocks(KEY, mine, source, destination)
    for tensor in range(2):
        wanted = np.empty((count, 64), np.uint8)
        wanted[destination] = dd.payload(1, tensor, blocks * 64).reshape(shape)[source]
        np.testing.assert_array_equal(tensor_view(mine, tensor), wanted)
