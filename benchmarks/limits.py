"""What the machine gives without any transfer: memory copied inside one process, in one thread and in several."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from llm_datadist._copy import copy_runs, enter_workers, leave_workers

from .measurement import Operation, Row, time_us

TOPIC = "limits"
MIB = 1 << 20
LARGEST = 256 * MIB
ROUNDS = 5
SAMPLES = 3  # of the limit, before each round and after the last one
_MINUTE_NS = 60 * 10**9


class Limits:
    """Two buffers of this process, and copies between them; a context manager, during which helping threads are parked.

    Parameters
    ----------
    largest : int
        Bytes of a buffer.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self.threads = len(os.sched_getaffinity(0))
        self._source = np.full(largest, 7, np.uint8)
        self._target = np.zeros(largest, np.uint8)

    def __enter__(self) -> Limits:
        enter_workers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave_workers()

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
        at_the_limit = self.sample(nbytes)
        for _ in range(ROUNDS):
            taken += run_round()
            at_the_limit += self.sample(nbytes)
        return taken, statistics.median(at_the_limit)

    def beside(self, nbytes: int, operation: Operation, runs: int) -> tuple[list[float], float]:
        """Measure an operation as `around` does."""
        return self.around(nbytes, lambda: time_us(operation, -(-runs // ROUNDS)))

    def sample(self, nbytes: int) -> list[float]:
        """Look at the limit; what is larger than the buffers counts as so many times their size."""
        times = max(1.0, nbytes / self._source.nbytes)
        copied = min(nbytes, self._source.nbytes)
        return [us * times for us in time_us(lambda: self.copy(copied), SAMPLES, warm_up=1)]


def measure(limits: Limits) -> Iterator[Row]:
    """Give the limits themselves."""
    for nbytes in (64 * MIB, 256 * MIB):
        size = f"{nbytes // MIB} MiB"
        yield Row(TOPIC, f"memcpy, 1 thread, {size}", time_us(partial(limits.memcpy, nbytes), 9), nbytes)
        for threads in sorted({1, 2, limits.threads}):
            name = f"non-temporal copy, {threads} thread{'s' * (threads > 1)}, {size}"
            yield Row(TOPIC, name, time_us(partial(limits.copy, nbytes, threads), 9), nbytes)
        with contextlib.suppress(FileNotFoundError):  # no compiler
            name = f"plain C, non-temporal copy, {limits.threads} threads, {size}"
            yield Row(TOPIC, name, _plain_copy(nbytes, limits.threads), nbytes)


def _plain_copy(nbytes: int, threads: int) -> list[float]:
    """Measure the copy of `plain_copy.c`; gives microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "plain_copy"))
        source = str(Path(__file__).with_name("plain_copy.c"))
        subprocess.run(["cc", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        printed = subprocess.run([program, str(nbytes), str(threads)], check=True, capture_output=True, text=True)
        return [float(line) * 1e6 for line in printed.stdout.split()]
