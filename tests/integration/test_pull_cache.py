"""pull_cache between two processes: which bytes arrive where, and what becomes of the key."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from llm_datadist import CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, LLMException, LLMStatusCode
from llm_datadist.introspection import pool_statistics
from tests import datadist_member as dd
from tests.pair import PROMPT, Pair
from tests.processes import Member

INVALID_ID = 2**64 - 1
SLOTS, STRIDE = 4, 256
SHAPE = (SLOTS, STRIDE)


def expected(seed: int, tensor: int, slot: int, shape: tuple[int, int] = SHAPE) -> bytes:
    return dd.payload(seed, tensor, shape[0] * shape[1]).reshape(shape)[slot].tobytes()


def offer(prompt: Member, *keys: CacheKey, seed: int = 1, tensors: int = 4, shape: tuple[int, int] = SHAPE) -> int:
    cache = prompt.call(dd.allocate, tensors, shape, keys=list(keys))
    prompt.call(dd.fill, cache, seed)
    return int(cache)


def target(decoder: Member, tensors: int = 4, shape: tuple[int, int] = SHAPE) -> int:
    cache = decoder.call(dd.allocate, tensors, shape)
    decoder.call(dd.fill, cache, 999)
    return int(cache)


def slots(decoder: Member, cache: int, tensor: int, shape: tuple[int, int] = SHAPE) -> list[bytes]:
    raw = np.frombuffer(decoder.call(dd.read, cache, tensor), np.uint8).reshape(shape)
    return [row.tobytes() for row in raw]


def code_of(pair: Pair, *args: Any, **kwargs: Any) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        pair.decoder.call(dd.pull_cache, *args, **kwargs)
    return caught.value.status_code


NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
INVALID = LLMStatusCode.LLM_PARAM_INVALID


def test_exactly_one_slot_changes(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1), CacheKey(PROMPT, 2))
    cache = target(pair.decoder)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 2), cache, 3)
    for tensor in range(4):
        wanted = [expected(999, tensor, slot) for slot in range(3)] + [expected(1, tensor, 1)]
        assert slots(pair.decoder, cache, tensor) == wanted


def test_a_key_is_pulled_once_and_can_be_bound_again(pair: Pair) -> None:
    cache = target(pair.decoder)
    for seed in (1, 2):
        offer(pair.prompt, CacheKey(PROMPT, 1), seed=seed)
        pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), cache)
        assert slots(pair.decoder, cache, 0)[0] == expected(seed, 0, 0)
        assert code_of(pair, CacheKey(PROMPT, 1), cache) is NOT_EXIST


def test_unknown_keys_leave_the_link_good(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    cache = target(pair.decoder)
    for key in (CacheKey(PROMPT, 2), CacheKey(PROMPT, 1, 5), CacheKey(PROMPT, INVALID_ID, 0, 1)):
        assert code_of(pair, key, cache) is NOT_EXIST
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), cache)


def test_the_key_holds_a_deallocated_cache_until_it_is_pulled(pair: Pair) -> None:
    cache = offer(pair.prompt, CacheKey(PROMPT, 1))
    pair.prompt.call(dd.deallocate, cache)
    assert pair.prompt.call(dd.pool_used) > 0
    mine = target(pair.decoder)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert slots(pair.decoder, mine, 3)[0] == expected(1, 3, 0)
    assert pair.prompt.call(dd.pool_used) == 0


def test_a_removed_key_is_gone(pair: Pair) -> None:
    cache = offer(pair.prompt, CacheKey(PROMPT, 1))
    pair.prompt.call(dd.deallocate, cache)
    pair.prompt.call(dd.remove_key, CacheKey(PROMPT, 1))
    assert pair.prompt.call(dd.pool_used) == 0
    assert code_of(pair, CacheKey(PROMPT, 1), target(pair.decoder)) is NOT_EXIST


def test_pull_by_id(pair: Pair) -> None:
    cache = offer(pair.prompt, CacheKey(PROMPT, 1))
    mine = target(pair.decoder)
    for _ in range(2):  # slot 1 has no key
        pair.decoder.call(dd.pull_cache, CacheKeyByIdAndIndex(PROMPT, cache, 1), mine, 2)
        assert slots(pair.decoder, mine, 1)[2] == expected(1, 1, 1)
    pair.decoder.call(dd.pull_cache, CacheKeyByIdAndIndex(PROMPT, cache, 0), mine)
    assert code_of(pair, CacheKey(PROMPT, 1), mine) is NOT_EXIST  # that pull released the key of slot 0
    for key in ((cache + 1, 0), (cache, SLOTS), (-1, 0)):
        assert code_of(pair, CacheKeyByIdAndIndex(PROMPT, *key), mine) is NOT_EXIST
    pair.prompt.call(dd.deallocate, cache)
    assert code_of(pair, CacheKeyByIdAndIndex(PROMPT, cache, 1), mine) is NOT_EXIST


def test_pull_by_id_while_only_a_key_holds_the_cache(pair: Pair) -> None:
    cache = offer(pair.prompt, CacheKey(PROMPT, 1))
    pair.prompt.call(dd.deallocate, cache)
    mine = target(pair.decoder)
    pair.decoder.call(dd.pull_cache, CacheKeyByIdAndIndex(PROMPT, cache, 2), mine)
    assert slots(pair.decoder, mine, 0)[0] == expected(1, 0, 2)


def test_prefix_keys_stay(pair: Pair) -> None:
    prefix = CacheKey(PROMPT, INVALID_ID, 0, 7)
    cache = offer(pair.prompt, prefix)
    mine = target(pair.decoder)
    for _ in range(3):
        pair.decoder.call(dd.pull_cache, prefix, mine)
        pair.decoder.call(dd.pull_cache, CacheKeyByIdAndIndex(PROMPT, cache, 0), mine)
    pair.prompt.call(dd.remove_key, prefix)
    assert code_of(pair, prefix, mine) is NOT_EXIST


def test_the_last_of_equal_keys_wins_and_placeholders_name_nothing(pair: Pair) -> None:
    nothing = CacheKey(PROMPT, INVALID_ID)
    offer(pair.prompt, CacheKey(PROMPT, 1), nothing, CacheKey(PROMPT, 1), CacheKey(PROMPT, 2))
    mine = target(pair.decoder)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 0)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 2), mine, 1)
    assert slots(pair.decoder, mine, 2)[:2] == [expected(1, 2, 2), expected(1, 2, 3)]


def test_size_and_offsets(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    mine = target(pair.decoder)
    old, new = expected(999, 0, 0), expected(1, 0, 0)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 0, 64, src_cache_offset=32)
    assert slots(pair.decoder, mine, 0)[0] == new[32:96] + old[64:]
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 1, 64, src_cache_offset=32, dst_cache_offset=128)
    assert slots(pair.decoder, mine, 0)[1] == expected(999, 0, 1)[:128] + new[32:96] + expected(999, 0, 1)[192:]
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 2, dst_cache_offset=200)
    assert slots(pair.decoder, mine, 0)[2] == expected(999, 0, 2)[:200] + new[:56]
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 3, src_cache_offset=0)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 3, 64)  # none of those released the key, this does
    assert code_of(pair, CacheKey(PROMPT, 1), mine) is NOT_EXIST


def test_ranges_that_do_not_fit_keep_the_key(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    mine = target(pair.decoder)
    wide = target(pair.decoder, shape=(1, 2 * STRIDE))
    few = target(pair.decoder, tensors=2)
    key = CacheKey(PROMPT, 1)
    assert code_of(pair, key, mine, SLOTS) is INVALID
    assert code_of(pair, key, mine, 0, 8, dst_cache_offset=STRIDE - 7) is INVALID
    assert code_of(pair, key, mine, dst_cache_offset=STRIDE) is INVALID
    assert code_of(pair, key, mine, 0, 8, src_cache_offset=STRIDE - 7) is INVALID
    assert code_of(pair, key, wide) is INVALID
    assert code_of(pair, key, few) is INVALID
    assert code_of(pair, key, mine, src_layer_range=range(2, 3), dst_layer_range=range(1)) is INVALID
    assert code_of(pair, key, mine, src_layer_range=range(1), dst_layer_range=range(2, 3)) is INVALID
    assert code_of(pair, key, mine, src_layer_range=range(1)) is INVALID
    for tensor in range(4):
        assert slots(pair.decoder, mine, tensor) == [expected(999, tensor, slot) for slot in range(SLOTS)]
    pair.decoder.call(dd.pull_cache, key, mine)


def test_layer_ranges(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    mine = target(pair.decoder)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, src_layer_range=range(1), dst_layer_range=range(1, 2))
    for tensor, wanted in enumerate((expected(999, 0, 0), expected(999, 1, 0), expected(1, 0, 0), expected(1, 1, 0))):
        assert slots(pair.decoder, mine, tensor)[0] == wanted
    single = target(pair.decoder, tensors=1)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), single, src_layer_range=range(3, 4), tensor_num_per_layer=1)
    assert slots(pair.decoder, single, 0)[0] == expected(1, 3, 0)


def test_a_key_goes_when_every_layer_was_pulled(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    mine, key = target(pair.decoder, tensors=2), CacheKey(PROMPT, 1)
    for _ in range(2):
        pair.decoder.call(dd.pull_cache, key, mine, src_layer_range=range(1))
    pair.decoder.call(dd.pull_cache, key, mine, src_layer_range=range(1, 2))
    assert code_of(pair, key, mine, src_layer_range=range(1, 2)) is NOT_EXIST


@pytest.mark.parametrize("tensors", [1, 3])
def test_odd_numbers_of_tensors(pair: Pair, tensors: int) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1), tensors=tensors)
    mine = target(pair.decoder, tensors=tensors)
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, unknown_keyword=1)
    for tensor in range(tensors):
        assert slots(pair.decoder, mine, tensor)[0] == expected(1, tensor, 0)


def test_a_smaller_local_slot_takes_the_first_bytes(pair: Pair) -> None:
    offer(pair.prompt, CacheKey(PROMPT, 1))
    mine = target(pair.decoder, shape=(1, 100))
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert pair.decoder.call(dd.read, mine, 2) == expected(1, 2, 0)[:100]


def test_not_linked_comes_after_the_local_cache(pair: Pair) -> None:
    mine = target(pair.decoder)
    pair.decoder.call(dd.unlink, PROMPT, pair.port)
    assert code_of(pair, CacheKey(PROMPT, 1), mine) is LLMStatusCode.LLM_NOT_YET_LINK
    assert code_of(pair, CacheKey(77, 1), mine) is LLMStatusCode.LLM_NOT_YET_LINK
    pair.decoder.call(deallocate_but_remember, mine)
    assert code_of(pair, CacheKey(PROMPT, 1), mine) is NOT_EXIST


def deallocate_but_remember(state: dd.State, cache_id: int) -> None:
    dd.manager(state).deallocate_cache(state["caches"][cache_id])


def pull_many(state: dd.State, plans: list[dict[str, Any]]) -> None:
    """Pull and compare; each plan has the remote cache's id and seed, its shape, and what to pull."""
    for plan in plans:
        tensors, shape, local_shape = plan["tensors"], plan["shape"], plan["local_shape"]
        cache = dd.manager(state).allocate_cache(CacheDesc(tensors, local_shape, DataType.DT_UINT8))
        views = [dd.tensor_view(cache, tensor) for tensor in range(tensors)]
        for view in views:
            view[:] = 0xAA
        wanted = [view.copy() for view in views]
        sources = [dd.payload(plan["seed"], tensor, int(np.prod(shape))).reshape(shape) for tensor in range(tensors)]
        first, count = plan["layers"]
        for offset in range(count):
            data = sources[first + offset][plan["slot"]][plan["source"] : plan["source"] + plan["size"]]
            wanted[plan["local_first"] + offset][plan["local_slot"]][plan["to"] : plan["to"] + plan["size"]] = data
        dd.manager(state).pull_cache(
            CacheKeyByIdAndIndex(PROMPT, plan["cache"], plan["slot"]),
            cache,
            plan["local_slot"],
            plan["size"],
            src_layer_range=range(first, first + count),
            dst_layer_range=range(plan["local_first"], plan["local_first"] + count),
            src_cache_offset=plan["source"],
            dst_cache_offset=plan["to"],
            tensor_num_per_layer=1,
        )
        for view, want in zip(views, wanted):
            np.testing.assert_array_equal(view, want, err_msg=str(plan))


