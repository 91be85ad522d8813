"""Processes in which tests use the simulator: a fresh one for each, since a process initialises ACL once.

A function that runs in a program is a top-level function of a test module and gets the process's `Acl` first.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ascend_simulator import build
from tests.ascend_simulator.acl import Acl

# All of it under a sanitizer: SANITIZE=thread LD_PRELOAD=$(gcc -print-file-name=libtsan.so) python -m pytest ...
SANITIZE = os.environ.get("SANITIZE", "")
# Forked from a server that has everything imported: much faster than a new interpreter, and without pytest's threads.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", __name__, *(f"{__package__}.{path.stem}" for path in Path(__file__).parent.glob("test_*.py"))]
)

ANSWER_S = 60.0


class Ended(Exception):
    """The process ended before it answered."""


class Program:
    """
    A process with the simulator loaded and nothing called yet.

    Parameters
    ----------
    world
        Name of the simulated server.
    variant
        Which library, see `build.VARIANTS`.
    hold_interpreter
        See `Acl`.
    **environment
        Variables; names in capitals without LLMDD_SIM_ or ASCEND_ in front get the former.
    """

    def __init__(self, world: str, variant: str = "", hold_interpreter: bool = False, **environment: object) -> None:
        variables = {"LLMDD_SIM_WORLD": world, "LLMDD_SIM_SETDEVICE_MS": "0"}
        for name, value in environment.items():
            variables[name if name.startswith(("LLMDD_SIM_", "ASCEND_", "HCCL_")) else f"LLMDD_SIM_{name}"] = str(value)
        self._connection, theirs = _CONTEXT.Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the program
        path = str(build.library(variant, SANITIZE))
        self._process = _CONTEXT.Process(
            target=_serve, args=(theirs, self._errors_path(), path, hold_interpreter, variables), daemon=True
        )
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call; `result` gives its outcome. One at a time."""
        self._connection.send((function, args))

    def result(self, timeout: float = ANSWER_S) -> Any:
        """Wait for the call; raises what it raised, or Ended."""
        try:
            if not self._connection.poll(timeout):
                raise TimeoutError(f"process {self.pid} does not answer")
            succeeded, value = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join(ANSWER_S)
            raise Ended(f"exit status {self._process.exitcode}: {self.errors()}") from None
        if not succeeded:
            raise value
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.start(function, *args)
        return self.result()

    def aborts(self, function: Callable[..., Any], *args: Any, by: int = signal.SIGABRT) -> str:
        """Run a function that must end the process by the signal; gives what was written to stderr."""
        self.start(function, *args)
        try:
            value = self.result()
        except Ended:
            assert self._process.exitcode == -by, f"exit status {self._process.exitcode}: {self.errors()}"
            return self.errors()
        raise AssertionError(f"the process lives on and gave {value!r}: {self.errors()}")

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def kill(self) -> None:
        self._process.kill()
        self._process.join(ANSWER_S)

    def close(self) -> None:
        """Let the process end as programs do, or kill it; raises if a sanitizer complained."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self.kill()
        errors = self.errors()
        self._process.close()
        self._errors.close()
        assert "Sanitizer" not in errors, errors

    def _errors_path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._errors.fileno()}"


def _serve(connection: Connection, errors: str, path: str, hold_interpreter: bool, variables: dict[str, str]) -> None:
    """Body of the process: answers calls until the test closes the connection."""
    file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    os.close(file)
    for name in [name for name in os.environ if name.startswith(("LLMDD_SIM_", "ASCEND_", "HCCL_"))]:
        del os.environ[name]
    os.environ.update(variables)
    acl = Acl(path, hold_interpreter)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(acl, *args))
        except Exception as error:
            answer = (False, error)
        connection.send_bytes(pickle.dumps(answer))


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Result of the function on a thread that has never called ACL."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
