"""NIXL beside us: the processes of `benchmarks.nixl_reader`, started, stopped and asked from here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from .work import Work

_END_S = 20.0


class NixlTimes:
    """Microseconds of reads: of the transfers, and with the preparation of their descriptors."""

    def __init__(self) -> None:
        self.transfer_us: list[float] = []
        self.total_us: list[float] = []

    def add(self, other: NixlTimes) -> None:
        self.transfer_us += other.transfer_us
        self.total_us += other.total_us

    def of(self, work: Work) -> float:
        """Median of the time that counts for a piece of work."""
        times = sorted(self.total_us if work.with_preparation else self.transfer_us)
        return times[len(times) // 2]


class NixlReads:
    """Two processes that read from each other; a context manager.

    Their threads poll, so both stand still (SIGSTOP) whenever they are not asked.

    Parameters
    ----------
    python : str
        Interpreter of an environment that has ``nixl``.
    """

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("nixl_reader.py")
        self._process = subprocess.Popen(
            [python, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NixlReads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both processes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    def read(self, work: Work, runs: int = 3) -> NixlTimes:
        """Read all blocks of a piece of work, some times; small ones more often."""
        assert self._process.stdin is not None
        source, target = work.block_lists()
        order = {"block_bytes": work.block_bytes, "source": source, "target": target}
        order["runs"] = 100 if work.is_small else runs
        self._signal(signal.SIGCONT)
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return _times(self._answer())

    def _answer(self) -> dict[str, list[float]]:
        """Wait for the next answer, and let the processes stand still."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the library writes its log there too
                self._signal(signal.SIGSTOP)
                found: dict[str, list[float]] = json.loads(line)
                return found
        raise RuntimeError("the process with NIXL ended; run benchmarks/nixl_reader.py to see why")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def _times(found: dict[str, list[float]]) -> NixlTimes:
    times = NixlTimes()
    times.transfer_us = [seconds * 1e6 for seconds in found["transfer_s"]]
    times.total_us = [(a + b) * 1e6 for a, b in zip(found["transfer_s"], found["prepare_s"])]
    return times
