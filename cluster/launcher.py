"""Runs processes on this host until all have ended well, or one has failed and the others are stopped.

One thread does it all, so that the processes can be tied to its life: it waits for output, ends of processes and
signals, whichever comes first.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from llm_datadist.cluster.launched_process import Command, LaunchedProcess
from llm_datadist.cluster.prefixed_output import PrefixedOutput

__all__ = ["Outcome", "run_commands"]

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_BY_SIGNAL = 128  # exit status of a process that a signal ended, less the signal's number
# For the last output of a process that has ended: somebody who left its session may hold its pipe for ever.
_DRAIN_S = 1.0


class Outcome(NamedTuple):
    """How it ended.

    Attributes
    ----------
    status : int
        Exit status for the launcher: 0, that of the process that failed first (128 and the number of the signal that
        ended it), or 128 and the number of the signal that stopped the launcher.
    failed : LaunchedProcess or None
        The process that failed first.
    signal : int or None
        The signal that stopped the launcher; SIGPIPE if nobody takes the output any more.
    """

    status: int
    failed: LaunchedProcess | None = None
    signal: int | None = None


def run_commands(
    commands: Sequence[Command], output: PrefixedOutput, *, stop_timeout_s: float = 10.0, tail_lines: int = 20
) -> Outcome:
    """Start all commands, pass on their output and signals to them, and come back when all have ended.

    When a process fails (its status is not 0), the others get SIGTERM. SIGINT, SIGTERM and SIGHUP of this process go to
    all of them. Services are stopped when all others have ended. Who is left after `stop_timeout_s` is killed, and so
    is everybody at a second signal. However this call ends, no process is left.

    Call it in the main thread: signals arrive there.

    Parameters
    ----------
    commands : sequence of Command
        What to start, in order, all with different names.
    output : PrefixedOutput
        Where their lines go. While it takes none, processes that write wait.
    stop_timeout_s : float
        Seconds that processes get to end after they were asked to.
    tail_lines : int
        How many last lines are kept of each.

    Raises
    ------
    OSError, subprocess.SubprocessError
        A process cannot be started.
    ValueError
        This is not the main thread.
    """
    run = _Run(output, stop_timeout_s, tail_lines)
    try:
        with run.signals_handled():
            run.start(commands)
            return run.finish()
    finally:
        run.close()


class _Run:
    def __init__(self, output: PrefixedOutput, stop_timeout_s: float, tail_lines: int) -> None:
        self._output: PrefixedOutput | None = output
        self._stop_timeout_s = stop_timeout_s
        self._tail_lines = tail_lines
        self._processes: list[LaunchedProcess] = []
        self._drained_at: dict[LaunchedProcess, float] = {}  # those that have ended, until their streams are closed
        self._killed_at: float | None = None  # when those that are being stopped are killed
        self._killed = False
        self._services_stopped = False
        self._signal: int | None = None
        self._failed: LaunchedProcess | None = None
        self._selector = selectors.DefaultSelector()

    # ---- signals

    @contextlib.contextmanager
    def signals_handled(self) -> Iterator[None]:
        """Handle signals as `run_commands` says; those that are ignored stay ignored."""
        with contextlib.ExitStack() as undo:
            waker, sleeper = socket.socketpair()
            undo.enter_context(waker)
            undo.enter_context(sleeper)
            waker.setblocking(False)
            sleeper.setblocking(False)
            # A signal writes a byte, which ends the wait in `_wait`.
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False))
            self._selector.register(sleeper, selectors.EVENT_READ)
            undo.callback(self._selector.unregister, sleeper)
            self._sleeper = sleeper
            for number, handler in [(signal.SIGCHLD, _wake_only), *((number, self._on_signal) for number in PASSED_ON)]:
                if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                    before = signal.signal(number, handler)
                    undo.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on at once, also while the output takes nothing; it must not touch the output itself."""
        if self._signal is None:
            self._signal = number
            self._stop(number)
            return
        for process in self._processes:
            process.signal(signal.SIGKILL)
        signal.signal(number, signal.SIG_DFL)  # a third one ends the launcher, if nobody takes its output

    def _stop(self, number: int) -> None:
        """Ask the workers to end; a process that is stopped hears it too. Services are needed until they have."""
        if self._killed_at is None:
            self._killed_at = time.monotonic() + self._stop_timeout_s
        for process in self._processes:
            if not process.command.service:
                process.signal(number)
                process.signal(signal.SIGCONT)

    def _stop_services(self) -> None:
        self._services_stopped = True
        self._killed_at = time.monotonic() + self._stop_timeout_s
        self._killed = False
        for process in self._processes:
            process.signal(signal.SIGTERM)
            process.signal(signal.SIGCONT)

    # ---- from start to end

    def start(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if self._signal is not None:
                break
            process = LaunchedProcess(command, self._tail_lines)
            self._processes.append(process)
            if self._signal is not None:  # it came in between, and did not reach this one
                process.signal(self._signal)
            for stream, descriptor in process.streams().items():
                self._selector.register(descriptor, selectors.EVENT_READ, (process, stream))

    def finish(self) -> Outcome:
        while any(process.exitcode is None or process.streams() for process in self._processes):
            self._wait()
            self._notice_ends()
            self._keep_deadlines()
        if self._failed is not None:
            return Outcome(_status(self._failed), self._failed)
        if self._signal is not None:
            return Outcome(_BY_SIGNAL + self._signal, signal=self._signal)
        return Outcome(0)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._selector.close()

    def _wait(self) -> None:
        """Wait for output, a signal or a deadline, and pass output on."""
        deadlines = list(self._drained_at.values())
        if self._killed_at is not None and not self._killed:
            deadlines.append(self._killed_at)
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._sleeper.recv(4096)
                continue
            process, stream = key.data
            lines = process.read(stream)
            if stream not in process.streams():
                self._selector.unregister(key.fd)
            self._write(process, stream, lines)

    def _notice_ends(self) -> None:
        for process in self._processes:
            if process.exitcode is not None or not process.has_ended():
                continue
            self._drained_at[process] = time.monotonic() + _DRAIN_S
            too_early = process.command.service and self._workers_run()
            if self._killed_at is None and (process.exitcode != 0 or too_early):
                self._failed = process
                self._stop(signal.SIGTERM)
        if not self._services_stopped and not self._workers_run():
            self._stop_services()

    def _workers_run(self) -> bool:
        return any(process.exitcode is None for process in self._processes if not process.command.service)

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if self._killed_at is not None and not self._killed and now >= self._killed_at:
            self._killed = True
            for process in self._processes:
                process.signal(signal.SIGKILL)
        for process, deadline in tuple(self._drained_at.items()):
            if now >= deadline:
                for stream, descriptor in process.streams().items():
                    self._selector.unregister(descriptor)
                    self._write(process, stream, process.close(stream))
            if not process.streams():
                del self._drained_at[process]

    def _write(self, process: LaunchedProcess, stream: int, lines: Sequence[bytes]) -> None:
        if self._output is None or not lines:
            return
        try:
            self._output.write(process.command.name, stream, lines)
        except OSError:  # nobody takes it: it would be lost from now on
            self._output = None
            if self._signal is None:
                self._signal = signal.SIGPIPE
                self._stop(signal.SIGTERM)


def _wake_only(number: int, frame: FrameType | None) -> None:
    """Do nothing: that there is a handler makes the signal end the wait."""


def _status(process: LaunchedProcess) -> int:
    exitcode = process.exitcode
    assert exitcode is not None
    if exitcode < 0:
        return _BY_SIGNAL - exitcode
    return exitcode or 1  # a service that ended well, but too early
