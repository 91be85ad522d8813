"""One process that a launcher started: its output, signals to it, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, NamedTuple

from llm_datadist.cluster.death_signal import die_with_parent
from llm_datadist.cluster.prefixed_output import LineBuffer

__all__ = ["Command", "LaunchedProcess"]

_READ_BYTES = 65536
_PIPE_BYTES = 1 << 20  # most that a pipe holds, unless an administrator raised it


class Command(NamedTuple):
    """What a launcher starts.

    Attributes
    ----------
    name : str
        Stands in front of its lines; different from all others.
    arguments : sequence of str
        Program and arguments.
    environment : mapping of str to str
        All its variables.
    service : bool
        It is there for the others: it must not end before them, and is stopped when they have ended.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    service: bool = False


class LaunchedProcess:
    """A process in a session of its own, with all that it starts and that does not leave the session.

    The kernel kills it (SIGKILL) when the thread that made it ends. It reads nothing: its standard input is empty.

    Parameters
    ----------
    command : Command
        What to start.
    tail_lines : int
        How many of its last lines are kept.

    Attributes
    ----------
    command : Command
        What was started.
    pid : int
        Its process id, which is the id of its process group too.
    exitcode : int or None
        Exit status, minus the number of the signal that ended it, None while it runs.
    """

    def __init__(self, command: Command, tail_lines: int) -> None:
        self.command = command
        self._over = False  # from the moment in which its id may be given to another process
        self._tail: deque[bytes] = deque(maxlen=tail_lines)
        self._process = subprocess.Popen(
            list(command.arguments),
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.pid: int = self._process.pid
        self.exitcode: int | None = None
        self._open: dict[int, tuple[IO[bytes], LineBuffer]] = {
            0: (self._process.stdout, LineBuffer()),
            1: (self._process.stderr, LineBuffer()),
        }

    @property
    def tail(self) -> tuple[bytes, ...]:
        """Its last lines, of both streams."""
        return tuple(self._tail)

    def streams(self) -> dict[int, int]:
        """Give the descriptors that are still open, by stream: 0 is its standard output, 1 its standard error."""
        return {stream: pipe.fileno() for stream, (pipe, _) in self._open.items()}

    def read(self, stream: int) -> list[bytes]:
        """Read what is there of a stream, and give the lines that are complete. At its end it is closed."""
        pipe, lines = self._open[stream]
        data = os.read(pipe.fileno(), _READ_BYTES)
        return self._kept(lines.feed(data)) if data else self.close(stream)

    def close(self, stream: int) -> list[bytes]:
        """Close a stream, and give the lines that were still in it, also a last one without an end."""
        pipe, lines = self._open.pop(stream)
        left = []
        with pipe, contextlib.suppress(BlockingIOError):
            os.set_blocking(pipe.fileno(), False)
            for _ in range(_PIPE_BYTES // _READ_BYTES):  # whoever else has the pipe may be writing all the time
                left += lines.feed(os.read(pipe.fileno(), _READ_BYTES))
        return self._kept([*left, *lines.end()])

    def signal(self, number: int) -> None:
        """Send a signal to the process and what it started; nothing happens once it has ended."""
        if not self._over:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def has_ended(self) -> bool:
        """Look whether it has ended. The first time that it has, what is left of its process group is killed."""
        if self._over:
            return True
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.signal(signal.SIGKILL)  # its id, and so that of its group, is its own until it is waited for
        self._over = True
        self.exitcode = self._process.wait()
        return True

    def kill(self) -> None:
        """End it at once, with all it started, and close its streams; returns when it is gone. May be called twice."""
        if not self._over:
            self.signal(signal.SIGKILL)
            self._over = True
            self.exitcode = self._process.wait()
        for stream in tuple(self._open):
            self.close(stream)

    def _kept(self, lines: list[bytes]) -> list[bytes]:
        self._tail.extend(lines)
        return lines
