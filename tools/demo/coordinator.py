"""The parent process: starts the workers, carries messages between them, and records what happens.

The pipes carry only numbers and text. The KV cache goes from the prefill process to the decode process through
`llm_datadist`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Callable

from llm_datadist.cluster.local import LocalGroup, LocalWorker
from llm_datadist.tools.demo.blas_threads import one_blas_thread
from llm_datadist.tools.demo.decode_worker import decode_requests
from llm_datadist.tools.demo.errors import DemoError
from llm_datadist.tools.demo.local_messages import local_messages
from llm_datadist.tools.demo.messages import (
    AllAnswered,
    AllPrefilled,
    Answered,
    Decoded,
    Listening,
    PoolLevel,
    Prefilled,
    PrefillProgress,
    Pulled,
    RequestFailed,
)
from llm_datadist.tools.demo.outcome import HOST_MEMORY, Outcome, RequestRecord
from llm_datadist.tools.demo.prefill_worker import prefill_requests
from llm_datadist.tools.demo.prompts import Request
from llm_datadist.tools.demo.reference_check import check_alone
from llm_datadist.tools.demo.screen import Screen
from llm_datadist.tools.demo.worker import run_worker

_STOP_S = 2.0  # for workers to close what they hold after Ctrl-C or a failure


def run_demo(
    requests: Sequence[Request], max_new_tokens: int, mode: str, screen: Screen, device: str = HOST_MEMORY
) -> Outcome:
    """Answer the requests across two processes, then check them against one.

    `device` is where the caches of both lie, as the environment says too: in memory of the host, or on two devices.

    Raises
    ------
    DemoError
        A worker failed, died, or fell silent.
    """
    started = time.monotonic()
    outcome = Outcome(mode, max_new_tokens, [RequestRecord(request) for request in requests], device=device)
    with LocalGroup(stop_timeout_s=_STOP_S) as group, one_blas_thread():
        _Serving(group, outcome, screen).run()
        check_alone(group, outcome, screen)
    outcome.seconds = time.monotonic() - started
    return outcome


class _Serving:
    """Prefill and decode, side by side."""

    def __init__(self, group: LocalGroup, outcome: Outcome, screen: Screen) -> None:
        requests = [record.request for record in outcome.records]
        self._outcome = outcome
        self._screen = screen
        self._records = {record.request.number: record for record in outcome.records}
        mode, length = outcome.mode, outcome.max_new_tokens
        prefill_device, decode_device = (0, 0) if outcome.device == HOST_MEMORY else (0, 1)
        self._prefill = group.start("prefill", run_worker, prefill_requests, requests, length, mode, prefill_device)
        self._decode = group.start("decode", run_worker, decode_requests, mode, decode_device)
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
            RequestFailed: self._on_request_failed,
        }
        self._screen.loading("prefill and decode processes load the model")
        for worker, message in local_messages([self._prefill, self._decode]):
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
        where = f"prefill in process {self._prefill.pid}, decode in process {self._decode.pid}"
        self._screen.serving(self._outcome.records, where)
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

    def _on_request_failed(self, failed: RequestFailed) -> None:
        raise DemoError(f"request {failed.request} failed: {failed.reason}")

    def _on_pool_level(self, worker: LocalWorker, level: PoolLevel) -> None:
        self._outcome.pools[worker.name] = level
        if worker is self._decode:
            _send(self._prefill, AllAnswered())


def _send(worker: LocalWorker, message: object) -> None:
    # A worker that has just died is noticed, and reported, where its messages are read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.connection.send(message)
