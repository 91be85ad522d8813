"""A process, or a whole host, is gone or stands still: the others get an error in time and go on."""

from __future__ import annotations

import pytest

from llm_datadist import CacheKey, LLMException, LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.conformance.expectations import outcome
from tests.hosts.instances import (
    DECODER,
    LINKED,
    MIB,
    OK,
    PORT,
    PROMPT,
    TIMEOUT,
    TIMEOUT_MS,
    Apart,
    answers_in_time,
    assert_bytes,
    fails_in_time,
    init,
    link_apart,
    wait_for_states,
)
from tests.hosts.network import Network, wait_until
from tests.hosts.test_partition import LARGE, PART, SLOWLY, start_large_pull
from tests.integration.test_transfer import addresses, results, target, transfer


@pytest.fixture
def apart(network: Network) -> Apart:
    return link_apart(network, pool_bytes=100 * MIB, sync_kv_timeout=TIMEOUT_MS)


def successor_of_prompt(apart: Apart) -> Apart:
    """Start a prompt at the address of the one that has died."""
    prompt = apart.prompt_host.start("prompt again")
    prompt.call(init, LLMRole.PROMPT, PROMPT, f"0.0.0.0:{PORT}", pool_bytes=100 * MIB)
    return apart._replace(prompt=prompt)


def successor_of_decoder(apart: Apart) -> Apart:
    """Start a decoder with the id of the one that has died, and link it."""
    decoder = apart.decoder_host.start("decoder again")
    decoder.call(init, LLMRole.DECODER, DECODER, pool_bytes=100 * MIB)
    after = apart._replace(decoder=decoder)
    wait_until(lambda: after.link() == LINKED, "link of the successor", 30)
    return after


# ---- killed: the kernel tells the other side


def test_a_killed_prompt_is_known_at_once(apart: Apart) -> None:
    apart.offer(7, seed=3)
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    apart.prompt.kill()
    wait_for_states(apart.decoder, ["BROKEN"], 5)
    fails_in_time(TIMEOUT, 0, apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, 7), mine)
    fails_in_time(TIMEOUT, 0, apart.decoder.call, dd.check_link, PROMPT)
    after = successor_of_prompt(apart)
    answers_in_time(TIMEOUT_MS, after.unlink, TIMEOUT_MS)
    assert after.link() == LINKED
    after.assert_works(1)


def test_a_prompt_killed_in_the_middle_of_a_pull(apart: Apart) -> None:
    pulling, _, _ = start_large_pull(apart, 7, 3)
    apart.prompt.kill()
    fails_in_time(TIMEOUT, TIMEOUT_MS, pulling.result)
    wait_for_states(apart.decoder, ["BROKEN"])
    apart.prompt_host.unlimit()
    after = successor_of_prompt(apart)
    answers_in_time(TIMEOUT_MS, after.unlink, TIMEOUT_MS)
    assert after.link() == LINKED
    after.assert_works(1)


def test_a_decoder_killed_in_the_middle_of_a_pull_leaves_the_key(apart: Apart) -> None:
    _, cache, _ = start_large_pull(apart, 7, 3)
    apart.decoder.kill()
    wait_for_states(apart.prompt, ["BROKEN"])
    apart.prompt_host.unlimit()
    apart.prompt.call(dd.deallocate, cache)  # only its key holds it
    after = successor_of_decoder(apart)
    after.pull_and_compare(7, 3, LARGE)
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 0, "memory given back")
    with pytest.raises(LLMException) as caught:
        after.pull_and_compare(7, 3, LARGE)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_a_killed_decoder_holds_no_memory(apart: Apart) -> None:
    _, cache, _ = start_large_pull(apart, 7, 3)
    apart.prompt.call(dd.remove_key, CacheKey(PROMPT, 7))
    apart.prompt.call(dd.deallocate, cache)
    apart.decoder.kill()
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 0, "memory given back")


def start_large_transfer(apart: Apart) -> tuple[int, int]:
    """Begin a transfer that lasts; gives the prompt's cache and the decoder's."""
    cache = apart.prompt.call(dd.allocate, 2, (1, LARGE))
    apart.prompt.call(dd.fill, cache, 1)
    mine, addrs = target(apart.decoder, 2, (1, LARGE))
    apart.prompt_host.limit(SLOWLY)
    before = apart.decoder_host.received_bytes()
    apart.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)])
    apart.decoder_host.wait_until_received(PART, before)
    return cache, mine


def test_a_decoder_killed_in_the_middle_of_a_transfer(apart: Apart) -> None:
    cache, _ = start_large_transfer(apart)
    apart.decoder.kill()
    assert answers_in_time(TIMEOUT_MS, apart.prompt.call, results) == [TIMEOUT]
    wait_for_states(apart.prompt, ["BROKEN"])
    apart.prompt_host.unlimit()
    apart.prompt.call(dd.deallocate, cache)
    assert apart.prompt.call(dd.pool_used) == 0
    successor_of_decoder(apart).assert_works(1)


def test_a_prompt_killed_in_the_middle_of_a_transfer(apart: Apart) -> None:
    """The decoder may free the destination and use its memory again: nobody writes there any more."""
    _, mine = start_large_transfer(apart)
    apart.prompt.kill()
    wait_for_states(apart.decoder, ["BROKEN"])
    apart.decoder.call(dd.deallocate, mine)
    wait_until(lambda: apart.decoder.call(dd.pool_used) == 0, "memory given back")
    again = apart.decoder.call(dd.allocate, 2, (1, LARGE))
    apart.decoder.call(dd.fill, again, 4)
    assert_bytes(apart.decoder, again, 4, LARGE)


