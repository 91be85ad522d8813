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
SUMMED = {**FORCED, "LLM_DATADIST_DATA_CHECKSUM": "crc32c"}
PEER_OPTIONS = {NIXL: {"UCX_TLS": TRANSPORT}, MOONCAKE: {}}

OF_IPERF = 0.9
TIMES_PEER = {NIXL: 4.0, MOONCAKE: 1.7}
OF_CONTIGUOUS = 0.8
MOST_SLOWER = 1.10  # while the prompt holds its interpreter lock
SMALL_MOST_US = 120.0
SMALL_RUNS = 400  # in a round
LARGE_RUNS = 3
WARM_UP = 20


def measure(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Pull large and small from a prompt that shares no memory with the decoder."""
    del limits  # memory is not what bounds these
    with ExitStack() as opened:
        others = [opened.enter_context(PeerReads(peer.name, peer.python, PEER_OPTIONS[peer.name])) for peer in peers]
        datadist, connection = opened.enter_context(_pair(FORCED, idle_caches=ROUNDS * (WARM_UP + SMALL_RUNS)))
        puller = Puller(datadist.kv_cache_manager)
        rows = [*_large(puller, others, connection), *_small(puller.operation(ONE_BLOCK), connection)]
        yield from rows
        yield _consuming(datadist.kv_cache_manager)
    unsummed = {row.name: row.median for row in rows}
    with _pair(SUMMED) as (datadist, _):
        yield from _summed(Puller(datadist.kv_cache_manager), unsummed)


@contextmanager
def _pair(variables: dict[str, str], idle_caches: int = 0) -> Iterator[tuple[LLMDataDist, Connection]]:
    """Link a pair over TCP, with variables in the environment of both."""
    with _environment(variables), linked_pair(OFFERS, idle_caches=idle_caches) as (datadist, connection):
        found = [link.transport for link in describe_links(datadist)]
        if found != [TRANSPORT]:
            raise RuntimeError(f"the link is over {found}, and shall be over {TRANSPORT}")
        yield datadist, connection


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


def _large(puller: Puller, others: list[PeerReads], connection: Connection) -> Iterator[Row]:
    """Measure contiguous and scattered pulls in rounds with all others, and with the prompt's lock held."""
    works = (CONTIGUOUS, BLOCKS_64K)
    ours = {work: _Rounds(work, []) for work in works}
    theirs = {work: PeerRounds(others, work) for work in works}
    held = _Rounds(CONTIGUOUS, [])
    stream = _Rounds(CONTIGUOUS, [])
    for _ in range(ROUNDS):
        if iperf.is_there():
            stream.rounds.append([CONTIGUOUS.nbytes / iperf.bytes_per_s() * 1e6])
        for work in works:
            ours[work].rounds.append(time_us(puller.operation(work), LARGE_RUNS))
            theirs[work].run()
        with holding(connection, HELD_IN_C):
            held.rounds.append(time_us(puller.operation(CONTIGUOUS), LARGE_RUNS))
    contiguous, blocks = ours[CONTIGUOUS], ours[BLOCKS_64K]
    targets = [*_beside_iperf(contiguous, stream), *_beside_peers(contiguous, theirs[CONTIGUOUS])]
    yield _row(_name(CONTIGUOUS), contiguous, targets)
    ratio = blocks.gb_per_s / contiguous.gb_per_s
    yield _row(_name(BLOCKS_64K), blocks, [Target("of contiguous", ratio, OF_CONTIGUOUS, at_least=True)])
    slower = Target("x idle", contiguous.gb_per_s / held.gb_per_s, MOST_SLOWER, at_least=False)
    yield _row(f"{_name(CONTIGUOUS)}, held in a {HELD_IN_C}", held, [slower])
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


def _name(work: Work) -> str:
    return f"over TCP: {work.name}"


def _row(name: str, rounds: _Rounds, targets: Sequence[Target]) -> Row:
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
        name = _name(ONE_BLOCK)
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


def _summed(puller: Puller, unsummed: dict[str, float]) -> Iterator[Row]:
    """Measure pulls whose bytes are summed and compared at both ends."""
    for work in (CONTIGUOUS, BLOCKS_64K, ONE_BLOCK):
        taken = time_us(puller.operation(work), SMALL_RUNS if work.is_small else ROUNDS * LARGE_RUNS)
        times = statistics.median(taken) / unsummed[_name(work)]
        yield Row(TOPIC, f"{_name(work)}, with CRC-32C", taken, work.nbytes, note=f"{times:.2f} x without")


def _pull_next(manager: KvCacheManager, cache: KvCache, requests: Iterator[int]) -> None:
    manager.pull_cache(CacheKey(PROMPT, next(requests)), cache)


def _latency(name: str, taken: Sequence[float], nbytes: int) -> Row:
    median = Target("us median", statistics.median(taken), SMALL_MOST_US, at_least=False)
    return Row(TOPIC, name, taken, nbytes, targets=(median,), note=f"{np.quantile(taken, 0.99):.0f} us p99")
