"""A process is killed or stopped at some moment: its peers get an error in time, lose nothing, and go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheKey, LLMException, LLMStatusCode
from tests import datadist_member as dd
from tests.integration.test_links import links, wait_for_links
from tests.pair import DECODER, PROMPT, Pair, start_decoder, start_prompt
from tests.processes import Member

Members = Callable[[str], Member]
OK = LLMStatusCode.LLM_SUCCESS
LINKED = (OK, [OK])
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
MIB = 1 << 20
LITTLE = 1.0  # seconds that a call may take beyond its deadline on a busy machine


def offer(prompt: Member, req_id: int, seed: int, nbytes: int = 4096) -> int:
    cache = prompt.call(dd.allocate, 2, (1, nbytes), keys=[CacheKey(PROMPT, req_id)])
    prompt.call(dd.fill, cache, seed)
    return int(cache)


def assert_arrived(decoder: Member, cache: int, seed: int, nbytes: int = 4096) -> None:
    for tensor in range(2):
        assert decoder.call(dd.read, cache, tensor) == dd.payload(seed, tensor, nbytes).tobytes()


def timed(function: Callable[..., Any], *args: Any) -> tuple[LLMStatusCode, float]:
    """Status of a call that must fail, and how long it took."""
    started = time.monotonic()
    with pytest.raises(LLMException) as caught:
        function(*args)
    return caught.value.status_code, time.monotonic() - started


def test_prompt_killed_before_a_pull(pair: Pair) -> None:
    offer(pair.prompt, 1, seed=1)
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.prompt.kill()
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    code, seconds = timed(pair.decoder.call, dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert code is TIMEOUT
    assert seconds < LITTLE, "the kernel told at once, nobody waits for sync_kv_timeout"
    code, seconds = timed(pair.decoder.call, dd.check_link, PROMPT)
    assert code is TIMEOUT
    assert seconds < LITTLE


def test_a_killed_prompt_comes_back_on_the_same_port(pair: Pair, members: Members) -> None:
    offer(pair.prompt, 1, seed=1)
    pair.prompt.kill()
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == (OK, [LLMStatusCode.LLM_ALREADY_LINK])
    started = time.monotonic()
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == (
        LLMStatusCode.LLM_UNLINK_FAILED,
        [LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED],
    )
    assert time.monotonic() - started < LITTLE
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == (OK, [LLMStatusCode.LLM_NOT_YET_LINK])
    prompt = start_prompt(members("prompt again"), pair.port)
    offer(prompt, 1, seed=2)
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert_arrived(pair.decoder, mine, seed=2)


def test_an_unlink_meant_for_the_dead_prompt_does_not_touch_its_successor(pair: Pair, members: Members) -> None:
    pair.prompt.kill()
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    prompt = start_prompt(members("prompt again"), pair.port)
    other = start_decoder(members("other"), cluster_id=3)
    assert other.call(dd.link, PROMPT, pair.port) == LINKED
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == LINKED
    assert prompt.call(links) == [(3, "LINKED", pair.transport)]


def test_prompt_killed_after_a_pull(pair: Pair) -> None:
    offer(pair.prompt, 1, seed=1)
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    pair.prompt.kill()
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    assert_arrived(pair.decoder, mine, seed=1)


def pull_until_it_fails(state: dd.State, cache_id: int, seed: int, nbytes: int) -> tuple[int, LLMStatusCode]:
    """Pull the same prefix key again and again; every pull that succeeds must have delivered every byte."""
    wanted = [dd.payload(seed, tensor, nbytes) for tensor in range(2)]
    views = [dd.tensor_view(state["caches"][cache_id], tensor)[0] for tensor in range(2)]
    key = CacheKey(PROMPT, 2**64 - 1, 0, 9)
    pulls = 0
    while True:
        try:
            dd.pull_cache(state, key, cache_id)
        except LLMException as error:
            return pulls, error.status_code
        pulls += 1
        state["pulls"] = pulls
        for view, want in zip(views, wanted):
            np.testing.assert_array_equal(view[:: nbytes // 256], want[:: nbytes // 256])


def pulls_so_far(state: dd.State) -> int:
    return int(state.get("pulls", 0))


def wait_for_pulls(member: Member, at_least: int) -> None:
    deadline = time.monotonic() + 20
    while member.call(pulls_so_far) < at_least:
        assert time.monotonic() < deadline, "the pulls do not go on"


def start_large_pulls(pair: Pair, nbytes: int) -> Any:
    cache = pair.prompt.call(dd.allocate, 2, (1, nbytes), keys=[CacheKey(PROMPT, 2**64 - 1, 0, 9)])
    pair.prompt.call(dd.fill, cache, 4)
    mine = pair.decoder.call(dd.allocate, 2, (1, nbytes))
    call = pair.decoder.start(pull_until_it_fails, mine, 4, nbytes)
    wait_for_pulls(pair.decoder, 2)
    return call


def test_prompt_killed_during_pulls(pair: Pair) -> None:
    call = start_large_pulls(pair, 16 * MIB)
    killed = time.monotonic()
    pair.prompt.kill()
    pulls, code = call.result()
    assert time.monotonic() - killed < 5 + LITTLE
    assert pulls >= 2
    assert code is TIMEOUT
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port, force=True) == LINKED
    assert pair.decoder.call(dd.pool_used) == 32 * MIB  # the decoder lives, its caches too


def test_decoder_killed_during_pulls_releases_its_claims(pair: Pair) -> None:
    start_large_pulls(pair, 16 * MIB)
    pair.decoder.kill()
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])
    pair.prompt.call(dd.remove_key, CacheKey(PROMPT, 2**64 - 1, 0, 9))
    pair.prompt.call(dd.deallocate, 1)
    assert pair.prompt.call(dd.pool_used) == 0


def test_a_killed_decoder_comes_back_with_the_same_id(pair: Pair, members: Members) -> None:
    offer(pair.prompt, 1, seed=1)
    pair.decoder.kill()
    decoder = start_decoder(members("decoder again"))
    deadline = time.monotonic() + 5
    while (answer := decoder.call(dd.link, PROMPT, pair.port)) != LINKED:
        assert answer[0] is LLMStatusCode.LLM_LINK_FAILED
        assert time.monotonic() < deadline
    mine = decoder.call(dd.allocate, 2, (1, 4096))
    decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert_arrived(decoder, mine, seed=1)
    assert pair.prompt.call(links) == [(DECODER, "LINKED", pair.transport)]


def test_the_prompt_unlinks_a_dead_decoder(pair: Pair) -> None:
    pair.decoder.kill()
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])
    assert pair.prompt.call(dd.unlink, DECODER, pair.port) == LINKED
    assert pair.prompt.call(links) == []


@pytest.mark.parametrize("transport", ["shared_memory"], indirect=True)
def test_a_stopped_prompt_serves_pulls_and_costs_others_their_timeout(pair: Pair, members: Members) -> None:
    pair.prompt.call(dd.deallocate, offer(pair.prompt, 1, seed=1))  # the key alone holds it
    key = BlocksCacheKey(PROMPT)
    blocks = pair.prompt.call(dd.allocate_blocks, 2, (8, 64), key=key)
    pair.prompt.call(dd.fill, blocks, 3)
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    my_blocks = pair.decoder.call(dd.allocate_blocks, 2, (8, 64))
    other = start_decoder(members("other"), cluster_id=3, sync_kv_timeout=300)
    pair.prompt.stop()
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert_arrived(pair.decoder, mine, seed=1)
    pair.decoder.call(dd.pull_blocks, key, my_blocks, list(range(8)), list(range(8)))
    assert pair.decoder.call(dd.read, my_blocks, 1) == dd.payload(3, 1, 512).tobytes()
    started = time.monotonic()
    overall, each = other.call(dd.link, PROMPT, pair.port, 400)
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [TIMEOUT])
    assert 0.3 < time.monotonic() - started < 0.4 + LITTLE
    started = time.monotonic()
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port, 400) == (
        LLMStatusCode.LLM_UNLINK_FAILED,
        [TIMEOUT],
    )
    assert time.monotonic() - started < 0.4 + LITTLE
    assert pair.decoder.call(links) == []
    pair.prompt.cont()
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])  # the unlink never reached it
    assert pair.prompt.call(dd.pool_used) == 1024  # the pulled key is released, the blocks are not
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED


@pytest.mark.parametrize("transport", ["tcp"], indirect=True)
def test_a_stopped_prompt_costs_pulls_over_tcp_their_timeout(pair: Pair) -> None:
    offer(pair.prompt, 1, seed=5)
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.prompt.stop()
    code, seconds = timed(pair.decoder.call, dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert code is TIMEOUT
    assert 4.9 < seconds < 5 + LITTLE  # sync_kv_timeout
    pair.prompt.cont()
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)  # neither the link nor the key has gone
    assert_arrived(pair.decoder, mine, seed=5)
    assert pair.decoder.call(links) == [(PROMPT, "LINKED", pair.transport)]


def test_a_stopped_decoder_keeps_the_memory_that_it_reads(pair: Pair) -> None:
    """Memory under a claim is given back when the decoder goes on, not before, and nothing waits for it."""
    start_large_pulls(pair, 16 * MIB)
    pair.decoder.stop()
    started = time.monotonic()
    pair.prompt.call(dd.remove_key, CacheKey(PROMPT, 2**64 - 1, 0, 9))
    pair.prompt.call(dd.deallocate, 1)
    assert time.monotonic() - started < LITTLE
    assert pair.prompt.call(dd.pool_used) in (0, 32 * MIB)  # it was stopped between two pulls, or in one
    pair.decoder.cont()
    deadline = time.monotonic() + 10
    while pair.prompt.call(dd.pool_used):
        assert time.monotonic() < deadline


def test_a_prompt_that_finalizes_breaks_its_links(pair: Pair) -> None:
    offer(pair.prompt, 1, seed=1)
    mine = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.prompt.call(dd.finalize)
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    code, _ = timed(pair.decoder.call, dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert code is TIMEOUT


def test_processes_that_end_without_finalize_leave_with_status_0(pair: Pair) -> None:
    pair.decoder.leave()
    assert pair.decoder.exitcode == 0
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])
    pair.prompt.leave()
    assert pair.prompt.exitcode == 0


def finalize_during_pulls(state: dd.State, cache_id: int, nbytes: int) -> list[str]:
    """Finalize while another thread pulls: the pull ends in an error and the process lives."""
    endings: list[str] = []

    def pull() -> None:
        cache = state["caches"][cache_id]
        manager = dd.manager(state)
        try:
            while True:
                manager.pull_cache(CacheKey(PROMPT, 2**64 - 1, 0, 9), cache)
                state["pulls"] = state.get("pulls", 0) + 1
        except (LLMException, RuntimeError) as error:
            endings.append(type(error).__name__)

    thread = threading.Thread(target=pull)
    thread.start()
    deadline = time.monotonic() + 10
    while pulls_so_far(state) < 2 and time.monotonic() < deadline:
        thread.join(0.01)
    state["datadist"].finalize()
    thread.join(10)
    assert not thread.is_alive()
    return endings


def test_finalize_during_a_pull(pair: Pair) -> None:
    cache = pair.prompt.call(dd.allocate, 2, (1, 16 * MIB), keys=[CacheKey(PROMPT, 2**64 - 1, 0, 9)])
    pair.prompt.call(dd.fill, cache, 4)
    mine = pair.decoder.call(dd.allocate, 2, (1, 16 * MIB))
    assert pair.decoder.call(finalize_during_pulls, mine, 16 * MIB) == ["LLMException"]
