"""What the machine gives without any transfer: memory copied inside one process, in one thread and in several."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from llm_datadist._copy import copy_runs

from .measurement import Operation, Row, time_us

TOPIC = "limits"
MIB = 1 << 20
LARGEST = 256 * MIB
ROUNDS = 5
SAMPLES = 3  # of the limit, before each round and after the last one
_MINUTE_NS = 60 * 10**9


class Limits:
    """Two buffers of this process, and copies between them.

    Parameters
    ----------
    largest : int
        Bytes of a buffer.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self.threads = len(os.sched_getaffinity(0))
        self._source = np.full(largest, 7, np.uint8)
        self._target = np.zeros(largest, np.uint8)

    def copy(self, nbytes: int, threads: int | None = None) -> None:
        """Copy in `threads` threads, by default one a core, past the caches if the bytes are many."""
        outcome = copy_runs(
            [self._source.ctypes.data],
            [self._target.ctypes.data],
            [(0, 0, nbytes)],
            time.monotonic_ns() + _MINUTE_NS,
            threads=self.threads if threads is None else threads,
        )
        if outcome != 0:
            raise RuntimeError(f"the copy of {nbytes} bytes ended with outcome {outcome}")

    def memcpy(self, nbytes: int) -> None:
        np.copyto(self._target[:nbytes], self._source[:nbytes])

    def around(self, nbytes: int, run_round: Callable[[], list[float]]) -> tuple[list[float], float]:
        """Measure something in rounds, with a look at the limit before, between and after them.

        Parameters
        ----------
        nbytes : int
            Bytes of the limit.
        run_round : callable
            Measures one round; gives microseconds.

        Returns
        -------
        values : list of float
            What the rounds gave.
        limit_us : float
            Median of the limit: a machine whose speed changes meanwhile is fair to both.
        """
        taken: list[float] = []
        at_the_limit = self._sample(nbytes)
        for _ in range(ROUNDS):
            taken += run_round()
            at_the_limit += self._sample(nbytes)
        return taken, statistics.median(at_the_limit)

    def beside(self, nbytes: int, operation: Operation, runs: int) -> tuple[list[float], float]:
        """Measure an operation as `around` does."""
        return self.around(nbytes, lambda: time_us(operation, -(-runs // ROUNDS)))

    def _sample(self, nbytes: int) -> list[float]:
        return time_us(lambda: self.copy(nbytes), SAMPLES, warm_up=1)


def measure(limits: Limits) -> Iterator[Row]:
    """Give the limits themselves."""
    for nbytes in (64 * MIB, 256 * MIB):
        size = f"{nbytes // MIB} MiB"
        yield Row(TOPIC, f"memcpy, 1 thread, {size}", time_us(partial(limits.memcpy, nbytes), 9), nbytes)
        for threads in sorted({1, 2, limits.threads}):
            name = f"non-temporal copy, {threads} thread{'s' * (threads > 1)}, {size}"
            yield Row(TOPIC, name, time_us(partial(limits.copy, nbytes, threads), 9), nbytes)
