"""pull_cache: which bytes arrive where, and what becomes of the key."""

from __future__ import annotations

import pytest

from llm_datadist import CacheKey, CacheKeyByIdAndIndex, LLMRole
from tests import datadist_member as dd
from tests.conformance.conftest import Linked, StartRemote
from tests.conformance.expectations import INVALID_ID, LINKED, NOT_EXIST, OK, invalid, outcome, refused
from tests.conformance.remote import PROMPT, SLOTS, STRIDE, payload_slot, slot, target, untouched
from tests.processes import Member

KEY = CacheKey(PROMPT, 7)
PREFIX = CacheKey(PROMPT, INVALID_ID, 0, 7)
TENSORS = 4
AA = b"\xaa"


def is_bound(linked: Linked) -> bool:
    """Pull a byte at an offset, which never releases a key."""
    code = outcome(linked.manager.pull_cache, KEY, target(linked.manager), size=1, src_cache_offset=0)
    assert code in (OK, NOT_EXIST)
    return code is OK


def test_C166_exactly_one_slot_changes(linked: Linked) -> None:
    linked.prompt.offer(CacheKey(PROMPT, 1), KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, 2)
    for tensor in range(TENSORS):
        assert slot(mine, tensor, 2) == payload_slot(1, tensor, 1)
        assert untouched(mine, tensor, 0, 1, 3)


def test_C167_a_key_is_pulled_once(linked: Linked) -> None:
    mine = target(linked.manager)
    for seed in (1, 2):
        linked.prompt.offer(KEY, seed=seed)
        linked.manager.pull_cache(KEY, mine)
        assert slot(mine, 0, 0) == payload_slot(seed, 0, 0)
        refused(NOT_EXIST, linked.manager.pull_cache, KEY, mine)


def test_C168_unknown_keys(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    for key in (CacheKey(PROMPT, 8), CacheKey(PROMPT, 7, 1)):
        refused(NOT_EXIST, linked.manager.pull_cache, key, mine)
    linked.decoder.check_link_status(PROMPT)
    linked.manager.pull_cache(KEY, mine)


def test_C169_a_key_outlives_the_id(linked: Linked) -> None:
    linked.prompt.offer(KEY, hold=False)
    assert linked.prompt.call(dd.pool_used) > 0
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine)
    assert slot(mine, 1, 0) == payload_slot(1, 1, 0)
    assert linked.prompt.call(dd.pool_used) == 0


def test_C170_a_removed_key(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    linked.prompt.call(dd.remove_key, CacheKey(99, 7))
    refused(NOT_EXIST, linked.manager.pull_cache, KEY, target(linked.manager))


def test_C171_by_id_and_index(linked: Linked) -> None:
    cache = linked.prompt.offer(KEY)
    mine = target(linked.manager)
    for index in (2, 3):
        linked.manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, cache, 1), mine, index)
        assert slot(mine, 0, index) == payload_slot(1, 0, 1)
    assert is_bound(linked)
    linked.manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, cache, 0), mine)
    assert not is_bound(linked)


def test_C172_unknown_ids(linked: Linked) -> None:
    """A pull of the last key of a deallocated cache takes effect by id with the owner's next call on its caches."""
    cache = linked.prompt.offer(KEY)
    pull, mine = linked.manager.pull_cache, target(linked.manager)
    for place in ((cache + 1, 0), (cache, SLOTS)):
        refused(NOT_EXIST, pull, CacheKeyByIdAndIndex(PROMPT, *place), mine)
    linked.prompt.call(dd.deallocate, cache)
    pull(CacheKeyByIdAndIndex(PROMPT, cache, 1), mine)  # the key holds it
    pull(KEY, mine)
    assert linked.prompt.call(dd.pool_used) == 0
    refused(NOT_EXIST, pull, CacheKeyByIdAndIndex(PROMPT, cache, 1), mine)


