"""The demo as the workload of a cluster: started, followed line by line, and judged by what it says."""

from __future__ import annotations

import contextlib
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.compose.cluster import REGISTRY, Cluster
from tests.compose.steps import Failed, require, say

_PREFILLED = re.compile(r"#(\d+) prefilled by (\S+):")
_PULLED = re.compile(r"#(\d+) pulled by (\S+): .* bytes over (\S+) in")
_AGAIN = re.compile(r"#(\d+) again: (.*)")
_ANSWERED = re.compile(r"#(\d+) answered:")
_VERDICT = re.compile(r"OK: all (\d+) answers are token for token those of the model in one process")

_END_S = 10.0


@dataclass
class Workload:
    """A run of the demo; made by `running_workload`."""

    process: subprocess.Popen[str]
    requests: int
    output: queue.SimpleQueue[str | None]  # lines as they come; None: there are no more
    lines: list[str] = field(default_factory=list)
    prefilled: dict[str, str] = field(default_factory=dict)  # who prefilled a request last
    pulls: list[tuple[str, str, str]] = field(default_factory=list)  # prompt, decoder, transport
    again: list[str] = field(default_factory=list)  # reasons
    answered: set[str] = field(default_factory=set)

    def follow_until(self, pattern: str, timeout_s: float) -> None:
        """Read what it says until a line matches.

        Raises
        ------
        Failed
            It ended before, or did not say so in time.
        """
        for line in self._read(time.monotonic() + timeout_s):
            if re.search(pattern, line):
                return
        raise Failed(f"the workload ended without a line like {pattern!r}:\n" + "\n".join(self.lines[-20:]))

    def finish(self, timeout_s: float) -> None:
        """Read to the end, and make sure that all answers were right.

        Raises
        ------
        Failed
            They were not, or it did not end in time.
        """
        for _ in self._read(time.monotonic() + timeout_s):
            pass
        status = self.process.wait(_END_S)
        if status != 0:
            raise Failed(f"the workload ended with status {status}:\n" + "\n".join(self.lines[-20:]))
        verdicts = [found.group(1) for line in self.lines if (found := _VERDICT.search(line))]
        require(
            verdicts == [str(self.requests)], f"{self.requests} requests answered, with the tokens of the reference"
        )

    def _read(self, deadline: float) -> Iterator[str]:
        """Give the lines as they come, in time."""
        while True:
            try:
                line = self.output.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                said = "\n".join(self.lines[-20:])
                raise Failed(f"the workload takes too long, at last it said:\n{said}") from None
            if line is None:
                return
            self._take(line)
            yield line

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith(("#", "OK", "FAILED", "prefill by", "KV pool")):
            say(f"    {line}")
        if found := _PREFILLED.match(line):
            self.prefilled[found.group(1)] = found.group(2)
        elif found := _PULLED.match(line):
            self.pulls.append((self.prefilled[found.group(1)], found.group(2), found.group(3)))
        elif found := _AGAIN.match(line):
            self.again.append(found.group(2))
        elif found := _ANSWERED.match(line):
            self.answered.add(found.group(1))


@contextlib.contextmanager
def running_workload(cluster: Cluster, requests: int, max_new_tokens: int) -> Iterator[Workload]:
    """Start the demo against a cluster of two prompts and two decoders."""
    say(f"workload: {requests} requests, up to {max_new_tokens} new tokens each")
    arguments = ["--requests", str(requests), "--max-new-tokens", str(max_new_tokens)]
    wait = ["--min-prompts", "2", "--min-decoders", "2"]
    process = cluster.running("run", "--rm", "-T", "demo", "demo", "--registry", REGISTRY, *wait, *arguments)
    output: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_lines, args=(process, output), daemon=True)
    with process:
        reader.start()
        try:
            yield Workload(process, requests, output)
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(_END_S)


def _read_lines(process: subprocess.Popen[str], output: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        output.put(line.rstrip())
    output.put(None)
