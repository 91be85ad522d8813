"""The decode process: pulls prefilled requests and decodes them together.

Continuous batching: a request joins the batch as soon as a place is free, and leaves it when its answer is complete,
whatever the others do.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import LLMClusterInfo, LLMRole, LLMStatusCode
from llm_datadist.examples.smollm2 import ChatTokenizer, KvSequence, SmolLM2, TextStream, open_model
from llm_datadist.introspection import pool_statistics
from llm_datadist.tools.demo.decoder_caches import DecoderBlocks, DecoderCaches, DecoderSlots
from llm_datadist.tools.demo.kv_layout import DECODE_SLOTS, DECODER_CLUSTER, PROMPT_CLUSTER, pool_bytes
from llm_datadist.tools.demo.messages import AllPrefilled, Answered, Decoded, Listening, PoolLevel, Prefilled, Pulled
from llm_datadist.tools.demo.worker import HOST, open_datadist, receive


def decode_requests(connection: Connection, max_new_tokens: int, mode: str) -> None:
    """Decode the requests that the parent announces, until it says that no more will come."""
    file = open_model()
    tokenizer, model = ChatTokenizer(file), SmolLM2.load(file)
    capacity = pool_bytes(model.hyperparameters, DECODE_SLOTS)
    with open_datadist(LLMRole.DECODER, DECODER_CLUSTER, capacity) as datadist:
        make_caches = DecoderSlots if mode == "cache" else DecoderBlocks
        caches = make_caches(datadist.kv_cache_manager, model.hyperparameters)
        peak = pool_statistics(datadist).used
        listening = receive(connection)
        assert isinstance(listening, Listening)
        prompt = _cluster(listening.port)
        _check_all_done("link", datadist.link_clusters([prompt]))
        _Batch(connection, tokenizer, model, caches, max_new_tokens).run()
        caches.close()
        statistics = pool_statistics(datadist)
        _check_all_done("unlink", datadist.unlink_clusters([prompt]))
        connection.send(PoolLevel(statistics.capacity, peak, statistics.used))


def _cluster(port: int) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT_CLUSTER
    cluster.append_local_ip_info(HOST, 0)
    cluster.append_remote_ip_info(HOST, port)
    return cluster


def _check_all_done(verb: str, result: tuple[LLMStatusCode, list[LLMStatusCode]]) -> None:
    overall, each = result
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"cannot {verb} the prompt cluster: {overall}, {each}")


class _Sequence:
    """A request in the batch."""

    def __init__(self, prefilled: Prefilled, kv: KvSequence, text: TextStream) -> None:
        self.request = prefilled.request
        self.kv = kv
        self.position = prefilled.prompt_tokens  # of the newest token, whose K and V are not yet there
        self.token_ids = [prefilled.first_token]
        self.logits_checksum = prefilled.logits_checksum
        self.text = text
        self.joined_s = time.monotonic()
        self.first_decoded_s: float | None = None


class _Batch:
    """Requests that wait for a place, and those that are decoded."""

    def __init__(
        self,
        connection: Connection,
        tokenizer: ChatTokenizer,
        model: SmolLM2,
        caches: DecoderCaches,
        max_new_tokens: int,
    ) -> None:
        self._connection = connection
        self._tokenizer = tokenizer
        self._model = model
        self._caches = caches
        self._max_new_tokens = max_new_tokens
        self._waiting: deque[Prefilled] = deque()
        self._active: list[_Sequence] = []
        self._more_to_come = True

    def run(self) -> None:
        """Decode until every announced request is answered and no more will come."""
        while self._more_to_come or self._waiting or self._active:
            self._read_messages()
            while self._waiting and len(self._active) < DECODE_SLOTS:
                self._join(self._waiting.popleft())
            if self._active:
                self._step()

    def _read_messages(self) -> None:
        idle = not self._waiting and not self._active
        while idle or (self._more_to_come and self._connection.poll()):
            message = receive(self._connection)
            if isinstance(message, AllPrefilled):
                self._more_to_come = False
            else:
                self._waiting.append(message)
            idle = False

    def _join(self, prefilled: Prefilled) -> None:
        kv, place, nbytes, pull_s = self._caches.pull(prefilled, self._max_new_tokens)
        self._connection.send(Pulled(prefilled.request, place, nbytes, pull_s))
        sequence = _Sequence(prefilled, kv, TextStream(self._tokenizer))
        self._connection.send(Decoded([(sequence.request, sequence.text.push(prefilled.first_token))]))
        if not self._leave_if_complete(sequence):
            self._active.append(sequence)

    def _step(self) -> None:
        batch = self._active
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
        self._connection.send(Decoded(pieces))
        self._active = [sequence for sequence in batch if not self._leave_if_complete(sequence)]

    def _leave_if_complete(self, sequence: _Sequence) -> bool:
        token_ids = sequence.token_ids
        if len(token_ids) < self._max_new_tokens and token_ids[-1] != self._tokenizer.end_of_turn:
            return False
        self._caches.release(sequence.request)
        decode_s = time.monotonic() - sequence.joined_s
        text = self._tokenizer.decode(token_ids)
        self._connection.send(
            Answered(sequence.request, token_ids, sequence.logits_checksum, text, sequence.first_decoded_s, decode_s)
        )
        return True
