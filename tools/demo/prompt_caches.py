"""KV memory of the prefill process, in its two forms.

A request goes through `place` (memory to prefill into), `store` (what was prefilled is in the cache), `publish`
(decoders may pull) and `pulled` (the memory may be used again), or `drop` if nobody is going to pull it. `close` gives
everything back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from llm_datadist import BlocksCacheKey, CacheKey, KvCache, KvCacheManager
from llm_datadist.examples.smollm2 import ContiguousSequence, Hyperparameters, KvSequence, PagedSequence
from llm_datadist.tools.demo.block_allocator import BlockAllocator
from llm_datadist.tools.demo.cache_memory import CacheMemory, memory_of
from llm_datadist.tools.demo.kv_layout import (
    BLOCK_SIZE,
    PROMPTS_IN_FLIGHT,
    blocks_desc,
    blocks_of,
    contiguous_desc,
)


class PromptCaches(Protocol):
    """KV memory of the requests between their prefill and their pull."""

    def has_room(self, tokens: int) -> bool:
        """Tell whether a prompt of `tokens` tokens can be placed now."""

    def place(self, request: int, tokens: int) -> KvSequence:
        """Return memory for the prompt of a request."""

    def store(self, request: int) -> float:
        """See to it that the cache holds what was written into the memory of `place`; gives the seconds it took."""

    def publish(self, request: int) -> list[int]:
        """Let decoders pull the request; return its block table, empty if its key is enough."""

    def pulled(self, request: int) -> None:
        """Take note that a decoder has pulled the request."""

    def drop(self, request: int) -> None:
        """Take back a request that was placed, whether or not it was published and pulled."""

    def close(self) -> None:
        """Give back all memory."""


class _Filling(NamedTuple):
    cache: KvCache
    memory: CacheMemory
    tokens: int


class RequestCaches:
    """A cache of its own for each request, named by a CacheKey (mode "cache")."""

    def __init__(self, manager: KvCacheManager, sizes: Hyperparameters, cluster_id: int) -> None:
        self._manager = manager
        self._sizes = sizes
        self._cluster_id = cluster_id
        self._filling: dict[int, _Filling] = {}
        self._published: set[int] = set()

    def has_room(self, tokens: int) -> bool:
        return len(self._filling) + len(self._published) < PROMPTS_IN_FLIGHT

    def place(self, request: int, tokens: int) -> KvSequence:
        desc = contiguous_desc(self._sizes, slots=1)
        cache = self._manager.allocate_cache(desc, [CacheKey(self._cluster_id, request)])
        memory = memory_of(self._manager, cache)
        self._filling[request] = _Filling(cache, memory, tokens)
        return ContiguousSequence(memory.arrays, slot=0)

    def store(self, request: int) -> float:
        filling = self._filling[request]
        return filling.memory.store([0], filling.tokens)

    def publish(self, request: int) -> list[int]:
        # From now on the key alone holds the memory: the pull releases the key, and with it the memory.
        self._manager.deallocate_cache(self._filling.pop(request).cache)
        self._published.add(request)
        return []

    def pulled(self, request: int) -> None:
        self._published.remove(request)

    def drop(self, request: int) -> None:
        if request in self._filling:
            self.publish(request)
        self._manager.remove_cache_key(CacheKey(self._cluster_id, request))
        self._published.remove(request)

    def close(self) -> None:
        for filling in self._filling.values():
            self._manager.deallocate_cache(filling.cache)
        for request in list(self._published):
            self.drop(request)


class PromptBlocks:
    """One paged cache for all requests, named by a BlocksCacheKey (mode "blocks")."""

    def __init__(self, manager: KvCacheManager, sizes: Hyperparameters, cluster_id: int) -> None:
        desc = blocks_desc(sizes, PROMPTS_IN_FLIGHT)
        self._manager = manager
        self._cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(cluster_id))
        self._memory: CacheMemory | None = memory_of(manager, self._cache)
        self._blocks = BlockAllocator(desc.shape[0])
        self._block_tables: dict[int, list[int]] = {}

    def has_room(self, tokens: int) -> bool:
        return blocks_of(tokens) <= self._blocks.num_free

    def place(self, request: int, tokens: int) -> KvSequence:
        block_table = self._blocks.allocate(blocks_of(tokens))
        self._block_tables[request] = block_table
        assert self._memory is not None
        return PagedSequence(self._memory.arrays, block_table)

    def store(self, request: int) -> float:
        assert self._memory is not None
        return self._memory.store(self._block_tables[request], BLOCK_SIZE)

    def publish(self, request: int) -> list[int]:
        return self._block_tables[request]

    def pulled(self, request: int) -> None:
        self._blocks.free(self._block_tables.pop(request))

    def drop(self, request: int) -> None:
        self.pulled(request)

    def close(self) -> None:
        self._memory = None  # views, if they are
        self._manager.deallocate_cache(self._cache)
