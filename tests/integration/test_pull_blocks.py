"""pull_blocks between two processes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, LLMException, LLMStatusCode
from tests import datadist_member as dd
from tests.pair import PROMPT, Pair

BLOCKS, SIZE = 10, 128
SHAPE = (BLOCKS, SIZE)
KEY = BlocksCacheKey(PROMPT)


def blocks(seed: int, tensor: int, shape: tuple[int, int] = SHAPE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return dd.payload(seed, tensor, shape[0] * shape[1]).reshape(shape)


def offer(pair: Pair, tensors: int = 2, shape: tuple[int, int] = SHAPE, key: BlocksCacheKey = KEY) -> int:
    cache = pair.prompt.call(dd.allocate_blocks, tensors, shape, key=key)
    pair.prompt.call(dd.fill, cache, 1)
    return int(cache)


def target(pair: Pair, tensors: int = 2, shape: tuple[int, int] = SHAPE) -> int:
    cache = pair.decoder.call(dd.allocate_blocks, tensors, shape)
    pair.decoder.call(dd.fill, cache, 999)
    return int(cache)


def code_of(pair: Pair, *args: Any, **kwargs: Any) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        pair.decoder.call(dd.pull_blocks, *args, **kwargs)
    return caught.value.status_code


def assert_blocks(pair: Pair, cache: int, table: dict[int, int], tensor: int, source_tensor: int | None = None) -> None:
    """Check every block of a tensor: those of the table are the prompt's, the others the old ones."""
    wanted = blocks(999, tensor)
    for to, source in table.items():
        wanted[to] = blocks(1, tensor if source_tensor is None else source_tensor)[source]
    np.testing.assert_array_equal(
        np.frombuffer(pair.decoder.call(dd.read, cache, tensor), np.uint8).reshape(SHAPE), wanted
    )


def test_blocks_go_where_the_block_tables_say(pair: Pair) -> None:
    offer(pair)
    mine = target(pair)
    for _ in range(2):
        pair.decoder.call(dd.pull_blocks, KEY, mine, [0, 1], [2, 3])
        for tensor in range(2):
            assert_blocks(pair, mine, {2: 0, 3: 1}, tensor)


@pytest.mark.parametrize("make", [list, np.array, lambda blocks: array("I", blocks)], ids=["list", "numpy", "array"])
def test_any_order_and_repeated_sources(pair: Pair, make: Callable[[list[int]], Any]) -> None:
    offer(pair)
    mine = target(pair)
    pair.decoder.call(dd.pull_blocks, KEY, mine, make([9, 3, 3, 0, 4, 5]), make([0, 9, 1, 2, 6, 7]))
    for tensor in range(2):
        assert_blocks(pair, mine, {0: 9, 9: 3, 1: 3, 2: 0, 6: 4, 7: 5}, tensor)


def test_the_last_of_repeated_destinations_wins(pair: Pair) -> None:
    offer(pair)
    mine = target(pair)
    pair.decoder.call(dd.pull_blocks, KEY, mine, [1, 2], [5, 5])
    assert_blocks(pair, mine, {5: 2}, 0)


def test_what_does_not_fit(pair: Pair) -> None:
    offer(pair)
    mine, other_size, fewer = target(pair), target(pair, shape=(BLOCKS, 64)), target(pair, tensors=1)
    invalid = LLMStatusCode.LLM_PARAM_INVALID
    assert code_of(pair, KEY, mine, [0, 1], [0, BLOCKS]) is invalid
    assert code_of(pair, KEY, mine, [0, BLOCKS], [0, 1]) is invalid
    assert code_of(pair, KEY, other_size, [0], [0]) is invalid
    assert code_of(pair, KEY, fewer, [0], [0]) is invalid
    assert code_of(pair, KEY, mine, [], []) is invalid
    assert code_of(pair, KEY, mine, [0], [0, 1]) is invalid
    with pytest.raises(ValueError, match="out of range"):
        pair.decoder.call(dd.pull_blocks, KEY, mine, [-1], [0])
    for tensor in range(2):
        assert_blocks(pair, mine, {}, tensor)


def test_unknown_models_and_deallocated_caches(pair: Pair) -> None:
    cache, mine = offer(pair), target(pair)
    assert code_of(pair, BlocksCacheKey(PROMPT, 5), mine, [0], [0]) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    pair.prompt.call(dd.deallocate, cache)
    assert code_of(pair, KEY, mine, [0], [0]) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert pair.prompt.call(dd.pool_used) == 0
    offer(pair)  # the model's name is free again
    pair.decoder.call(dd.pull_blocks, KEY, mine, [0], [0])


def test_each_model_has_its_own_blocks(pair: Pair) -> None:
    offer(pair)
    other = pair.prompt.call(dd.allocate_blocks, 2, SHAPE, key=BlocksCacheKey(PROMPT, 8))
    pair.prompt.call(dd.fill, other, 8)
    mine = target(pair)
    pair.decoder.call(dd.pull_blocks, BlocksCacheKey(PROMPT, 8), mine, [4], [4])
    raw = np.frombuffer(pair.decoder.call(dd.read, mine, 0), np.uint8).reshape(SHAPE)
    np.testing.assert_array_equal(raw[4], blocks(8, 0)[4])


def test_layer_ranges(pair: Pair) -> None:
    offer(pair, tensors=6)
    mine = target(pair, tensors=4)
    pair.decoder.call(dd.pull_blocks, KEY, mine, [1], [2], src_layer_range=range(1, 2), dst_layer_range=range(1))
    assert_blocks(pair, mine, {2: 1}, 0, source_tensor=2)
    assert_blocks(pair, mine, {2: 1}, 1, source_tensor=3)
    assert_blocks(pair, mine, {}, 2)
    assert_blocks(pair, mine, {}, 3)


def test_a_plain_cache_takes_blocks(pair: Pair) -> None:
    offer(pair)
    mine = pair.decoder.call(dd.allocate, 2, SHAPE)
    pair.decoder.call(dd.fill, mine, 999)
    pair.decoder.call(dd.pull_blocks, KEY, mine, [7], [1])
    assert_blocks(pair, mine, {1: 7}, 1)


def test_ten_thousand_blocks(pair: Pair) -> None:
    shape = (10_000, 64)
    offer(pair, shape=shape)
    mine = target(pair, shape=shape)
    source, to = list(range(10_000)), list(range(10_000))
    random.Random(1).shuffle(source)
    random.Random(2).shuffle(to)
    pair.decoder.call(dd.pull_blocks, KEY, mine, source, to)
    for tensor in range(2):
        raw = np.frombuffer(pair.decoder.call(dd.read, mine, tensor), np.uint8).reshape(shape)
        np.testing.assert_array_equal(raw[to], blocks(1, tensor, shape)[source])
