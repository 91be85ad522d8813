"""Drives the requests of a run over whatever services there are, until each of them is answered."""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Callable

from llm_datadist import LLMRole
from llm_datadist.tools.demo.errors import BadInputError, DemoError
from llm_datadist.tools.demo.kv_layout import DECODE_SLOTS
from llm_datadist.tools.demo.messages import (
    Answered,
    Cancel,
    Decoded,
    LevelQuery,
    PoolLevel,
    Prefill,
    Prefilled,
    PrefillProgress,
    Pulled,
    RequestFailed,
    ServiceLevel,
)
from llm_datadist.tools.demo.network.attempt import Attempt
from llm_datadist.tools.demo.network.service_connection import ServiceConnection
from llm_datadist.tools.demo.network.services import Services
from llm_datadist.tools.demo.outcome import Outcome, RequestRecord
from llm_datadist.tools.demo.screen import Screen

_MOST_AT_PROMPT = 2  # one is being prefilled, one waits: the others can go to prompts that come later
_MOST_ATTEMPTS = 20
_BACKOFF_S = 0.2  # times the number of attempts
_SILENCE_S = 60.0  # without a word of an attempt, it has failed
_POLL_S = 0.1
_LEVEL_S = 10.0  # for pools to be empty in the end: a peer's death may have to be noticed first
_LEVEL_AGAIN_S = 0.2