def test_C173_prefix_keys(linked: Linked, start_remote: StartRemote, more_processes: list[Member]) -> None:
    linked.prompt.offer(PREFIX, hold=False)
    other = start_remote(more_processes[0], LLMRole.DECODER, 3)
    assert other.call(dd.link, PROMPT, linked.prompt.port) == LINKED
    theirs, mine = other.call(dd.allocate, TENSORS, (SLOTS, STRIDE)), target(linked.manager)
    for index in range(3):
        linked.manager.pull_cache(PREFIX, mine, index)
        other.call(dd.pull_cache, PREFIX, theirs, index)
    assert slot(mine, 3, 2) == other.call(dd.read, theirs, 3)[2 * STRIDE : 3 * STRIDE] == payload_slot(1, 3, 0)
    linked.prompt.call(dd.remove_key, PREFIX)
    refused(NOT_EXIST, linked.manager.pull_cache, PREFIX, mine)
    assert linked.prompt.call(dd.pool_used) == 0


def test_C174_one_of_request_and_prefix(linked: Linked) -> None:
    mine = target(linked.manager)
    for key in (CacheKey(PROMPT, INVALID_ID), CacheKey(PROMPT, 7, 0, 7)):
        invalid(linked.manager.pull_cache, key, mine, match="one of req id and prefix id")


def test_C175_size(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, 0, 64)
    for tensor in range(TENSORS):
        assert slot(mine, tensor, 0) == payload_slot(1, tensor, 0)[:64] + AA * (STRIDE - 64)
    assert not is_bound(linked)


def test_C176_offsets(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    wanted = payload_slot(1, 0, 0)[32:96]
    linked.manager.pull_cache(KEY, mine, 0, 64, src_cache_offset=32)
    linked.manager.pull_cache(KEY, mine, 1, 64, src_cache_offset=32, dst_cache_offset=128)
    assert slot(mine, 0, 0) == wanted + AA * (STRIDE - 64)
    assert slot(mine, 0, 1) == AA * 128 + wanted + AA * (STRIDE - 192)
    assert is_bound(linked)


def test_C177_the_rest_of_a_slot(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, dst_cache_offset=200)
    assert slot(mine, 0, 0) == AA * 200 + payload_slot(1, 0, 0)[: STRIDE - 200]


def test_C178_an_offset_keeps_the_key(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine = target(linked.manager)
    linked.manager.pull_cache(KEY, mine, src_cache_offset=0)
    assert slot(mine, 0, 0) == payload_slot(1, 0, 0)
    assert is_bound(linked)


def test_C179_bytes_that_do_not_exist(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    mine, wide = target(linked.manager), target(linked.manager, shape=(1, 2 * STRIDE))
    invalid(linked.manager.pull_cache, KEY, mine, 0, 9, dst_cache_offset=STRIDE - 8)
    invalid(linked.manager.pull_cache, KEY, mine, 0, 9, src_cache_offset=STRIDE - 8)
    invalid(linked.manager.pull_cache, KEY, wide)
    assert all(untouched(cache, tensor) for cache in (mine, wide) for tensor in range(TENSORS))
    assert is_bound(linked)


def test_C180_wrong_numbers(linked: Linked) -> None:
    linked.prompt.offer(KEY)
    pull, mine = linked.manager.pull_cache, target(linked.manager)
    for name in ("src_cache_offset", "dst_cache_offset"):
        with pytest.raises(ValueError, match=name):
            pull(KEY, mine, **{name: -1})
        with pytest.raises(TypeError, match=name):
            pull(KEY, mine, **{name: "0"})
    for size in (0, -2):
        invalid(pull, KEY, mine, 0, size)
    with pytest.raises(ValueError, match="out of range"):
        pull(KEY, mine, 0, 2**63)
    with pytest.raises(ValueError, match="out of range"):
        pull(KEY, mine, -1)
    invalid(pull, KEY, mine, SLOTS)
