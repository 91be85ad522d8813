"""Pulls over TCP on the loopback, in turn with iperf3, NIXL over UCX's tcp and Mooncake's tcp."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import CacheKey, KvCache, KvCacheManager, LLMDataDist
from llm_datadist.introspection import describe_links

from . import iperf
from .limits import ROUNDS, Limits
from .measurement import Operation, Row, Target, time_us
from .peer_reads import MOONCAKE, NIXL, PeerReads, PeerRounds
from .prompt_process import HELD_IN_C, HELD_IN_PYTHON, IDLE, PROMPT, holding, linked_pair
from .work import BLOCKS_64K, CONTIGUOUS, OFFERS, ONE_BLOCK, Puller, Work

TOPIC = "network"
TRANSPORT = "tcp"
FORCED = {"LLM_DATADIST_TRANSPORT": TRANSPORT}
PEER_OPTIONS = {NIXL: {"UCX_TLS": TRANSPORT}, MOONCAKE: {}}

OF_IPERF = 0.9
TIMES_PEER = {NIXL: 4.0, MOONCAKE: 1.7}
OF_CONTIGUOUS = 0.8
SMALL_MOST_US = 120.0
SMALL_RUNS = 400  # in a round
LARGE_RUNS = 3
WARM_UP = 20


def measure(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Pull large and small from a prompt that shares no memory with the decoder."""
    del limits  # memory is not what bounds these
    with ExitStack() as opened:
        others = [opened.enter_context(PeerReads(peer.name, peer.python, PEER_OPTIONS[peer.name])) for peer in peers]
        opened.enter_context(_environment(FORCED))
        consumed = ROUNDS * SMALL_RUNS + WARM_UP * ROUNDS
        datadist, connection = opened.enter_context(linked_pair(OFFERS, idle_caches=consumed))
        _require_tcp(datadist)
        puller = Puller(datadist.kv_cache_manager)
        yield from _large(puller, others)
        yield from _small(puller.operation(ONE_BLOCK), connection)
        yield _consuming(datadist.kv_cache_manager)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _require_tcp(datadist: LLMDataDist) -> None:
    found = [link.transport for link in describe_links(datadist)]
    if found != [TRANSPORT]:
        raise RuntimeError(f"the link is over {found}, and shall be over {TRANSPORT}")


@dataclass
class _Rounds:
    """Microseconds of all runs of one contender, round by round."""

    work: Work
    rounds: list[list[float]]

    @property
    def values(self) -> list[float]:
        return [value for values in self.rounds for value in values]

    @property
    def gb_per_s(self) -> float:
        return self.work.nbytes / statistics.median(self.values) / 1e3

    @property
    def note(self) -> str:
        """Say what each round came to."""
        speeds = (self.work.nbytes / statistics.median(values) / 1e3 for values in self.rounds)
        return "rounds " + " ".join(f"{speed:.2f}" for speed in speeds) + " GB/s"


def _large(puller: Puller, others: list[PeerReads]) -> Iterator[Row]:
    """Measure contiguous and scattered pulls in rounds with all others."""
    works = (CONTIGUOUS, BLOCKS_64K)
    ours = {work: _Rounds(work, []) for work in works}
    theirs = {work: PeerRounds(others, work) for work in works}
    stream = _Rounds(CONTIGUOUS, [])
    for _ in range(ROUNDS):
        if iperf.is_there():
            stream.rounds.append([CONTIGUOUS.nbytes / iperf.bytes_per_s() * 1e6])
        for work in works:
            ours[work].rounds.append(time_us(puller.operation(work), LARGE_RUNS))
            theirs[work].run()
    contiguous, blocks = ours[CONTIGUOUS], ours[BLOCKS_64K]
    targets = [*_beside_iperf(contiguous, stream), *_beside_peers(contiguous, theirs[CONTIGUOUS])]
    yield _row(contiguous, targets)
    ratio = blocks.gb_per_s / contiguous.gb_per_s
    yield _row(blocks, [Target("of contiguous", ratio, OF_CONTIGUOUS, at_least=True)])
    if stream.rounds:
        yield Row(TOPIC, "iperf3, one stream, 256 MiB of it", stream.values, CONTIGUOUS.nbytes, note=stream.note)
    for work in works:
        for name, times in theirs[work].times.items():
            yield Row(TOPIC, f"{name} over TCP: {work.name}", times.transfer_us, work.nbytes)


def _beside_iperf(ours: _Rounds, stream: _Rounds) -> list[Target]:
    if not stream.rounds:
        return []
    return [Target("x iperf3", ours.gb_per_s / stream.gb_per_s, OF_IPERF, at_least=True)]


def _beside_peers(ours: _Rounds, theirs: PeerRounds) -> list[Target]:
    targets = []
    for name, bound in TIMES_PEER.items():
        times = theirs.times_ours(name, statistics.median(ours.values))
        if times is not None:
            targets.append(Target(f"x {name}", times, bound, at_least=True))
    return targets


def _row(rounds: _Rounds, targets: Sequence[Target]) -> Row:
    name = f"over TCP: {rounds.work.name}"
    return Row(TOPIC, name, rounds.values, rounds.work.nbytes, targets=tuple(targets), note=rounds.note)


def _small(pull: Operation, connection: Connection) -> Iterator[Row]:
    """Measure a small pull from a prompt that is idle, and from one that holds its interpreter lock."""
    taken: dict[str | None, list[float]] = {None: [], HELD_IN_C: [], HELD_IN_PYTHON: []}
    for _ in range(ROUNDS):
        taken[None] += time_us(pull, SMALL_RUNS, WARM_UP)
        for way in (HELD_IN_C, HELD_IN_PYTHON):
            with holding(connection, way):
                taken[way] += time_us(pull, SMALL_RUNS, WARM_UP)
    for held, values in taken.items():
        name = f"over TCP: {ONE_BLOCK.name}"
        yield _latency(name if held is None else f"{name}, held in a {held}", values, ONE_BLOCK.nbytes)


def _consuming(manager: KvCacheManager) -> Row:
    """Measure pulls of ordinary keys, each of which is released."""
    cache = manager.allocate_cache(IDLE)
    requests = itertools.count()
    pull = partial(_pull_next, manager, cache, requests)
    taken: list[float] = []
    for _ in range(ROUNDS):
        taken += time_us(pull, SMALL_RUNS, WARM_UP)
    nbytes = IDLE.num_tensors * IDLE.shape[1]
    return _latency(f"over TCP: pull_cache of an ordinary key, {nbytes} bytes", taken, nbytes)


def _pull_next(manager: KvCacheManager, cache: KvCache, requests: Iterator[int]) -> None:
    manager.pull_cache(CacheKey(PROMPT, next(requests)), cache)


def _latency(name: str, taken: Sequence[float], nbytes: int) -> Row:
    median = Target("us median", statistics.median(taken), SMALL_MOST_US, at_least=False)
    return Row(TOPIC, name, taken, nbytes, targets=(median,), note=f"{np.quantile(taken, 0.99):.0f} us p99")
