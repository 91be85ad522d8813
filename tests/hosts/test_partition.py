"""The network between two hosts goes away and comes back: calls end in time, and work goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheKey, LLMStatusCode
from tests import datadist_member as dd
from tests.hosts.instances import (
    DECODER,
    ENOUGH_MS,
    LINKED,
    MIB,
    OK,
    PROMPT,
    TIMEOUT,
    TIMEOUT_MS,
    Apart,
    answers_in_time,
    assert_bytes,
    fails_in_time,
    link_apart,
    start_apart,
)
from tests.hosts.network import Network, wait_until
from tests.integration.test_transfer import results, target, transfer
from tests.processes import Call

LARGE = 8 * MIB  # bytes of a tensor
SLOWLY = 4 * MIB  # bytes that a host may send in a second, so that a large pull lasts
PART = 2 * MIB  # bytes after which a large pull is certainly under way, and certainly not done

Way = Callable[[Apart], Any]


class Cut:
    """A way to part two hosts, and back."""

    def __init__(self, name: str, cut: Way, heal: Way) -> None:
        self.name, self.cut, self.heal = name, cut, heal

    def __str__(self) -> str:
        return self.name


CUTS = [
    Cut("dropped", lambda at: at.network.part(at.prompt_host, at.decoder_host), lambda at: at.network.heal()),
    Cut("deaf-prompt", lambda at: at.prompt_host.ignore(at.decoder_host), lambda at: at.prompt_host.heed()),
    Cut("deaf-decoder", lambda at: at.decoder_host.ignore(at.prompt_host), lambda at: at.decoder_host.heed()),
    Cut("unplugged", lambda at: at.prompt_host.unplug(), lambda at: at.prompt_host.plug()),
    Cut("prompt-down", lambda at: at.prompt_host.take_down(), lambda at: at.prompt_host.take_up()),
    Cut("decoder-down", lambda at: at.decoder_host.take_down(), lambda at: at.decoder_host.take_up()),
]
every_cut = pytest.mark.parametrize("cut", CUTS, ids=str)


@pytest.fixture
def apart(network: Network) -> Apart:
    return link_apart(network, pool_bytes=100 * MIB, sync_kv_timeout=TIMEOUT_MS)


@every_cut
def test_a_pull_costs_no_more_than_its_timeout_and_goes_on_after_healing(apart: Apart, cut: Cut) -> None:
    apart.offer(7, seed=3)
    apart.assert_works(1)
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    cut.cut(apart)
    for _ in range(2):
        fails_in_time(TIMEOUT, TIMEOUT_MS, apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, 7), mine)
    fails_in_time(TIMEOUT, TIMEOUT_MS, apart.decoder.call, dd.check_link, PROMPT)
    cut.heal(apart)
    apart.wait_until_it_works(8)


@every_cut
def test_a_link_outlives_a_cut_of_a_few_seconds(apart: Apart, cut: Cut) -> None:
    """Pulls fail meanwhile; nobody has to make the link anew."""
    cut.cut(apart)
    apart.offer(7, seed=3)
    fails_in_time(TIMEOUT, TIMEOUT_MS, apart.pull_and_compare, 7, 3)
    cut.heal(apart)
    apart.wait_until_the_link_works(8)
    apart.pull_and_compare(7, 3)


def start_large_pull(apart: Apart, req_id: int, seed: int) -> tuple[Call, int, int]:
    """Begin a pull that lasts; gives the call, the prompt's cache and the decoder's."""
    cache = apart.offer(req_id, seed, LARGE)
    mine = apart.decoder.call(dd.allocate, 2, (1, LARGE))
    apart.prompt_host.limit(SLOWLY)
    before = apart.decoder_host.received_bytes()
    pulling = apart.decoder.start(dd.pull_cache, CacheKey(PROMPT, req_id), mine)
    apart.decoder_host.wait_until_received(PART, before)
    assert not pulling.done()
    return pulling, cache, mine


@every_cut
def test_a_cut_in_the_middle_of_a_pull_leaves_the_key_pullable(apart: Apart, cut: Cut) -> None:
    pulling, cache, mine = start_large_pull(apart, 7, 3)
    apart.prompt.call(dd.deallocate, cache)  # only its key holds it
    cut.cut(apart)
    fails_in_time(TIMEOUT, TIMEOUT_MS, pulling.result)
    cut.heal(apart)
    apart.prompt_host.unlimit()
    apart.wait_until_it_works(8)
    apart.decoder.call(dd.fill, mine, 99)
    apart.decoder.call(dd.pull_cache, CacheKey(PROMPT, 7), mine)
    assert_bytes(apart.decoder, mine, 3, LARGE)
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 4096 * 2, "memory given back")  # key 8's cache is held


@every_cut
def test_a_transfer_costs_no_more_than_its_timeout_and_goes_on_after_healing(apart: Apart, cut: Cut) -> None:
    cache = apart.prompt.call(dd.allocate, 2, (1, LARGE))
    apart.prompt.call(dd.fill, cache, 1)
    mine, addrs = target(apart.decoder, 2, (1, LARGE))
    apart.prompt_host.limit(SLOWLY)
    before = apart.decoder_host.received_bytes()
    apart.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)])
    apart.decoder_host.wait_until_received(PART, before)
    cut.cut(apart)
    assert answers_in_time(2 * TIMEOUT_MS, apart.prompt.call, results, 2 * TIMEOUT_MS) == [TIMEOUT]  # one a tensor
    cut.heal(apart)
    apart.prompt_host.unlimit()
    apart.wait_until_it_works(8)
    apart.decoder.call(dd.fill, mine, 99)
    apart.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)])
    assert apart.prompt.call(results) == [OK]
    assert_bytes(apart.decoder, mine, 1, LARGE)


@every_cut
def test_links_over_a_cut(network: Network, cut: Cut) -> None:
    prompt_host, decoder_host = network.add_host("left"), network.add_host("right")
    apart = start_apart(network, decoder_host, prompt_host, sync_kv_timeout=TIMEOUT_MS)
    cut.cut(apart)
    code, each = answers_in_time(TIMEOUT_MS, apart.link, TIMEOUT_MS)
    assert code is LLMStatusCode.LLM_LINK_FAILED
    assert each[0] in (TIMEOUT, LLMStatusCode.LLM_LINK_FAILED)
    cut.heal(apart)
    wait_until(lambda: apart.link() == LINKED, "link after healing", 60)
    apart.assert_works(1)
    cut.cut(apart)
    code, each = answers_in_time(TIMEOUT_MS, apart.unlink, TIMEOUT_MS)
    assert code is LLMStatusCode.LLM_UNLINK_FAILED
    assert each[0] in (TIMEOUT, LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED)
    assert answers_in_time(TIMEOUT_MS, apart.unlink, TIMEOUT_MS) == (OK, [LLMStatusCode.LLM_NOT_YET_LINK])
    cut.heal(apart)
    wait_until(lambda: apart.link() == LINKED, "link after healing", 60)
    apart.assert_works(2)


def test_a_forced_unlink_asks_nobody(apart: Apart) -> None:
    apart.network.part(apart.prompt_host, apart.decoder_host)
    assert answers_in_time(0, apart.unlink, ENOUGH_MS, force=True) == LINKED
    apart.network.heal()
    wait_until(lambda: apart.link() == LINKED, "link after healing", 60)
    apart.assert_works(1)


def test_a_short_cut_is_only_a_delay(network: Network) -> None:
    """The kernel sends again what was lost, so a pull with time enough does not notice."""
    apart = link_apart(network, pool_bytes=100 * MIB, sync_kv_timeout=60_000)
    pulling, _, mine = start_large_pull(apart, 7, 3)
    apart.network.part(apart.prompt_host, apart.decoder_host)
    arrived = apart.decoder_host.received_bytes()
    apart.network.heal()
    apart.prompt_host.unlimit()
    pulling.result(60)
    assert apart.decoder_host.received_bytes() > arrived
    assert_bytes(apart.decoder, mine, 3, LARGE)


def test_memory_that_a_lost_puller_was_reading_is_given_back(apart: Apart) -> None:
    """A puller that cannot be asked holds memory of the prompt no longer than its timeout."""
    pulling, cache, _ = start_large_pull(apart, 7, 3)
    apart.network.part(apart.prompt_host, apart.decoder_host)
    apart.prompt.call(dd.remove_key, CacheKey(PROMPT, 7))
    apart.prompt.call(dd.deallocate, cache)
    wait_until(lambda: apart.prompt.call(dd.pool_used) == 0, "memory given back")
    fails_in_time(TIMEOUT, TIMEOUT_MS, pulling.result)


def test_a_cut_to_one_decoder_is_nothing_to_another(network: Network) -> None:
    apart = link_apart(network, sync_kv_timeout=TIMEOUT_MS)
    other = apart.with_another_decoder(network.add_host("other"))
    apart.network.part(apart.prompt_host, apart.decoder_host)
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    cut_off = apart.decoder.start(dd.pull_cache, CacheKey(PROMPT, 7), mine)
    for req_id in range(10, 20):
        other.assert_works(req_id)
    fails_in_time(TIMEOUT, TIMEOUT_MS, cut_off.result)
