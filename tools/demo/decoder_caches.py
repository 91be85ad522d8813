"""KV memory of the decode process, in its two forms.

A request is pulled in by `pull` and leaves with `release` when its answer is complete. `close` gives everything back.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from llm_datadist import BlocksCacheKey, CacheKey, KvCacheManager, LLMException
from llm_datadist.examples.smollm2 import ContiguousSequence, Hyperparameters, KvSequence, PagedSequence
from llm_datadist.tools.demo.block_allocator import BlockAllocator
from llm_datadist.tools.demo.cache_memory import CacheMemory, memory_of
from llm_datadist.tools.demo.kv_layout import (
    BLOCK_SIZE,
    DECODE_SLOTS,
    blocks_desc,
    blocks_of,
    contiguous_desc,
    token_bytes,
)
from llm_datadist.tools.demo.messages import Prefilled


class Arrival(NamedTuple):
    """A request whose KV cache was pulled."""

    kv: KvSequence
    place: str  # in words
    nbytes: int
    pull_s: float  # duration of the one call that pulled
    copy_s: float  # out of the cache, if the host cannot see it


class DecoderCaches(Protocol):
    """KV memory of the requests that are being decoded."""

    def pull(self, prefilled: Prefilled) -> Arrival:
        """Pull a request into memory that has room for its answer; if that fails, the memory is free again."""

    def release(self, request: int) -> None:
        """Use the memory of a request for others."""

    def close(self) -> None:
        """Give back all memory."""


class DecoderSlots:
    """One contiguous cache with a slot for each request (mode "cache")."""

    def __init__(self, manager: KvCacheManager, sizes: Hyperparameters) -> None:
        self._manager = manager
        self._sizes = sizes
        self._cache = manager.allocate_cache(contiguous_desc(sizes, DECODE_SLOTS))
        self._memory: CacheMemory | None = memory_of(manager, self._cache)
        self._free = list(range(DECODE_SLOTS))
        self._slots: dict[int, int] = {}

    def pull(self, prefilled: Prefilled) -> Arrival:
        assert self._memory is not None
        slot = self._free.pop(0)
        self._slots[prefilled.request] = slot
        # The rest of the slot is unused; a pull of the first bytes releases the key like a pull of the whole.
        size = prefilled.prompt_tokens * token_bytes(self._sizes)
        key = CacheKey(prefilled.prompt_cluster, prefilled.request)
        started = time.perf_counter()
        try:
            self._manager.pull_cache(key, self._cache, batch_index=slot, size=size)
            pull_s = time.perf_counter() - started
            copy_s = self._memory.fetch([slot], prefilled.prompt_tokens)
        except LLMException:
            self.release(prefilled.request)
            raise
        kv = ContiguousSequence(self._memory.arrays, slot)
        return Arrival(kv, f"slot {slot}", size * self._sizes.num_kv_tensors, pull_s, copy_s)

    def release(self, request: int) -> None:
        self._free.append(self._slots.pop(request))

    def close(self) -> None:
        self._memory = None  # views, if they are
        self._manager.deallocate_cache(self._cache)


class DecoderBlocks:
    """One paged cache with a block table for each request (mode "blocks")."""

    def __init__(self, manager: KvCacheManager, sizes: Hyperparameters) -> None:
        desc = blocks_desc(sizes, DECODE_SLOTS)
        self._manager = manager
        self._sizes = sizes
        self._cache = manager.allocate_blocks_cache(desc)
        self._memory: CacheMemory | None = memory_of(manager, self._cache)
        self._blocks = BlockAllocator(desc.shape[0])
        self._block_tables: dict[int, list[int]] = {}

    def pull(self, prefilled: Prefilled) -> Arrival:
        assert self._memory is not None
        tokens = prefilled.prompt_tokens + prefilled.max_new_tokens
        block_table = self._blocks.allocate(blocks_of(tokens))
        self._block_tables[prefilled.request] = block_table
        theirs, ours = prefilled.blocks, block_table[: len(prefilled.blocks)]
        key = BlocksCacheKey(prefilled.prompt_cluster)
        started = time.perf_counter()
        try:
            self._manager.pull_blocks(key, self._cache, theirs, ours)
            pull_s = time.perf_counter() - started
            copy_s = self._memory.fetch(ours, BLOCK_SIZE)
        except LLMException:
            self.release(prefilled.request)
            raise
        nbytes = len(ours) * BLOCK_SIZE * token_bytes(self._sizes) * self._sizes.num_kv_tensors
        kv = PagedSequence(self._memory.arrays, block_table)
        return Arrival(kv, f"{len(ours)} blocks", nbytes, pull_s, copy_s)

    def release(self, request: int) -> None:
        self._blocks.free(self._block_tables.pop(request))

    def close(self) -> None:
        self._memory = None  # views, if they are
        self._manager.deallocate_cache(self._cache)