# ---- stopped: the kernel says nothing, and takes what it has room for


def test_a_stopped_prompt_costs_no_more_than_the_timeout(apart: Apart) -> None:
    apart.offer(7, seed=3, nbytes=LARGE)
    mine = apart.decoder.call(dd.allocate, 2, (1, LARGE))
    apart.prompt.stop()
    fails_in_time(TIMEOUT, TIMEOUT_MS, apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, 7), mine)
    fails_in_time(TIMEOUT, TIMEOUT_MS, apart.decoder.call, dd.check_link, PROMPT)
    apart.prompt.cont()
    apart.wait_until_the_link_works(8)
    apart.pull_and_compare(7, 3, LARGE)


def test_a_prompt_stopped_in_the_middle_of_a_pull(apart: Apart) -> None:
    pulling, _, _ = start_large_pull(apart, 7, 3)
    apart.prompt.stop()
    fails_in_time(TIMEOUT, TIMEOUT_MS, pulling.result)
    apart.prompt.cont()
    apart.prompt_host.unlimit()
    apart.wait_until_the_link_works(8)
    apart.pull_and_compare(7, 3, LARGE)


def test_links_of_a_stopped_prompt(apart: Apart) -> None:
    apart.prompt.stop()
    _, each = answers_in_time(TIMEOUT_MS, apart.unlink, TIMEOUT_MS)
    assert each[0] in (TIMEOUT, LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED)
    overall, each = answers_in_time(TIMEOUT_MS, apart.link, TIMEOUT_MS)
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [TIMEOUT])
    apart.prompt.cont()
    wait_until(lambda: apart.link() == LINKED, "link", 30)
    apart.assert_works(1)


def test_a_decoder_stopped_in_the_middle_of_a_pull_holds_nobody_up(apart: Apart) -> None:
    """The prompt serves others meanwhile, and the stopped one may go on."""
    pulling, _, _ = start_large_pull(apart, 7, 3)
    apart.decoder.stop()
    apart.prompt_host.unlimit()
    other = apart.with_another_decoder(apart.network.add_host("other"))
    for req_id in range(10, 15):
        other.assert_works(req_id)
    apart.decoder.cont()
    code = outcome(pulling.result)
    assert code in (OK, TIMEOUT)
    if code is TIMEOUT:
        apart.wait_until_the_link_works(8)
        apart.pull_and_compare(7, 3, LARGE)


def test_a_stopped_decoder_costs_a_transfer_no_more_than_its_timeout(apart: Apart) -> None:
    cache, mine = start_large_transfer(apart)
    apart.decoder.stop()
    assert answers_in_time(2 * TIMEOUT_MS, apart.prompt.call, results) == [TIMEOUT]
    apart.prompt_host.unlimit()
    apart.decoder.cont()
    apart.wait_until_the_link_works(8)
    apart.prompt.call(transfer, cache, [(DECODER, apart.decoder.call(addresses, mine), None, 0)])
    assert apart.prompt.call(results) == [OK]
    assert_bytes(apart.decoder, mine, 1, LARGE)


# ---- the host vanishes: no word of it reaches anybody


@pytest.mark.parametrize("pulling", [False, True])
def test_the_host_of_the_prompt_vanishes_and_comes_back(apart: Apart, pulling: bool) -> None:
    if pulling:
        call, _, mine = start_large_pull(apart, 7, 3)
        apart.prompt_host.vanish()
        fails_in_time(TIMEOUT, TIMEOUT_MS, call.result)
    else:
        mine = apart.decoder.call(dd.allocate, 2, (1, LARGE))
        apart.prompt_host.vanish()
    fails_in_time(TIMEOUT, TIMEOUT_MS, apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, 7), mine)
    apart.prompt_host.come_back()
    successor_of_prompt(apart).wait_until_it_works(8)


@pytest.mark.parametrize("pulling", [False, True])
def test_the_host_of_the_decoder_vanishes_and_comes_back(apart: Apart, pulling: bool) -> None:
    """The prompt is told nothing, and yet takes the link of the successor."""
    if pulling:
        start_large_pull(apart, 7, 3)
        apart.decoder_host.vanish()
        apart.prompt_host.unlimit()
    else:
        apart.offer(7, 3, LARGE)
        apart.decoder_host.vanish()
    apart.decoder_host.come_back()
    after = successor_of_decoder(apart)
    after.pull_and_compare(7, 3, LARGE)
    after.assert_works(8)


def test_a_transfer_to_a_host_that_vanished(apart: Apart) -> None:
    start_large_transfer(apart)
    apart.decoder_host.vanish()
    assert answers_in_time(2 * TIMEOUT_MS, apart.prompt.call, results) == [TIMEOUT]


def test_a_prompt_unlinks_a_decoder_that_vanished(apart: Apart) -> None:
    apart.decoder_host.vanish()
    answer = answers_in_time(TIMEOUT_MS, apart.prompt.call, dd.unlink, DECODER, 1, TIMEOUT_MS)
    assert answer in (LINKED, (OK, [LLMStatusCode.LLM_NOT_YET_LINK]))
    wait_for_states(apart.prompt, [])
