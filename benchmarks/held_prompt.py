"""The five pulls while the interpreter lock of the prompt is held, each beside the same pull from an idle prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from multiprocessing.connection import Connection

from .limits import ROUNDS, Limits
from .measurement import Operation, Row, Target, time_us
from .prompt_process import HELD_IN_C, HELD_IN_PYTHON, holding, linked_pair
from .work import ALL, OFFERS, Puller, Work

TOPIC = "held prompt"
MOST_SLOWER = 1.10


def measure(limits: Limits) -> Iterator[Row]:
    """Pull in rounds from the prompt idle, then held.

    A Python loop keeps one core busy, so it takes from a large copy what that core would have brought; only the C call,
    which sleeps, shows what the lock itself costs. The rows of the loop have no target, but the limit beside the loop.
    """
    with linked_pair(OFFERS) as (datadist, connection):
        puller = Puller(datadist.kv_cache_manager)
        for work in ALL:
            for way in (HELD_IN_C, HELD_IN_PYTHON):
                yield _measure(work, way, puller.operation(work), connection, limits)


def _measure(work: Work, way: str, pull: Operation, connection: Connection, limits: Limits) -> Row:
    idle: list[float] = []
    held: list[float] = []
    limit: list[float] = []
    for _ in range(ROUNDS):
        idle += time_us(pull, work.runs_a_round)
        with holding(connection, way):
            held += time_us(pull, work.runs_a_round)
            limit += limits.sample(work.nbytes)
    times = statistics.median(held) / statistics.median(idle)
    targets, notes = [], []
    if way == HELD_IN_C:
        targets.append(Target("x idle", times, MOST_SLOWER, at_least=False))
    else:
        notes.append(f"{times:.2f} x idle")
    if not work.is_small:
        notes.append(f"{statistics.median(limit) / statistics.median(held):.2f} of the limit beside it")
    return Row(
        TOPIC,
        f"held in a {way}: {work.name}",
        held,
        work.nbytes,
        limit_us=None if work.is_small else statistics.median(limit),
        targets=tuple(targets),
        note=", ".join(notes),
    )
