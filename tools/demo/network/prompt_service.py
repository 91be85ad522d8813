"""The body of a prompt service: prefills what drivers send, in the order in which it comes."""

from __future__ import annotations

import logging
from collections import deque
from threading import Event
from typing import Any

from llm_datadist import LLMException
from llm_datadist.tools.demo.kv_layout import MAX_TOKENS
from llm_datadist.tools.demo.messages import (
    Cancel,
    LevelQuery,
    Prefill,
    PrefillProgress,
    Pulled,
    RequestFailed,
)
from llm_datadist.tools.demo.network.callers import Callers
from llm_datadist.tools.demo.network.service_socket import Caller, ServiceSocket
from llm_datadist.tools.demo.prefiller import Prefiller

_log = logging.getLogger("llm_datadist.demo")

_IDLE_S = 0.5
_MOST_WAITING = 1000


class PromptService:
    """Requests on their way through a prompt: waiting, prefilled and not yet pulled.

    Parameters
    ----------
    socket : ServiceSocket
        Where drivers ask.
    prefiller : Prefiller
        Does the work.
    num_tokens : int
        Size of the vocabulary: token ids are below.
    """

    def __init__(self, socket: ServiceSocket, prefiller: Prefiller, num_tokens: int) -> None:
        self._socket = socket
        self._prefiller = prefiller
        self._num_tokens = num_tokens
        self._waiting: deque[Prefill] = deque()
        self._prefilled: set[int] = set()
        self._callers = Callers(socket, self._drop)
        self._idle_bytes = prefiller.level().used

    def run(self, stopped: Event) -> None:
        """Serve until `stopped` is set."""
        while not stopped.is_set():
            can_work = self._waiting and self._prefiller.has_room(len(self._waiting[0].token_ids))
            for caller, message in self._socket.receive(0.0 if can_work else _IDLE_S):
                self._take(caller, message)
            self._callers.look()
            if self._waiting and self._prefiller.has_room(len(self._waiting[0].token_ids)):
                self._prefill(self._waiting.popleft())

    def close(self) -> None:
        """Give back all memory."""
        self._prefiller.close()

    def _take(self, caller: Caller, message: Any) -> None:
        if isinstance(message, Prefill):
            self._accept(caller, message)
        elif isinstance(message, Pulled):
            if message.request in self._prefilled:
                self._prefilled.remove(message.request)
                self._callers.done(message.request)
                self._prefiller.pulled(message.request)
        elif isinstance(message, Cancel):
            self._callers.done(message.request)
            self._drop(message.request)
        elif isinstance(message, LevelQuery):
            self._callers.answer_level(caller, self._prefiller.level(), self._idle_bytes)
        else:
            _log.warning("a prompt cannot do anything with a %s", type(message).__name__)

    def _accept(self, caller: Caller, work: Prefill) -> None:
        refusal = self._refusal(work)
        if refusal is not None:
            self._socket.send(caller, refusal)
            return
        self._callers.take(work.request, caller)
        self._waiting.append(work)

    def _refusal(self, work: Prefill) -> RequestFailed | None:
        tokens, room = len(work.token_ids), MAX_TOKENS - work.max_new_tokens
        if not 1 <= tokens <= room:
            reason = f"a prompt of {tokens} tokens; 1 to {room} fit beside an answer of {work.max_new_tokens}"
            return RequestFailed(work.request, reason, bad_input=True)
        if max(work.token_ids) >= self._num_tokens:
            reason = f"token id {max(work.token_ids)}, should be below {self._num_tokens}"
            return RequestFailed(work.request, reason, bad_input=True)
        if work.request in self._callers:
            return RequestFailed(work.request, "a request of this number is here already", bad_input=True)
        if len(self._waiting) >= _MOST_WAITING:
            return RequestFailed(work.request, f"{_MOST_WAITING} requests wait already", bad_input=False)
        return None

    def _prefill(self, work: Prefill) -> None:
        def report(tokens: int) -> None:
            self._callers.tell(PrefillProgress(work.request, tokens))

        try:
            prefilled = self._prefiller.prefill(work, report)
        except LLMException as error:
            self._callers.tell(RequestFailed(work.request, str(error), bad_input=False))
            self._callers.done(work.request)
            return
        self._prefilled.add(work.request)
        if work.request not in self._callers:  # its driver went meanwhile
            self._drop(work.request)
            return
        self._callers.tell(prefilled)

    def _drop(self, request: int) -> None:
        self._waiting = deque(work for work in self._waiting if work.request != request)
        if request in self._prefilled:
            self._prefilled.remove(request)
            self._prefiller.drop(request)
