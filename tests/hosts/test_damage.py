"""A network that changes bytes behind the back of TCP, whose checksum is weak: a checksum over the data notices."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheKey, LLMStatusCode
from tests import datadist_member as dd
from tests.conformance.expectations import outcome
from tests.hosts.instances import DECODER, LINKED, MIB, OK, PROMPT, Apart, start_apart
from tests.hosts.network import Network
from tests.hosts.wire import Quality
from tests.integration.test_transfer import addresses, results, target, transfer

CHECKED = {"llm.DataChecksum": "crc32c"}
SOME = Quality(damage=0.0005)  # of segments of 1.4 KiB: about one in each 3 MiB
NBYTES = MIB
TIMES = 15


@pytest.fixture
def apart(network: Network) -> Apart:
    return start(network, CHECKED)


def start(network: Network, options: dict[str, str]) -> Apart:
    near, far = network.add_host("near"), network.add_host("far", Quality())
    apart = start_apart(network, far, near, ge_options=options)
    assert apart.link() == LINKED
    far.change_wire(SOME)
    return apart


def is_right(apart: Apart, cache: int, seed: int) -> bool:
    return all(
        apart.decoder.call(dd.read, cache, tensor) == dd.payload(seed, tensor, NBYTES).tobytes() for tensor in range(2)
    )


def relink(apart: Apart) -> None:
    """Make the link anew if it broke, which damage to something else than the caches may do."""
    apart.unlink()
    apart.link()


def assert_damaged(apart: Apart, codes: list[LLMStatusCode]) -> None:
    assert apart.decoder_host.carried().damaged > 0
    assert OK in codes
    assert len(set(codes)) > 1, "no damage was noticed"


def test_damage_is_done(network: Network) -> None:
    """Without a checksum pulls bring what has arrived."""
    apart = start(network, {})
    mine = apart.decoder.call(dd.allocate, 2, (1, NBYTES))
    wrong = 0
    for req_id in range(1, TIMES):
        apart.prompt.call(dd.deallocate, apart.offer(req_id, req_id, NBYTES))
        if outcome(apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, req_id), mine) is OK:
            wrong += not is_right(apart, mine, req_id)
    assert 0 < wrong <= apart.decoder_host.carried().damaged


def test_pulls(apart: Apart) -> None:
    """One that reports success has brought the right bytes; one that fails leaves its key."""
    mine = apart.decoder.call(dd.allocate, 2, (1, NBYTES))
    codes = []
    for req_id in range(1, TIMES):
        apart.prompt.call(dd.deallocate, apart.offer(req_id, req_id, NBYTES))
        for _ in range(10):
            codes.append(outcome(apart.decoder.call, dd.pull_cache, CacheKey(PROMPT, req_id), mine))
            if codes[-1] is OK:
                break
            relink(apart)
        assert codes[-1] is OK, "never pulled"
        assert is_right(apart, mine, req_id)
    assert_damaged(apart, codes)


def test_long_block_tables(apart: Apart) -> None:
    """A damaged table of blocks must not bring other blocks; there are so many that a wrong number may well exist."""
    block, count = 4, 1 << 16
    key = BlocksCacheKey(PROMPT, 4)
    cache = apart.prompt.call(dd.allocate_blocks, 1, (count, block), key=key)
    apart.prompt.call(dd.fill, cache, 1)
    mine = apart.decoder.call(dd.allocate_blocks, 1, (count, block))
    blocks = dd.payload(1, 0, count * block).reshape(count, block)
    apart.decoder_host.change_wire(Quality(damage=0.002))  # about one a pull
    chosen, codes = random.Random(1), []
    for _ in range(40):
        source = chosen.sample(range(count), count)
        codes.append(outcome(apart.decoder.call, dd.pull_blocks, key, mine, source, list(range(count))))
        if codes[-1] is OK:
            got = np.frombuffer(apart.decoder.call(dd.read, mine, 0), np.uint8).reshape(count, block)
            assert int((got != blocks[source]).any(axis=1).sum()) == 0, "wrong blocks"
        else:
            relink(apart)
    assert_damaged(apart, codes)


def test_transfers(apart: Apart) -> None:
    cache = apart.prompt.call(dd.allocate, 2, (1, NBYTES))
    mine, _ = target(apart.decoder, 2, (1, NBYTES))
    codes = []
    for seed in range(1, TIMES):
        apart.prompt.call(dd.fill, cache, seed)
        apart.prompt.call(transfer, cache, [(DECODER, apart.decoder.call(addresses, mine), None, 0)])
        codes += apart.prompt.call(results)
        if codes[-1] is OK:
            assert is_right(apart, mine, seed)
        else:
            relink(apart)
    assert_damaged(apart, codes)
