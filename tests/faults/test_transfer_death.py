"""A layer-wise transfer meets a decoder that dies, stops, unlinks or frees its caches, and addresses that are wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import LLMStatusCode
from tests import datadist_member as dd
from tests.integration.test_links import links, wait_for_links
from tests.integration.test_transfer import (
    OLD,
    addresses,
    go,
    results,
    run,
    target,
    transfer,
    wait_for_no_threads,
    wait_until_asked,
)
from tests.pair import DECODER, PROMPT, Pair, start_decoder, start_prompt
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK
LINKED = (OK, [OK])
LITTLE = 1.0  # seconds that a call may take beyond its deadline on a busy machine
PROMPT_TIMEOUT_S = 1.0  # sync_kv_timeout of the pair's prompt
MIB = 1 << 20
LARGE = (1, 8 * MIB)


def offer(member: Member, tensors: int, shape: tuple[int, int]) -> int:
    cache = member.call(dd.allocate, tensors, shape)
    member.call(dd.fill, cache, 1)
    return int(cache)


def transfer_until_it_fails(state: dd.State, cache_id: int, config: Any) -> LLMStatusCode | None:
    """Send the cache again and again; gives the code of the transfer that failed."""
    while True:
        transfer(state, cache_id, [config])
        (code,) = results(state)
        if code is not OK:
            return code
        state["transfers"] = state.get("transfers", 0) + 1


def transfers_so_far(state: dd.State) -> int:
    return int(state.get("transfers", 0))


def start_large_transfers(pair: Pair, tensors: int = 2) -> tuple[Any, int]:
    """Keep the prompt sending; gives the call and the decoder's cache."""
    cache = offer(pair.prompt, tensors, LARGE)
    mine, addrs = target(pair.decoder, tensors, LARGE)
    call = pair.prompt.start(transfer_until_it_fails, cache, (DECODER, addrs, None, 0))
    deadline = time.monotonic() + 20
    while pair.prompt.call(transfers_so_far) < 2:
        assert time.monotonic() < deadline, "the transfers do not go on"
    return call, mine


# ---- the decoder goes


def test_decoder_killed_while_the_model_computes(pair: Pair) -> None:
    cache = offer(pair.prompt, 4, (1, 4096))
    _, addrs = target(pair.decoder, 4, (1, 4096))
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0), (99, addrs[2:], range(1, 2), 0)], hold=[1])
    pair.prompt.call(wait_until_asked, 1)
    pair.decoder.kill()
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])
    started = time.monotonic()
    pair.prompt.call(go)
    assert pair.prompt.call(results) == [TIMEOUT, None]
    assert time.monotonic() - started < PROMPT_TIMEOUT_S + LITTLE
    wait_for_no_threads(pair.prompt)


def test_decoder_killed_while_bytes_move(pair: Pair) -> None:
    call, _ = start_large_transfers(pair)
    pair.decoder.kill()
    killed = time.monotonic()
    assert call.result() is TIMEOUT
    assert time.monotonic() - killed < PROMPT_TIMEOUT_S + LITTLE
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", pair.transport)])
    pair.prompt.call(dd.deallocate, 1)
    assert pair.prompt.call(dd.pool_used) == 0
    wait_for_no_threads(pair.prompt)


def test_a_killed_decoder_comes_back_and_receives(pair: Pair, members: Callable[[str], Member]) -> None:
    call, _ = start_large_transfers(pair)
    pair.decoder.kill()
    assert call.result() is TIMEOUT
    decoder = start_decoder(members("decoder again"))
    deadline = time.monotonic() + 5
    while (answer := decoder.call(dd.link, PROMPT, pair.port)) != LINKED:
        assert answer[0] is LLMStatusCode.LLM_LINK_FAILED
        assert time.monotonic() < deadline
    mine, addrs = target(decoder, 2, LARGE)
    assert run(pair, 1, [(DECODER, addrs, None, 0)]) == [OK]
    assert decoder.call(dd.read, mine, 1) == dd.payload(1, 1, LARGE[1]).tobytes()


def test_a_stopped_decoder_costs_a_transfer_no_more_than_its_timeout(pair: Pair) -> None:
    cache = offer(pair.prompt, 2, (1, 4096))
    mine, addrs = target(pair.decoder, 2, (1, 4096))
    pair.decoder.stop()
    started = time.monotonic()
    (code,) = run(pair, cache, [(DECODER, addrs, None, 0)])
    assert code in (OK, TIMEOUT)
    assert time.monotonic() - started < PROMPT_TIMEOUT_S + LITTLE
    pair.decoder.cont()
    if code is OK:
        assert pair.decoder.call(dd.read, mine, 1) == dd.payload(1, 1, 4096).tobytes()


def test_prompt_killed_while_bytes_move(pair: Pair) -> None:
    """The decoder keeps its caches, may free them, and takes what comes next."""
    other = pair.decoder.call(dd.allocate, 2, (1, 4096))
    pair.decoder.call(dd.fill, other, 3)
    _, mine = start_large_transfers(pair)
    pair.prompt.kill()
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", pair.transport)])
    pair.decoder.call(dd.deallocate, mine)
    deadline = time.monotonic() + 5
    while pair.decoder.call(dd.pool_used) != 8192:
        assert time.monotonic() < deadline, "the memory of the dead prompt's destination is not given back"
    again = pair.decoder.call(dd.allocate, 2, LARGE)
    pair.decoder.call(dd.fill, again, 4)
    assert pair.decoder.call(dd.read, again, 0) == dd.payload(4, 0, LARGE[1]).tobytes()
    assert pair.decoder.call(dd.read, other, 1) == dd.payload(3, 1, 4096).tobytes()
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port, force=True) == LINKED


