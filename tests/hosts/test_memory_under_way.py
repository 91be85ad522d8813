"""Memory of an owner whose bytes still wait to leave: it is reused only when they are no longer wanted."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import BlocksCacheKey, CacheKey
from tests import datadist_member as dd
from tests.conformance.backends import Backend
from tests.conformance.expectations import outcome
from tests.conformance.registering import State, manager_outcome
from tests.conformance.remote import payload_slot
from tests.hosts.instances import LINKED, MIB, OK, PROMPT, Apart, assert_bytes, cluster_at, link_apart
from tests.hosts.network import Network, wait_until
from tests.hosts.test_registered_memory import MEMORIES, ONE, by_id, start
from tests.processes import Call

STAYS = CacheKey(PROMPT, 2**64 - 1, 0, 9)  # a prefix key, which no pull consumes
BLOCKS = BlocksCacheKey(PROMPT, 4)
BLOCK = 64 << 10
NBYTES = MIB
SLOWLY = 2 * MIB  # bytes a second; two tensors take one
PART = 100_000
OLD, NEW = 3, 99  # seeds


@pytest.fixture
def apart(network: Network) -> Apart:
    """The prompt's pool has room for one cache: the next one lies in the same memory."""
    apart = link_apart(network, pool_bytes=2 * NBYTES)
    apart.prompt_host.limit(SLOWLY)
    return apart


def start_pull(apart: Apart, blocks: bool) -> tuple[int, int, Call]:
    """Begin a pull; gives the prompt's cache, the decoder's and the call."""
    shape = (NBYTES // BLOCK, BLOCK) if blocks else (1, NBYTES)
    if blocks:
        cache = apart.prompt.call(dd.allocate_blocks, 2, shape, key=BLOCKS)
        mine = apart.decoder.call(dd.allocate_blocks, 2, shape)
    else:
        cache = apart.prompt.call(dd.allocate, 2, shape, keys=[STAYS])
        mine = apart.decoder.call(dd.allocate, 2, shape)
    apart.prompt.call(dd.fill, cache, OLD)
    before = apart.decoder_host.received_bytes()
    if blocks:
        every = list(range(shape[0]))
        call = apart.decoder.start(dd.pull_blocks, BLOCKS, mine, every, every)
    else:
        call = apart.decoder.start(dd.pull_cache, STAYS, mine)
    apart.decoder_host.wait_until_received(PART, before)
    return cache, mine, call


def reuse(state: dd.State, cache_id: int, keys: list[CacheKey]) -> None:
    """Give a cache back and write another one where it was; wait until it can be had."""
    for key in keys:
        dd.remove_key(state, key)
    dd.deallocate(state, cache_id)
    while dd.pool_used(state):
        pass
    dd.fill(state, dd.allocate(state, 2, (1, NBYTES)), NEW)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_pull_that_succeeds_has_the_old_bytes(apart: Apart, blocks: bool) -> None:
    cache, mine, pulling = start_pull(apart, blocks)
    assert not pulling.done()
    apart.prompt.call(reuse, cache, [] if blocks else [STAYS])
    if outcome(pulling.result) is OK:
        assert_bytes(apart.decoder, mine, OLD, NBYTES)


def leave_and_overwrite(state: State, cluster_id: int, address: str, cache_id: int) -> Any:
    """Unlink by force, unregister a cache, and use its memory for something else; gives the answer of the unlink."""
    answer = state["datadist"].unlink_clusters([cluster_at(cluster_id, address)], 20_000, True)
    if answer == LINKED:
        registered = state["registered"][cache_id]
        state["datadist"].cache_manager.unregister_cache(cache_id)
        for index, tensor in enumerate(registered.tensors):
            tensor[:] = dd.payload(NEW, index, tensor.size).reshape(tensor.shape)
    return answer


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_memory_that_is_unregistered_after_a_forced_unlink(network: Network, memory: Backend) -> None:
    one, other = start(network, memory)
    shape = (1, NBYTES)
    theirs, mine = other.instance.register(2, shape, seed=OLD), one.instance.register(2, shape)
    other.host.limit(SLOWLY)
    before = one.host.received_bytes()
    pulling = one.instance.member.start(manager_outcome, "pull_cache", by_id(other, theirs), mine)
    one.host.wait_until_received(PART, before)
    wait_until(
        lambda: other.instance.call(leave_and_overwrite, ONE, one.host.ipv4, theirs.cache_id) == LINKED, "unlink", 20
    )
    if pulling.result() is OK:
        for tensor in range(2):
            assert one.instance.slot(mine, tensor, 0) == payload_slot(OLD, tensor, 0, shape)
