"""Others beside us: the processes of `benchmarks.nixl_reader` and its like, started, stopped and asked from here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from .work import Work

NIXL, MOONCAKE = "NIXL", "Mooncake"
_READERS = {NIXL: ("nixl._api", "nixl_reader.py"), MOONCAKE: ("mooncake.engine", "mooncake_reader.py")}
PEERS = tuple(_READERS)
_END_S = 20.0
_SMALL_RUNS, _LARGE_RUNS = 100, 3  # of one order


class ReadTimes:
    """Microseconds of reads: of the transfers, and with the preparation of their descriptors."""

    def __init__(self) -> None:
        self.transfer_us: list[float] = []
        self.total_us: list[float] = []

    def add(self, other: ReadTimes) -> None:
        self.transfer_us += other.transfer_us
        self.total_us += other.total_us

    @property
    def has_preparation(self) -> bool:
        return self.transfer_us != self.total_us

    def of(self, work: Work) -> float:
        """Median of the time that counts for a piece of work."""
        return float(np.median(self.total_us if work.with_preparation else self.transfer_us))


class PeerReads:
    """Two processes of another library, one of which reads from the other; a context manager.

    Their threads may poll, so both stand still (SIGSTOP) whenever they are not asked.

    Parameters
    ----------
    name : str
        Of the library.
    python : str
        Interpreter of an environment that has it.
    environment : dict of str to str
        Variables that both processes have beside those of this process.
    """

    def __init__(self, name: str, python: str, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.python = python
        self._script = Path(__file__).with_name(_READERS[name][1])
        self._process = subprocess.Popen(
            [python, "-I", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PeerReads:
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

    def read(self, work: Work) -> ReadTimes:
        """Read all blocks of a piece of work, some times; small ones more often."""
        assert self._process.stdin is not None
        source, target = work.block_lists()
        runs = _SMALL_RUNS if work.is_small else _LARGE_RUNS
        order = {"block_bytes": work.block_bytes, "source": source, "target": target, "runs": runs}
        self._signal(signal.SIGCONT)
        print(json.dumps(order), file=self._process.stdin, flush=True)
        found = self._answer()
        times = ReadTimes()
        times.transfer_us = [seconds * 1e6 for seconds in found["transfer_s"]]
        times.total_us = [(a + b) * 1e6 for a, b in zip(found["transfer_s"], found["prepare_s"])]
        return times

    def _answer(self) -> dict[str, list[float]]:
        """Wait for the next answer, and let the processes stand still."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the library may write its log there too
                self._signal(signal.SIGSTOP)
                found: dict[str, list[float]] = json.loads(line)
                return found
        raise RuntimeError(f"the process with {self.name} ended; run {self._script} to see why")

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def missing_peers(python: str) -> Iterator[tuple[str, str]]:
    """Tell which libraries cannot be imported in an environment, and why."""
    for name, (module, _) in _READERS.items():
        found = subprocess.run([python, "-I", "-c", f"import {module}"], capture_output=True, text=True)
        if found.returncode != 0:
            yield name, found.stderr.strip().rpartition("\n")[2]


class PeerRounds:
    """Collects what the peers need for a piece of work, one round after the other."""

    def __init__(self, peers: list[PeerReads], work: Work) -> None:
        self._peers = peers
        self._work = work
        self.times = {peer.name: ReadTimes() for peer in peers}

    def run(self) -> None:
        """Let each peer read the work once more."""
        for peer in self._peers:
            self.times[peer.name].add(peer.read(self._work))

    def times_ours(self, name: str, ours_us: float) -> float | None:
        """How often ours is done while a peer does it once; None if the peer is not measured."""
        return self.times[name].of(self._work) / ours_us if name in self.times else None
