"""Prefills requests and lets decoders pull their KV caches; what drives it decides when and which."""

from __future__ import annotations

import time
import zlib
from typing import Callable

import numpy as np

from llm_datadist import LLMDataDist, LLMException
from llm_datadist.examples.smollm2 import SmolLM2
from llm_datadist.introspection import pool_statistics
from llm_datadist.tools.demo.messages import PoolLevel, Prefill, Prefilled
from llm_datadist.tools.demo.prompt_caches import PromptBlocks, PromptCaches, RequestCaches


class Prefiller:
    """The model of a prompt process and its KV caches; for one thread.

    Parameters
    ----------
    model : SmolLM2
        The model.
    datadist : LLMDataDist
        An initialised PROMPT; it must stay initialised until `close`.
    cluster_id : int
        Its cluster id.
    mode : str
        ``"cache"`` or ``"blocks"``.
    """

    def __init__(self, model: SmolLM2, datadist: LLMDataDist, cluster_id: int, mode: str) -> None:
        make_caches = RequestCaches if mode == "cache" else PromptBlocks
        self._model = model
        self._datadist = datadist
        self._cluster_id = cluster_id
        self._caches: PromptCaches = make_caches(datadist.kv_cache_manager, model.hyperparameters, cluster_id)
        self._peak = 0

    def has_room(self, tokens: int) -> bool:
        """Tell whether a prompt of `tokens` tokens can be prefilled now."""
        return self._caches.has_room(tokens)

    def prefill(self, work: Prefill, report: Callable[[int], None]) -> Prefilled:
        """Prefill a request and publish its KV cache; `report` is called with the number of tokens that are done."""
        kv = self._caches.place(work.request, len(work.token_ids))
        self._peak = max(self._peak, pool_statistics(self._datadist).used)
        started = time.monotonic()
        logits = self._model.prefill(work.token_ids, kv, report)
        prefill_s = time.monotonic() - started
        try:
            copy_s = self._caches.store(work.request)
        except LLMException:
            self._caches.drop(work.request)
            raise
        return Prefilled(
            work.request,
            self._cluster_id,
            len(work.token_ids),
            work.max_new_tokens,
            first_token=int(np.argmax(logits)),
            logits_checksum=zlib.crc32(logits.data),
            started_s=started,
            prefill_s=prefill_s,
            copy_s=copy_s,
            blocks=self._caches.publish(work.request),
        )

    def pulled(self, request: int) -> None:
        """Use the memory of a request for others: a decoder has it."""
        self._caches.pulled(request)

    def drop(self, request: int) -> None:
        """Use the memory of a prefilled request for others, whether or not a decoder has pulled it."""
        self._caches.drop(request)

    def close(self) -> None:
        """Give back all caches."""
        self._caches.close()

    def level(self) -> PoolLevel:
        """Return what the pool holds now, and what it has held at most."""
        statistics = pool_statistics(self._datadist)
        return PoolLevel(statistics.capacity, self._peak, statistics.used)