def test_a_thousand_random_pulls(pair: Pair) -> None:
    choice = random.Random(5)
    caches = []
    for seed in range(20):
        tensors = choice.randint(1, 9)
        shape = (choice.randint(1, 8), choice.randint(1, 3000))
        caches.append((offer(pair.prompt, seed=seed, tensors=tensors, shape=shape), seed, tensors, shape))
    plans = []
    for _ in range(1000):
        cache, seed, tensors, shape = choice.choice(caches)
        local_shape = (choice.randint(1, 5), choice.randint(1, 3000))
        size = choice.randint(1, min(shape[1], local_shape[1]))
        count = choice.randint(1, tensors)
        plans.append(
            {
                "cache": cache,
                "seed": seed,
                "tensors": tensors,
                "shape": shape,
                "local_shape": local_shape,
                "slot": choice.randrange(shape[0]),
                "local_slot": choice.randrange(local_shape[0]),
                "size": size,
                "source": choice.randint(0, shape[1] - size),
                "to": choice.randint(0, local_shape[1] - size),
                "layers": (choice.randint(0, tensors - count), count),
                "local_first": choice.randint(0, tensors - count),
            }
        )
    pair.decoder.call(pull_many, plans, timeout=60)


def statistics(state: dd.State) -> Any:
    return pool_statistics(state["datadist"])


def test_everything_is_given_back(pair: Pair) -> None:
    for req_id in range(50):
        pair.prompt.call(dd.deallocate, offer(pair.prompt, CacheKey(PROMPT, req_id), seed=req_id))
    assert pair.prompt.call(statistics).keys == 50
    mine = target(pair.decoder)
    for req_id in range(50):
        pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, req_id), mine)
    pair.decoder.call(dd.deallocate, mine)
    for member in (pair.prompt, pair.decoder):
        level = member.call(statistics)
        assert (level.used, level.caches, level.keys, level.largest_free) == (0, 0, 0, level.capacity)