class Driver:
    """One run.

    Parameters
    ----------
    services : Services
        Who can be asked.
    outcome : Outcome
        Receives what happens.
    screen : Screen
        Shows it.
    prompts : dict of int to list of int
        Token ids of each request, by its number.
    wait_s : float
        Seconds without a prompt or without a decoder after which the run has failed.
    """

    def __init__(
        self, services: Services, outcome: Outcome, screen: Screen, prompts: dict[int, list[int]], wait_s: float
    ) -> None:
        self._services = services
        self._outcome = outcome
        self._screen = screen
        self._prompts = prompts
        self._wait_s = wait_s
        self._queue: deque[tuple[float, RequestRecord]] = deque((0.0, record) for record in outcome.records)
        self._attempts: dict[int, Attempt] = {}
        # Numbers that no other driver, and no attempt of this one that may still be somewhere, has.
        self._numbers = count(secrets.randbits(62))
        self._pairs: Counter[tuple[str, str]] = Counter()  # how often a decoder was sent to a prompt
        self._levels: dict[ServiceConnection, PoolLevel] = {}
        self._handlers: dict[type, Callable[[Attempt, Any], None]] = {
            PrefillProgress: self._on_progress,
            Prefilled: self._on_prefilled,
            Pulled: self._on_pulled,
            Answered: self._on_answered,
            RequestFailed: self._on_failed,
        }

    def wait_for(self, prompts: int, decoders: int) -> None:
        """Wait until so many services are there.

        Raises
        ------
        DemoError
            They are not within the time.
        """
        deadline = time.monotonic() + self._wait_s
        wanted = {LLMRole.PROMPT: prompts, LLMRole.DECODER: decoders}
        while not all(len(self._services.ready(role)) >= number for role, number in wanted.items()):
            if time.monotonic() > deadline:
                there = _names(self._services.ready()) or "nobody"
                raise DemoError(
                    f"{prompts} prompts and {decoders} decoders are not there within {self._wait_s:g} s: {there} is"
                )
            self._services.poll(_POLL_S)

    def run(self) -> None:
        """Have all requests answered.

        Raises
        ------
        DemoError
            A request failed too often, or there was nobody to work on it for too long.
        """
        for record in self._outcome.records:
            record.prompt_tokens = len(self._prompts[record.request.number])
        prompts, decoders = (_names(self._services.ready(role)) for role in (LLMRole.PROMPT, LLMRole.DECODER))
        self._screen.serving(self._outcome.records, f"prefill by {prompts}, decode by {decoders}")
        served_s = time.monotonic()
        while self._queue or self._attempts:
            if all(self._services.ready(role) for role in (LLMRole.PROMPT, LLMRole.DECODER)):
                served_s = time.monotonic()
            elif time.monotonic() - served_s > self._wait_s:
                there = _names(self._services.ready()) or "nobody"
                raise DemoError(f"no prompt or no decoder for {self._wait_s:g} s: {there} is there")
            self._assign()
            self._handle(_POLL_S)
            self._give_up_silent()

    def ask_levels(self) -> None:
        """Ask the services that are there how full their pools are, until all are empty or the time is over."""
        deadline = time.monotonic() + _LEVEL_S
        asked_s = float("-inf")
        self._levels = {}
        while time.monotonic() < deadline:
            ready = self._services.ready()
            if all(service in self._levels and self._levels[service].used == 0 for service in ready):
                break
            if time.monotonic() - asked_s > _LEVEL_AGAIN_S:
                asked_s = time.monotonic()
                for service in ready:
                    service.send(LevelQuery())
            self._handle(_LEVEL_AGAIN_S)
        self._outcome.pools = {service.name: level for service, level in self._levels.items()}

    def _assign(self) -> None:
        now = time.monotonic()
        for _ in range(len(self._queue)):
            not_before_s, record = self._queue.popleft()
            if now < not_before_s or not self._begin(record):
                self._queue.append((not_before_s, record))
        for attempt in list(self._attempts.values()):
            if attempt.needs_decoder:
                self._hand_over(attempt)

    def _begin(self, record: RequestRecord) -> bool:
        """Send a request to the prompt that has least to do; False if all have enough."""
        load = Counter(attempt.prompt for attempt in self._attempts.values() if not attempt.pulled)
        for prompt in sorted(self._services.ready(LLMRole.PROMPT), key=lambda service: load[service]):
            if load[prompt] >= _MOST_AT_PROMPT:
                return False
            request = next(self._numbers)
            work = Prefill(request, self._prompts[record.request.number], self._outcome.max_new_tokens)
            if prompt.send(work):
                record.prefilled_by = prompt.name
                self._attempts[request] = Attempt(request, record, prompt)
                return True
        return False

    def _hand_over(self, attempt: Attempt) -> None:
        """Send a prefilled request to a decoder with a place, if there is one: the one that pulled least from there."""
        load = Counter(other.decoder for other in self._attempts.values())
        decoders = [service for service in self._services.ready(LLMRole.DECODER) if load[service] < DECODE_SLOTS]
        for decoder in sorted(
            decoders, key=lambda service: (self._pairs[attempt.prompt.name, service.name], load[service])
        ):
            assert attempt.prefilled is not None
            if decoder.send(attempt.prefilled):
                attempt.decoder = decoder
                attempt.heard_s = time.monotonic()
                attempt.record.decoded_by = decoder.name
                self._pairs[attempt.prompt.name, decoder.name] += 1
                return

    def _handle(self, timeout_s: float) -> None:
        for service, message in self._services.poll(timeout_s):
            if message is None:
                self._on_lost(service)
            elif isinstance(message, ServiceLevel):
                self._on_level(service, message)
            elif isinstance(message, Decoded):
                self._on_decoded(message)
            elif type(message) in self._handlers and message.request in self._attempts:
                attempt = self._attempts[message.request]
                attempt.heard_s = time.monotonic()
                self._handlers[type(message)](attempt, message)

    def _on_level(self, service: ServiceConnection, level: ServiceLevel) -> None:
        # Bytes that requests of others explain are not this run's.
        used = 0 if level.others and not level.yours else level.used
        self._levels[service] = PoolLevel(level.capacity, level.peak, used)

    def _on_lost(self, service: ServiceConnection) -> None:
        self._levels.pop(service, None)
        for attempt in list(self._attempts.values()):
            if attempt.needs(service):
                self._again(attempt, f"{service.name} is gone")

    def _on_progress(self, attempt: Attempt, progress: PrefillProgress) -> None:
        self._screen.prefilling(attempt.record.request.number, progress.tokens)

    def _on_prefilled(self, attempt: Attempt, prefilled: Prefilled) -> None:
        attempt.prefilled = prefilled
        number = attempt.record.request.number
        # Clocks of other hosts say nothing here.
        started_s = time.monotonic() - prefilled.prefill_s
        attempt.record.prefilled = replace(prefilled, request=number, started_s=started_s)
        self._screen.prefilled(attempt.record)

    def _on_pulled(self, attempt: Attempt, pulled: Pulled) -> None:
        attempt.pulled = True
        attempt.prompt.send(pulled)
        attempt.record.pulled = replace(pulled, request=attempt.record.request.number)
        self._screen.pulled(attempt.record)

    def _on_decoded(self, decoded: Decoded) -> None:
        now = time.monotonic()
        pieces = []
        for request, piece in decoded.pieces:
            if request in self._attempts:
                attempt = self._attempts[request]
                attempt.heard_s = now
                attempt.pieces += 1
                if attempt.pieces == 2:  # the first token was made by the prefill
                    attempt.first_decoded_s = now
                pieces.append((attempt.record.request.number, piece))
        self._screen.decoded(pieces)

    def _on_answered(self, attempt: Attempt, answered: Answered) -> None:
        del self._attempts[attempt.request]
        number, first_decoded_s = attempt.record.request.number, attempt.first_decoded_s
        attempt.record.answered = replace(answered, request=number, first_decoded_s=first_decoded_s)
        self._screen.answered(attempt.record)

    def _on_failed(self, attempt: Attempt, failed: RequestFailed) -> None:
        if failed.bad_input:
            raise BadInputError(f"request {attempt.record.request.number}: {failed.reason}")
        self._again(attempt, failed.reason)

    def _give_up_silent(self) -> None:
        now = time.monotonic()
        for attempt in list(self._attempts.values()):
            silent = attempt.decoder or attempt.prompt
            if not attempt.needs_decoder and now - attempt.heard_s > _SILENCE_S:
                self._again(attempt, f"no word from {silent.name} for {_SILENCE_S:.0f} s")

    def _again(self, attempt: Attempt, reason: str) -> None:
        """Begin again from the prompt; who has something of the attempt is told to forget it."""
        del self._attempts[attempt.request]
        if not attempt.pulled:
            attempt.prompt.send(Cancel(attempt.request))
        if attempt.decoder is not None:
            attempt.decoder.send(Cancel(attempt.request))
        record = attempt.record
        self._screen.retried(record, reason)
        if record.attempts == _MOST_ATTEMPTS:
            raise DemoError(f"request {record.request.number} failed {_MOST_ATTEMPTS} times, at last: {reason}")
        self._queue.appendleft((time.monotonic() + _BACKOFF_S * record.attempts, record))
        record.attempts += 1
        record.prefilled = record.pulled = None
        record.prefilled_by = record.decoded_by = ""


def _names(services: Sequence[ServiceConnection]) -> str:
    return ", ".join(service.name for service in services)
