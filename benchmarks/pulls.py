"""The five pulls between two processes, and NIXL's reads of the same blocks in turn with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from .limits import Limits
from .measurement import Row, Target, time_us
from .nixl_reads import NixlReads, NixlTimes
from .prompt_process import linked_pair
from .work import ALL, OFFERS, Puller, Work

TOPIC = "pulls"


def measure(limits: Limits, nixl: NixlReads | None) -> Iterator[Row]:
    """Pull from an idle prompt."""
    with linked_pair(OFFERS) as (datadist, _):
        puller = Puller(datadist.kv_cache_manager)
        for work in ALL:
            yield from _measure(work, puller, limits, nixl)


def _measure(work: Work, puller: Puller, limits: Limits, nixl: NixlReads | None) -> Iterator[Row]:
    """Measure one piece of work in rounds of ours, NIXL's and the limit."""
    theirs = NixlTimes()

    def run_round() -> list[float]:
        taken = time_us(puller.operation(work), work.runs_a_round)
        if nixl is not None:
            theirs.add(nixl.read(work))
        return taken

    taken, limit_us = limits.around(work.nbytes, run_round)
    nixl_us = theirs.of(work) if nixl is not None else None
    targets = _targets(work, taken, limit_us, nixl_us)
    yield Row(TOPIC, work.name, taken, work.nbytes, limit_us=None if work.is_small else limit_us, targets=targets)
    if nixl is not None:
        yield Row(TOPIC, f"NIXL: {work.name}", theirs.transfer_us, work.nbytes)
        yield Row(TOPIC, f"NIXL and its descriptors: {work.name}", theirs.total_us, work.nbytes)


def _targets(work: Work, taken: Sequence[float], limit_us: float, nixl_us: float | None) -> tuple[Target, ...]:
    median = statistics.median(taken)
    targets = []
    if work.of_limit is not None:
        targets.append(Target("of the limit", limit_us / median, work.of_limit, at_least=True))
    if work.median_us is not None:
        targets.append(Target("us median", median, work.median_us, at_least=False))
    if work.p99_us is not None:
        p99 = statistics.quantiles(taken, n=100)[98]
        targets.append(Target("us p99", p99, work.p99_us, at_least=False))
    if work.times_nixl is not None and nixl_us is not None:
        targets.append(Target("x NIXL", nixl_us / median, work.times_nixl, at_least=True))
    return tuple(targets)