def test_a_layer_that_takes_too_long(members: Callable[[str], Member], free_port: Callable[[], int]) -> None:
    port = free_port()
    prompt = start_prompt(members("prompt"), port, sync_kv_timeout=2, pool_bytes=160 * MIB)
    decoder = start_decoder(members("decoder"), pool_bytes=160 * MIB)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    pair = Pair(prompt, decoder, port)
    large, small = (1, 64 * MIB), (1, 4096)
    cache, little = offer(prompt, 2, large), offer(prompt, 2, small)
    _, addrs = target(decoder, 2, large)
    mine, little_addrs = target(decoder, 2, small)
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [TIMEOUT]
    deadline = time.monotonic() + 5
    while run(pair, little, [(DECODER, little_addrs, None, 0)]) != [OK]:  # 2 ms are little on a busy machine
        assert time.monotonic() < deadline, "the link is of no use after a timeout"
    assert decoder.call(dd.read, mine, 1) == dd.payload(1, 1, 4096).tobytes()


# ---- the decoder takes away what a transfer needs


def test_decoder_frees_the_destination_while_bytes_move(pair: Pair) -> None:
    call, mine = start_large_transfers(pair)
    pair.decoder.call(dd.deallocate, mine)
    assert call.result() is INVALID
    deadline = time.monotonic() + 5
    while pair.decoder.call(dd.pool_used):
        assert time.monotonic() < deadline
    again = pair.decoder.call(dd.allocate, 2, LARGE)  # the same memory, and nobody writes into it any more
    pair.decoder.call(dd.fill, again, 4)
    for tensor in range(2):
        assert pair.decoder.call(dd.read, again, tensor) == dd.payload(4, tensor, LARGE[1]).tobytes()
    assert pair.prompt.call(links) == [(DECODER, "LINKED", pair.transport)]


@pytest.mark.parametrize("force", [False, True])
def test_decoder_unlinks_while_bytes_move(pair: Pair, force: bool) -> None:
    """After the unlink nobody writes into the decoder's memory any more."""
    call, mine = start_large_transfers(pair)
    deadline = time.monotonic() + 10
    while (answer := pair.decoder.call(dd.unlink, PROMPT, pair.port, force=force)) != LINKED:
        assert answer[1] == [LLMStatusCode.LLM_LINK_BUSY]
        assert time.monotonic() < deadline
    for round_number in range(20):
        pair.decoder.call(dd.fill, mine, round_number)
        for tensor in range(2):
            assert pair.decoder.call(dd.read, mine, tensor) == dd.payload(round_number, tensor, LARGE[1]).tobytes()
    assert call.result() in (NOT_LINKED, TIMEOUT)


def test_decoder_finalizes_while_bytes_move(pair: Pair) -> None:
    call, _ = start_large_transfers(pair)
    pair.decoder.call(dd.finalize)
    assert call.result() in (NOT_LINKED, TIMEOUT, INVALID)  # its caches may go before word of its link comes
    wait_for_no_threads(pair.prompt)


# ---- wrong addresses


def test_bytes_are_written_where_they_may_be_or_nowhere(pair: Pair) -> None:
    """Many addresses in and around the decoder's caches: each transfer writes all of its bytes, or none at all."""
    chosen = random.Random(20)
    size, slots = 1024, 3
    nbytes = size * slots
    cache = offer(pair.prompt, 2, (slots, size))
    source = [dd.payload(1, tensor, nbytes).reshape(slots, size) for tensor in range(2)]
    caches = {}
    for index in range(6):
        mine, addrs = target(pair.decoder, 2, (slots, size))
        caches[mine] = addrs
        if index % 3 == 1:
            pair.decoder.call(dd.deallocate, mine)
            del caches[mine]
    wanted = {
        address: dd.payload(OLD, tensor, nbytes).copy()
        for addrs in caches.values()
        for tensor, address in enumerate(addrs)
    }
    first, last = min(wanted), max(wanted) + nbytes
    outcomes = {OK: 0, INVALID: 0}
    for _ in range(200):
        slot = chosen.randrange(slots)
        near = [chosen.choice(sorted(wanted)) + chosen.randint(-size, nbytes) for _ in range(2)]
        addrs = [chosen.choice([near[tensor], near[tensor], chosen.randint(first - size, last)]) for tensor in range(2)]
        starts = [
            next((start for start in wanted if start <= address and address + size <= start + nbytes), None)
            for address in addrs
        ]
        (code,) = run(pair, cache, [(DECODER, addrs, None, slot)])
        assert code is (INVALID if None in starts else OK), f"addresses {addrs} of {sorted(wanted)}"
        outcomes[code] += 1
        if code is OK:
            for tensor, (address, start) in enumerate(zip(addrs, starts)):
                wanted[start][address - start : address - start + size] = source[tensor][slot]
    assert min(outcomes.values()) > 20, "the choice of addresses meets both"
    for mine, addrs in caches.items():
        assert pair.decoder.call(addresses, mine) == addrs
        for tensor, address in enumerate(addrs):
            got = np.frombuffer(pair.decoder.call(dd.read, mine, tensor), np.uint8)
            np.testing.assert_array_equal(got, wanted[address])
