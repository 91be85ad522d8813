"""Processes of one host, for development, demos and tests.

A `LocalGroup` starts workers in fresh interpreters and owns them: none outlives the ``with`` block, and none outlives
the process that started it, however that process ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType, TracebackType
from typing import Any

from llm_datadist.cluster.death_signal import die_with_parent

_KILL_DEADLINE_S = 5.0  # for the kernel to end a process that got SIGKILL, or to stop one that got SIGSTOP
_POLL_S = 0.001

__all__ = ["LocalGroup", "LocalWorker"]


class LocalWorker:
    """A running worker; made by `LocalGroup.start`.

    Attributes
    ----------
    name : str
        Name given to `LocalGroup.start`.
    pid : int
        Process id. It stays reserved until the worker's end was seen by this object, so a signal never hits another
        process.
    connection : multiprocessing.connection.Connection
        Two-way channel to the worker. Reading from it raises EOFError once the worker is gone.
    """

    def __init__(self, name: str, process: multiprocessing.process.BaseProcess, connection: Connection) -> None:
        assert process.pid is not None
        self.name = name
        self.pid: int = process.pid
        self.connection = connection
        self._process = process
        self._exitcode: int | None = None
        self._closed = False

    @property
    def exitcode(self) -> int | None:
        """Exit status, minus the signal number if a signal ended the worker, None while it runs."""
        if self._exitcode is None and not self._closed:
            self._exitcode = self._process.exitcode
        return self._exitcode

    def wait(self, timeout_s: float) -> bool:
        """Wait until the worker has ended; False if it still runs after `timeout_s` seconds."""
        if self.exitcode is None and not self._closed:
            self._process.join(max(0.0, timeout_s))
        return self.exitcode is not None

    def terminate(self) -> None:
        """Ask the worker to end (SIGTERM, seen as SystemExit by its target); also wakes a paused one."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the worker at once (SIGKILL): none of its clean-up code runs."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stop the worker (SIGSTOP); returns when it stands still.

        Raises
        ------
        TimeoutError
            The kernel did not stop it within 5 s.
        """
        if not self._signal(signal.SIGSTOP):
            return
        deadline = time.monotonic() + _KILL_DEADLINE_S
        seen = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, self.pid, seen) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker {self.name} (pid {self.pid}) did not stop within {_KILL_DEADLINE_S} s")
            time.sleep(_POLL_S)

    def resume(self) -> None:
        """Let a paused worker go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the worker if it still runs, and release what this process holds of it; may be called twice."""
        if self._closed:
            return
        self.kill()
        ended = self.wait(_KILL_DEADLINE_S)
        self._closed = True
        self.connection.close()
        if not ended:
            raise TimeoutError(f"worker {self.name} (pid {self.pid}) still runs {_KILL_DEADLINE_S} s after SIGKILL")
        self._process.close()

    def _signal(self, number: signal.Signals) -> bool:
        if self.exitcode is not None or self._closed:
            return False
        os.kill(self.pid, number)
        return True


class LocalGroup:
    """Owner of the workers that one program starts on this host; a context manager.

    Leaving the ``with`` block asks every worker to end (SIGTERM), kills those that have not after `stop_timeout_s`
    seconds, and closes their connections. Workers ignore Ctrl-C: the program that owns them decides.

    Parameters
    ----------
    stop_timeout_s : float
        Seconds that all workers together get to end by themselves.
    """

    def __init__(self, stop_timeout_s: float = 5.0) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._workers: dict[str, LocalWorker] = {}
        self._entered = False

    def __enter__(self) -> LocalGroup:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self._stop()

    @property
    def workers(self) -> tuple[LocalWorker, ...]:
        """Workers in the order in which they were started."""
        return tuple(self._workers.values())

    def start(self, name: str, target: Callable[..., None], *args: object) -> LocalWorker:
        """Start a worker: a fresh interpreter that calls ``target(connection, *args)``.

        Call it from a thread that lives as long as the group, usually the main thread: the kernel ends a worker
        together with the thread that started it.

        Parameters
        ----------
        name : str
            Name of the worker, unique in the group.
        target : callable
            Function of an importable module; the worker ends when it returns. An exception in it is printed to the
            standard error of the worker and gives the exit status 1.
        *args
            Further arguments, pickled.

        Raises
        ------
        RuntimeError
            Outside the ``with`` block of the group.
        ValueError
            The group has a worker of that name.
        """
        if not self._entered:
            raise RuntimeError("workers can only be started inside the 'with' block of a LocalGroup")
        if name in self._workers:
            raise ValueError(f"the group has a worker named {name!r} already")
        worker = _spawn(name, target, args)
        self._workers[name] = worker
        return worker

    def _stop(self) -> None:
        deadline = time.monotonic() + self._stop_timeout_s
        try:
            for worker in self.workers:
                worker.terminate()
            for worker in self.workers:
                worker.wait(deadline - time.monotonic())
        finally:  # also when a second Ctrl-C cuts the wait short
            for worker in self.workers:
                worker.close()


def _spawn(name: str, target: Callable[..., None], args: tuple[object, ...]) -> LocalWorker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    # Ctrl-C goes to the whole foreground process group. The child inherits the blocked signal and sets it to ignored
    # before it unblocks it, so it can never see the interrupt. The tracker must run before: starting it unblocks.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = context.Process(name=name, target=_run, args=(os.getpid(), theirs, target, args))
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return LocalWorker(name, process, ours)


def _run(parent_pid: int, connection: Connection, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Body of a worker."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _exit_on_terminate)
    with connection:
        target(connection, *args)


def _exit_on_terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
