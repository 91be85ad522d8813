"""The five pulls while the interpreter lock of the prompt is held, each beside the same pull from an idle prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from .limits import ROUNDS
from .measurement import Row, Target, time_us
from .prompt_process import HELD_IN_C, HELD_IN_PYTHON, holding, linked_pair
from .work import ALL, OFFERS, Puller

TOPIC = "held prompt"
MOST_SLOWER = 1.10


def measure() -> Iterator[Row]:
    """Pull in rounds from the prompt idle, then held.

    A Python loop keeps one core busy, so it takes from the copy what that core would have brought; only the C call,
    which sleeps, shows what the lock itself costs. The row of the loop has no target.
    """
    with linked_pair(OFFERS) as (datadist, connection):
        puller = Puller(datadist.kv_cache_manager)
        for work in ALL:
            for way in (HELD_IN_C, HELD_IN_PYTHON):
                idle: list[float] = []
                held: list[float] = []
                pull, runs = partial(puller.pull, work), -(-work.runs // ROUNDS)
                for _ in range(ROUNDS):
                    idle += time_us(pull, runs)
                    with holding(connection, way):
                        held += time_us(pull, runs)
                times = statistics.median(held) / statistics.median(idle)
                targets = (Target("x idle", times, MOST_SLOWER, at_least=False),) if way == HELD_IN_C else ()
                note = "" if targets else f"{times:.2f} x idle"
                yield Row(TOPIC, f"held in a {way}: {work.name}", held, work.nbytes, targets=targets, note=note)
