"""A network that delays, loses or takes little: everything arrives, later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from llm_datadist import BlocksCacheKey
from tests import datadist_member as dd
from tests.hosts.instances import (
    DECODER,
    LINKED,
    MIB,
    OK,
    PROMPT,
    TIMEOUT,
    TIMEOUT_MS,
    Apart,
    assert_bytes,
    fails_in_time,
    start_apart,
)
from tests.hosts.network import Network
from tests.hosts.wire import Quality
from tests.integration.test_transfer import results, target, transfer

KIB = 1 << 10
DELAY_S = 0.02  # each way


class Wire(NamedTuple):
    """A quality, and bytes that get through it in seconds."""

    quality: Quality
    nbytes: int
    most_s: float


WIRES = {
    "delay": Wire(Quality(delay_s=DELAY_S), 8 * MIB, 30),
    "loss": Wire(Quality(loss=0.01), 8 * MIB, 30),
    "delay-and-loss": Wire(Quality(delay_s=DELAY_S, loss=0.01), MIB, 60),
}


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> Wire:
    return WIRES[request.param]


@pytest.fixture
def apart(network: Network, wire: Wire) -> Iterator[Apart]:
    near, far = network.add_host("near"), network.add_host("far", wire.quality)
    apart = start_apart(network, far, near, sync_kv_timeout=60_000)
    assert apart.link() == LINKED
    yield apart
    if wire.quality.loss:
        assert far.carried().lost > 0, "the test has met no loss"


def test_pulls(apart: Apart, wire: Wire) -> None:
    apart.offer(7, 3, wire.nbytes)
    started = time.monotonic()
    apart.pull_and_compare(7, 3, wire.nbytes)
    seconds = time.monotonic() - started
    assert 2 * wire.quality.delay_s < seconds < wire.most_s
    for req_id in range(10, 20):
        apart.assert_works(req_id)


def test_a_small_pull_is_one_round_trip(apart: Apart, wire: Wire) -> None:
    """Its time is that of a request and its answer; losses cost a retransmission now and then."""
    cache = apart.prompt.call(dd.allocate_blocks, 2, (16, 16 * KIB), key=BlocksCacheKey(PROMPT))
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate_blocks, 2, (16, 16 * KIB))
    taken = []
    for _ in range(15):
        started = time.monotonic()
        apart.decoder.call(dd.pull_blocks, BlocksCacheKey(PROMPT), mine, [3], [4])
        taken.append(time.monotonic() - started)
    round_trip = 2 * wire.quality.delay_s
    assert round_trip <= min(taken) < 1.5 * round_trip + 0.02
    for tensor in range(2):
        wanted = dd.payload(1, tensor, 256 * KIB)[48 * KIB : 64 * KIB].tobytes()
        assert apart.decoder.call(dd.read, mine, tensor)[64 * KIB : 80 * KIB] == wanted


def test_transfers(apart: Apart, wire: Wire) -> None:
    cache = apart.prompt.call(dd.allocate, 4, (1, wire.nbytes // 2))
    apart.prompt.call(dd.fill, cache, 1)
    mine, addrs = target(apart.decoder, 4, (1, wire.nbytes // 2))
    started = time.monotonic()
    apart.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)])
    assert apart.prompt.call(results, 60_000) == [OK]
    assert time.monotonic() - started < wire.most_s
    assert_bytes(apart.decoder, mine, 1, wire.nbytes // 2, 4)


def test_links(apart: Apart) -> None:
    for req_id in range(1, 4):
        assert apart.unlink() == LINKED
        assert apart.link() == LINKED
        apart.decoder.call(dd.check_link, PROMPT)
        apart.assert_works(req_id)


def test_a_network_too_slow_for_the_timeout(network: Network) -> None:
    """The pull ends in time, its bytes are thrown away, and what fits into the timeout works afterwards."""
    left, right = network.add_host("left"), network.add_host("right")
    apart = start_apart(network, right, left, sync_kv_timeout=TIMEOUT_MS)
    assert apart.link() == LINKED
    left.limit(MIB)
    apart.offer(7, 3, 8 * MIB)
    for _ in range(2):
        fails_in_time(TIMEOUT, TIMEOUT_MS, apart.pull_and_compare, 7, 3, 8 * MIB)
    apart.wait_until_the_link_works(8)
    left.unlimit()
    apart.assert_works(9)
    apart.pull_and_compare(7, 3, 8 * MIB)
