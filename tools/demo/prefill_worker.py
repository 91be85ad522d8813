"""The prefill process: owns a prompt cluster, prefills one request after the other, and lets the decoder pull."""

from __future__ import annotations

import time
import zlib
from multiprocessing.connection import Connection

import numpy as np

from llm_datadist import LLMDataDist, LLMRole
from llm_datadist.examples.smollm2 import ChatTokenizer, SmolLM2, open_model
from llm_datadist.introspection import pool_statistics
from llm_datadist.tools.demo.kv_layout import MAX_TOKENS, PROMPT_CLUSTER, PROMPTS_IN_FLIGHT, pool_bytes
from llm_datadist.tools.demo.messages import (
    AllAnswered,
    Listening,
    PoolLevel,
    Prefilled,
    PrefillProgress,
    Pulled,
)
from llm_datadist.tools.demo.prompt_caches import PromptBlocks, PromptCaches, RequestCaches
from llm_datadist.tools.demo.prompts import Request
from llm_datadist.tools.demo.worker import InputError, free_port, open_datadist, receive


def prefill_requests(connection: Connection, requests: list[Request], max_new_tokens: int, mode: str) -> None:
    """Prefill all requests, and end when the decoder has answered them."""
    file = open_model()
    prompts = _tokenize(ChatTokenizer(file), requests, max_new_tokens)
    model = SmolLM2.load(file)
    port = free_port()
    capacity = pool_bytes(model.hyperparameters, PROMPTS_IN_FLIGHT)
    with open_datadist(LLMRole.PROMPT, PROMPT_CLUSTER, capacity, port) as datadist:
        connection.send(Listening(port, [len(token_ids) for token_ids in prompts.values()]))
        make_caches = RequestCaches if mode == "cache" else PromptBlocks
        worker = _PrefillWorker(
            connection, model, datadist, make_caches(datadist.kv_cache_manager, model.hyperparameters)
        )
        for number, token_ids in prompts.items():
            worker.prefill(number, token_ids)
        connection.send(worker.finish())


def _tokenize(tokenizer: ChatTokenizer, requests: list[Request], max_new_tokens: int) -> dict[int, list[int]]:
    prompts = {request.number: tokenizer.encode_chat(request.prompt) for request in requests}
    room = MAX_TOKENS - max_new_tokens
    for number, token_ids in prompts.items():
        if len(token_ids) > room:
            raise InputError(
                f"the prompt of request {number} has {len(token_ids)} tokens; at most {room} fit beside an answer of "
                f"{max_new_tokens}"
            )
    return prompts


class _PrefillWorker:
    def __init__(self, connection: Connection, model: SmolLM2, datadist: LLMDataDist, caches: PromptCaches) -> None:
        self._connection = connection
        self._model = model
        self._datadist = datadist
        self._caches = caches
        self._peak = 0

    def prefill(self, request: int, token_ids: list[int]) -> None:
        """Prefill a request as soon as there is room for its KV, and announce it."""
        while self._connection.poll() or not self._caches.has_room(len(token_ids)):
            self._read_message()
        kv = self._caches.place(request, len(token_ids))
        self._peak = max(self._peak, pool_statistics(self._datadist).used)

        def report(tokens: int) -> None:
            self._connection.send(PrefillProgress(request, tokens))

        started = time.monotonic()
        logits = self._model.prefill(token_ids, kv, report)
        prefill_s = time.monotonic() - started
        blocks = self._caches.publish(request)
        first_token, checksum = int(np.argmax(logits)), zlib.crc32(logits.data)
        self._connection.send(Prefilled(request, len(token_ids), first_token, checksum, started, prefill_s, blocks))

    def finish(self) -> PoolLevel:
        """Wait until the decoder needs this process no more, give back all caches, and say what the pool holds."""
        while self._read_message():
            pass
        self._caches.close()
        statistics = pool_statistics(self._datadist)
        return PoolLevel(statistics.capacity, self._peak, statistics.used)

    def _read_message(self) -> bool:
        message = receive(self._connection)
        if isinstance(message, Pulled):
            self._caches.pulled(message.request)
        return not isinstance(message, AllAnswered)
