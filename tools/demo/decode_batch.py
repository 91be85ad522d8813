"""Pulls prefilled requests and decodes them together; what drives it decides when and which.

Continuous batching: a request joins the batch as soon as a place is free, and leaves it when its answer is complete,
whatever the others do.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Callable, NamedTuple, Union

import numpy as np

from llm_datadist import LLMDataDist, LLMException, LLMStatusCode
from llm_datadist.examples.smollm2 import ChatTokenizer, KvSequence, SmolLM2, TextStream
from llm_datadist.introspection import describe_links, pool_statistics
from llm_datadist.tools.demo.decoder_caches import DecoderBlocks, DecoderCaches, DecoderSlots
from llm_datadist.tools.demo.kv_layout import DECODE_SLOTS
from llm_datadist.tools.demo.messages import Answered, Decoded, PoolLevel, Prefilled, Pulled, RequestFailed

_LINK_GRACE_S = 5.0  # for a link that others are making: a request may be there before it

Report = Union[Pulled, Decoded, Answered, RequestFailed]


class _Waiting(NamedTuple):
    prefilled: Prefilled
    since_s: float


class _Sequence:
    """A request in the batch."""

    def __init__(self, prefilled: Prefilled, kv: KvSequence, text: TextStream) -> None:
        self.request = prefilled.request
        self.kv = kv
        self.position = prefilled.prompt_tokens  # of the newest token, whose K and V are not yet there
        self.max_new_tokens = prefilled.max_new_tokens
        self.token_ids = [prefilled.first_token]
        self.logits_checksum = prefilled.logits_checksum
        self.text = text
        self.joined_s = time.monotonic()
        self.first_decoded_s: float | None = None


class DecodeBatch:
    """Requests that wait for a place, and those that are decoded; for one thread.

    Parameters
    ----------
    datadist : LLMDataDist
        An initialised DECODER; it must stay initialised until `close`.
    tokenizer : ChatTokenizer
        Makes the text, and knows which token ends an answer.
    model : SmolLM2
        The model.
    mode : str
        ``"cache"`` or ``"blocks"``.
    hold : callable
        Gives the context manager in which a pull from a cluster runs; it may raise LLMException.
    """

    def __init__(
        self,
        datadist: LLMDataDist,
        tokenizer: ChatTokenizer,
        model: SmolLM2,
        mode: str,
        hold: Callable[[int], AbstractContextManager[None]] = lambda cluster_id: nullcontext(),
    ) -> None:
        make_caches = DecoderSlots if mode == "cache" else DecoderBlocks
        self._datadist = datadist
        self._tokenizer = tokenizer
        self._model = model
        self._caches: DecoderCaches = make_caches(datadist.kv_cache_manager, model.hyperparameters)
        self._hold = hold
        self._waiting: list[_Waiting] = []
        self._active: list[_Sequence] = []
        self._peak = pool_statistics(datadist).used

    @property
    def decoding(self) -> bool:
        """Whether there is a step to take."""
        return bool(self._active)

    @property
    def waiting(self) -> bool:
        """Whether a request waits for a place or for its link."""
        return bool(self._waiting)

    def add(self, prefilled: Prefilled) -> None:
        """Take over a request; it joins the batch with one of the next steps."""
        self._waiting.append(_Waiting(prefilled, time.monotonic()))

    def cancel(self, request: int) -> None:
        """Forget a request, if it is here."""
        self._waiting = [waiting for waiting in self._waiting if waiting.prefilled.request != request]
        if any(sequence.request == request for sequence in self._active):
            self._active = [sequence for sequence in self._active if sequence.request != request]
            self._caches.release(request)

    def step(self) -> Iterator[Report]:
        """Let requests join where there are places, then make the next token of each; yields what happens to them."""
        waiting, self._waiting = self._waiting, []
        for candidate in waiting:
            if len(self._active) == DECODE_SLOTS:
                self._waiting.append(candidate)
            else:
                yield from self._join(candidate)
        if self._active:
            yield from self._decode()

    def close(self) -> None:
        """Give back all memory."""
        self._caches.close()

    def level(self) -> PoolLevel:
        """Return what the pool holds now, and what it has held at most."""
        statistics = pool_statistics(self._datadist)
        return PoolLevel(statistics.capacity, self._peak, statistics.used)

    def _join(self, candidate: _Waiting) -> Iterator[Report]:
        """Pull a request and put it into the batch, or let it wait for its link."""
        prefilled = candidate.prefilled
        try:
            with self._hold(prefilled.prompt_cluster):
                kv, place, nbytes, pull_s, copy_s = self._caches.pull(prefilled)
        except LLMException as error:
            early = time.monotonic() - candidate.since_s < _LINK_GRACE_S
            if error.status_code == LLMStatusCode.LLM_NOT_YET_LINK and early:
                self._waiting.append(candidate)
            else:
                yield RequestFailed(prefilled.request, str(error), bad_input=False)
            return
        sequence = _Sequence(prefilled, kv, TextStream(self._tokenizer))
        self._active.append(sequence)
        yield Pulled(prefilled.request, place, nbytes, pull_s, copy_s, self._transport(prefilled.prompt_cluster))
        yield Decoded([(sequence.request, sequence.text.push(prefilled.first_token))])
        yield from self._let_go([sequence])

    def _transport(self, cluster_id: int) -> str:
        # A link may go in the very moment after a pull.
        found = (link.transport for link in describe_links(self._datadist) if link.cluster_id == cluster_id)
        return next(found, "a link that is gone")

    def _decode(self) -> Iterator[Report]:
        batch = list(self._active)
        logits = self._model.decode(
            [sequence.token_ids[-1] for sequence in batch],
            [sequence.position for sequence in batch],
            [sequence.kv for sequence in batch],
        )
        now = time.monotonic()
        pieces = []
        for sequence, row in zip(batch, logits):
            token = int(np.argmax(row))
            sequence.token_ids.append(token)
            sequence.logits_checksum = zlib.crc32(row.data, sequence.logits_checksum)
            sequence.position += 1
            if sequence.first_decoded_s is None:
                sequence.first_decoded_s = now
            pieces.append((sequence.request, sequence.text.push(token)))
        yield Decoded(pieces)
        yield from self._let_go(batch)

    def _let_go(self, sequences: list[_Sequence]) -> Iterator[Answered]:
        """Take those out of the batch that are complete."""
        for sequence in sequences:
            token_ids = sequence.token_ids
            if len(token_ids) < sequence.max_new_tokens and token_ids[-1] != self._tokenizer.end_of_turn:
                continue
            self._active.remove(sequence)
            self._caches.release(sequence.request)
            decode_s = time.monotonic() - sequence.joined_s
            text = self._tokenizer.decode(token_ids)
            yield Answered(
                sequence.request, token_ids, sequence.logits_checksum, text, sequence.first_decoded_s, decode_s
            )
