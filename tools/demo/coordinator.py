"""The parent process: starts the workers, carries messages between them, and records what happens.

The pipes carry only numbers and text. The KV cache goes from the prefill process to the decode process through
`llm_datadist`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Callable

from llm_datadist.cluster.local import LocalGroup, LocalWorker
from llm_datadist.tools.demo.decode_worker import decode_requests
from llm_datadist.tools.demo.messages import (
    AllAnswered,
    AllPrefilled,
    Answered,
    Decoded,
    Failed,
    Listening,
    PoolLevel,
    Prefilled,
    PrefillProgress,
    Pulled,
    Referenced,
)
from llm_datadist.tools.demo.outcome import Outcome, RequestRecord
from llm_datadist.tools.demo.prefill_worker import prefill_requests
from llm_datadist.tools.demo.prompts import Request
from llm_datadist.tools.demo.reference_worker import answer_alone
from llm_datadist.tools.demo.screen import Screen
from llm_datadist.tools.demo.worker import run_worker

_SILENCE_S = 120.0  # without a message from any worker, the run has failed
_STOP_S = 2.0  # for workers to close what they hold after Ctrl-C or a failure
_ENDING_S = 10.0  # for a worker to end after its last message

# Prefill and decode each have one of the two cores; a BLAS that starts threads of its own would make them fight.
_ONE_BLAS_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


class DemoError(Exception):
    """The run could not be completed; the text says why, with the traceback of a worker if there is one."""


class BadInputError(DemoError):
    """A prompt cannot be processed."""


def run_demo(requests: Sequence[Request], max_new_tokens: int, mode: str, screen: Screen) -> Outcome:
    """Answer the requests across two processes, then check them against one.

    Raises
    ------
    DemoError
        A worker failed, died, or fell silent.
    """
    started = time.monotonic()
    outcome = Outcome(mode, max_new_tokens, [RequestRecord(request) for request in requests])
    with LocalGroup(stop_timeout_s=_STOP_S) as group, _environment(dict.fromkeys(_ONE_BLAS_THREAD, "1")):
        _Serving(group, outcome, screen).run()
        _check_alone(group, outcome, screen)
    outcome.seconds = time.monotonic() - started
    return outcome


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which the workers inherit, until the block ends."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _messages(workers: Sequence[LocalWorker]) -> Iterator[tuple[LocalWorker, Any]]:
    """Yield what the workers say, until all of them have ended; a failure of one of them is raised."""
    running = {worker.connection: worker for worker in workers}
    while running:
        ready = wait(list(running), timeout=_SILENCE_S)
        if not ready:
            names = " and ".join(worker.name for worker in running.values())
            raise DemoError(f"no message from {names} within {_SILENCE_S:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            worker = running[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                del running[connection]
                _require_success(worker)
                continue
            if isinstance(message, Failed):
                raise _failure(worker, message)
            yield worker, message


def _failure(worker: LocalWorker, failed: Failed) -> DemoError:
    if failed.bad_input:
        return BadInputError(failed.text)
    return DemoError(f"the {worker.name} process failed:\n{failed.text}")


def _require_success(worker: LocalWorker) -> None:
    if not worker.wait(_ENDING_S):
        raise DemoError(f"the {worker.name} process closed its connection but did not end within {_ENDING_S:.0f} s")
    if worker.exitcode != 0:
        raise DemoError(f"the {worker.name} process ended unexpectedly, exit status {worker.exitcode}")


class _Serving:
    """Prefill and decode, side by side."""

    def __init__(self, group: LocalGroup, outcome: Outcome, screen: Screen) -> None:
        requests = [record.request for record in outcome.records]
        limits = (outcome.max_new_tokens, outcome.mode)
        self._outcome = outcome
        self._screen = screen
        self._records = {record.request.number: record for record in outcome.records}
        self._prefill = group.start("prefill", run_worker, prefill_requests, requests, *limits)
        self._decode = group.start("decode", run_worker, decode_requests, *limits)
        self._to_prefill = len(requests)

    def run(self) -> None:
        """Carry messages until both workers have ended."""
        handlers: dict[type, Callable[[Any], None]] = {
            Listening: self._on_listening,
            PrefillProgress: lambda message: self._screen.prefilling(message.request, message.tokens),
            Prefilled: self._on_prefilled,
            Pulled: self._on_pulled,
            Decoded: lambda message: self._screen.decoded(message.pieces),
            Answered: self._on_answered,
        }
        self._screen.loading("prefill and decode processes load the model")
        for worker, message in _messages([self._prefill, self._decode]):
            if isinstance(message, PoolLevel):
                self._on_pool_level(worker, message)
            else:
                handlers[type(message)](message)
        missing = {"prefill", "decode"} - set(self._outcome.pools)
        if missing:
            raise DemoError(f"the {missing.pop()} process ended before its work was done")

    def _on_listening(self, listening: Listening) -> None:
        for record, tokens in zip(self._outcome.records, listening.prompt_tokens):
            record.prompt_tokens = tokens
        self._screen.serving(self._outcome.records, self._prefill.pid, self._decode.pid)
        _send(self._decode, listening)

    def _on_prefilled(self, prefilled: Prefilled) -> None:
        record = self._records[prefilled.request]
        record.prefilled = prefilled
        self._screen.prefilled(record)
        _send(self._decode, prefilled)
        self._to_prefill -= 1
        if self._to_prefill == 0:
            _send(self._decode, AllPrefilled())

    def _on_pulled(self, pulled: Pulled) -> None:
        record = self._records[pulled.request]
        record.pulled = pulled
        self._screen.pulled(record)
        _send(self._prefill, pulled)

    def _on_answered(self, answered: Answered) -> None:
        record = self._records[answered.request]
        record.answered = answered
        self._screen.answered(record)

    def _on_pool_level(self, worker: LocalWorker, level: PoolLevel) -> None:
        self._outcome.pools[worker.name] = level
        if worker is self._decode:
            _send(self._prefill, AllAnswered())


def _send(worker: LocalWorker, message: object) -> None:
    # A worker that has just died is noticed, and reported, where its messages are read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.connection.send(message)


def _check_alone(group: LocalGroup, outcome: Outcome, screen: Screen) -> None:
    """Have the same requests answered by the model in one process of its own."""
    requests = [record.request for record in outcome.records]
    records = {record.request.number: record for record in outcome.records}
    screen.checking(0, len(requests))
    worker = group.start("reference", run_worker, answer_alone, requests, outcome.max_new_tokens)
    for done, (_, message) in enumerate(_messages([worker]), start=1):
        assert isinstance(message, Referenced)
        records[message.request].reference = message
        screen.checking(done, len(requests))
