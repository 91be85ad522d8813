"""The five pulls between two processes, and the reads of the same blocks by others in turn with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from .limits import Limits
from .measurement import Row, Target, time_us
from .peer_reads import NIXL, PeerReads, PeerRounds
from .prompt_process import linked_pair
from .work import ALL, OFFERS, Puller, Work

TOPIC = "pulls"


def measure(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Pull from an idle prompt."""
    with linked_pair(OFFERS) as (datadist, _):
        puller = Puller(datadist.kv_cache_manager)
        for work in ALL:
            yield from _measure(work, puller, limits, peers)


def _measure(work: Work, puller: Puller, limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Measure one piece of work in rounds of ours, the peers' and the limit."""
    rounds = PeerRounds(peers, work)

    def run_round() -> list[float]:
        taken = time_us(puller.operation(work), work.runs_a_round)
        rounds.run()
        return taken

    taken, limit_us = limits.around(work.nbytes, run_round)
    targets = _targets(work, taken, limit_us, rounds)
    yield Row(TOPIC, work.name, taken, work.nbytes, limit_us=None if work.is_small else limit_us, targets=targets)
    for name, times in rounds.times.items():
        yield Row(TOPIC, f"{name}: {work.name}", times.transfer_us, work.nbytes)
        if times.has_preparation:
            yield Row(TOPIC, f"{name} and its descriptors: {work.name}", times.total_us, work.nbytes)


def _targets(work: Work, taken: Sequence[float], limit_us: float, rounds: PeerRounds) -> tuple[Target, ...]:
    median = statistics.median(taken)
    targets = []
    if work.of_limit is not None:
        targets.append(Target("of the limit", limit_us / median, work.of_limit, at_least=True))
    if work.median_us is not None:
        targets.append(Target("us median", median, work.median_us, at_least=False))
    if work.p99_us is not None:
        p99 = float(np.quantile(taken, 0.99))
        targets.append(Target("us p99", p99, work.p99_us, at_least=False))
    times = rounds.times_ours(NIXL, median)
    if work.times_nixl is not None and times is not None:
        targets.append(Target("x NIXL", times, work.times_nixl, at_least=True))
    return tuple(targets)
