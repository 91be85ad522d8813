"""The body of a decoder service: pulls what drivers say is prefilled, and decodes all of it together."""

from __future__ import annotations

import logging
from threading import Event
from typing import Any

from llm_datadist.tools.demo.decode_batch import DecodeBatch, Report
from llm_datadist.tools.demo.kv_layout import MAX_TOKENS
from llm_datadist.tools.demo.messages import Answered, Cancel, LevelQuery, Prefilled, RequestFailed
from llm_datadist.tools.demo.network.callers import Callers
from llm_datadist.tools.demo.network.service_socket import Caller, ServiceSocket

_log = logging.getLogger("llm_datadist.demo")

_IDLE_S = 0.5
_WAITING_S = 0.02  # for the link of a request, when there is nothing else to do


class DecoderService:
    """Requests on their way through a decoder.

    Parameters
    ----------
    socket : ServiceSocket
        Where drivers ask.
    batch : DecodeBatch
        Does the work.
    num_tokens : int
        Size of the vocabulary: token ids are below.
    """

    def __init__(self, socket: ServiceSocket, batch: DecodeBatch, num_tokens: int) -> None:
        self._socket = socket
        self._num_tokens = num_tokens
        self._batch = batch
        self._callers = Callers(socket, batch.cancel)
        self._idle_bytes = batch.level().used

    def run(self, stopped: Event) -> None:
        """Serve until `stopped` is set."""
        while not stopped.is_set():
            wait_s = 0.0 if self._batch.decoding else _WAITING_S if self._batch.waiting else _IDLE_S
            for caller, message in self._socket.receive(wait_s):
                self._take(caller, message)
            self._callers.look()
            for report in self._batch.step():
                self._tell(report)

    def close(self) -> None:
        """Give back all memory."""
        self._batch.close()

    def _take(self, caller: Caller, message: Any) -> None:
        if isinstance(message, Prefilled):
            self._accept(caller, message)
        elif isinstance(message, Cancel):
            self._callers.done(message.request)
            self._batch.cancel(message.request)
        elif isinstance(message, LevelQuery):
            self._callers.answer_level(caller, self._batch.level(), self._idle_bytes)
        else:
            _log.warning("a decoder cannot do anything with a %s", type(message).__name__)

    def _accept(self, caller: Caller, prefilled: Prefilled) -> None:
        reason = self._refusal(prefilled)
        if reason is not None:
            self._socket.send(caller, RequestFailed(prefilled.request, reason, bad_input=True))
            return
        self._callers.take(prefilled.request, caller)
        self._batch.add(prefilled)

    def _refusal(self, prefilled: Prefilled) -> str | None:
        tokens = prefilled.prompt_tokens + prefilled.max_new_tokens
        if not 1 <= prefilled.prompt_tokens < tokens <= MAX_TOKENS:
            return f"{prefilled.prompt_tokens} prompt tokens and {prefilled.max_new_tokens} new ones of {MAX_TOKENS}"
        if prefilled.first_token >= self._num_tokens:
            return f"token id {prefilled.first_token}, should be below {self._num_tokens}"
        if prefilled.request in self._callers:
            return "a request of this number is here already"
        return None

    def _tell(self, report: Report) -> None:
        self._callers.tell(report)
        if isinstance(report, (Answered, RequestFailed)):
            self._callers.done(report.request)
