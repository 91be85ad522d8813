"""What the program says while it runs, and how it runs other programs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Callable

_STARTED_S = time.monotonic()
_POLL_S = 0.2
_TAIL_LINES = 40


class Failed(Exception):
    """The test has failed; the text says why."""


def say(text: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.monotonic() - _STARTED_S:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    say(f"{what} ...")
    started_s = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - started_s:.1f} s")


def require(condition: bool, what: str) -> None:
    """Fail the test unless something holds.

    Raises
    ------
    Failed
        It does not.
    """
    if not condition:
        raise Failed(what)
    say(f"ok: {what}")


def run(arguments: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and give what it wrote to its standard output.

    Raises
    ------
    Failed
        It failed, or did not end in time; with the end of what it said.
    """
    try:
        done = subprocess.run(
            arguments, timeout=timeout_s, env=environment, text=True, stdin=subprocess.DEVNULL, capture_output=True
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(arguments)} did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-_TAIL_LINES:])
        raise Failed(f"{' '.join(arguments)} ended with status {done.returncode}:\n{said}")
    return done.stdout


def wait_until(what: str, holds: Callable[[], bool], timeout_s: float) -> None:
    """Wait for a condition.

    Raises
    ------
    Failed
        It did not come true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(_POLL_S)


def complain(text: str) -> None:
    """Print something to the standard error."""
    print(text, file=sys.stderr, flush=True)
