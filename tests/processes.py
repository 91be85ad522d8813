"""Real processes in which a test can call functions.

A function that runs in a member is a top-level function of a test module. It gets the member's state, a dict that lives
as long as the process, as its first argument. Calls run in threads of their own, so a member can be asked for the next
thing while it is still busy with the last.
"""

from __future__ import annotations

import pickle
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from llm_datadist.cluster.local import LocalGroup

CALL_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0


class MemberDied(Exception):
    """The process ended before it answered."""


class RemoteTraceback(Exception):
    """Cause of an exception that was raised in a member: the traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Member:
    """A process of its own; made by the fixture `members`.

    `body` is what it does: `serve`, perhaps after some preparation. It gets the connection first, then `args`.
    """

    def __init__(self, group: LocalGroup, name: str, body: Callable[..., None] | None = None, *args: Any) -> None:
        self.name = name
        self._worker = group.start(name, body or serve, *args)
        self._last_number = 0
        self._answers: dict[int, tuple[bool, Any, str]] = {}

    @property
    def pid(self) -> int:
        return self._worker.pid

    @property
    def exitcode(self) -> int | None:
        return self._worker.exitcode

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Run ``function(state, *args, **kwargs)`` in the member and give its result, or raise what it raised.

        Raises MemberDied if the process ends first, and TimeoutError after `timeout` seconds.
        """
        return self.start(function, *args, **kwargs).result(timeout)

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """Begin a call and come back at once."""
        self._last_number += 1
        self._worker.connection.send((self._last_number, function, args, kwargs))
        return Call(self, self._last_number, function.__name__)

    def kill(self) -> None:
        """End the process by SIGKILL; returns when it is gone."""
        self._worker.kill()
        assert self._worker.wait(END_TIMEOUT_S), f"{self.name} survived SIGKILL"

    def stop(self) -> None:
        """Stop the process (SIGSTOP); returns when it stands still."""
        self._worker.pause()

    def cont(self) -> None:
        """Let a stopped process go on."""
        self._worker.resume()

    def leave(self) -> None:
        """Let the process end as a program does, with its exit handlers; returns when it is gone."""
        self._worker.connection.send(None)
        assert self._worker.wait(END_TIMEOUT_S), f"{self.name} does not end"

    def receive(self, number: int, timeout: float) -> tuple[bool, Any, str] | None:
        """Wait for the answer to a call; None if it does not come in time."""
        deadline = time.monotonic() + timeout
        while number not in self._answers:
            try:
                if not self._worker.connection.poll(max(0.0, deadline - time.monotonic())):
                    return None
                answered, *answer = self._worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._worker.wait(END_TIMEOUT_S)
                raise MemberDied(f"{self.name} ended with exit status {self.exitcode}") from None
            self._answers[answered] = tuple(answer)
        return self._answers[number]


class Call:
    """A call that was begun in a member."""

    def __init__(self, member: Member, number: int, name: str) -> None:
        self._member = member
        self._number = number
        self._name = name

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._member.receive(self._number, 0.0) is not None

    def result(self, timeout: float = CALL_TIMEOUT_S) -> Any:
        """Wait for the result; raises as `Member.call` does."""
        answer = self._member.receive(self._number, timeout)
        if answer is None:
            raise TimeoutError(f"{self._name} in {self._member.name} did not end within {timeout} s")
        succeeded, value, trace = answer
        if succeeded:
            return value
        raise value from RemoteTraceback(trace)


def serve(connection: Connection) -> None:
    """Body of a member: runs calls until it is told to leave, or until the test has gone."""
    state: dict[str, Any] = {}
    sending = threading.Lock()
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        threading.Thread(target=_answer, args=(connection, sending, state, *request), daemon=True).start()


def _answer(
    connection: Connection,
    sending: threading.Lock,
    state: dict[str, Any],
    number: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    try:
        answer = pickle.dumps((number, True, function(state, *args, **kwargs), ""))
    except BaseException as error:
        answer = pickle.dumps((number, False, _picklable(error), traceback.format_exc()))
    with sending:
        connection.send_bytes(answer)


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
