"""What it costs to allocate a cache and to give it back, with no other cache and with many of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from llm_datadist import CacheKey, KvCache, KvCacheManager, LLMRole

from .instances import free_port, new_datadist
from .measurement import Row, Target
from .prompt_process import PROMPT, bytes_desc

TOPIC = "allocation"
TENSORS = 60
LIVE = (0, 1_000, 10_000, 100_000)
CURVE = "allocation over live caches"
MOST_US = 8.0
MOST_GROWTH = 1.25  # "unchanged", with room for the caches of the processor, which hold less of larger tables
RUNS = 2000
POOL_BYTES = 256 << 20

_DESC = bytes_desc(TENSORS, 1, 4096)
_LIVE_DESC = bytes_desc(1, 1, 512)


def measure() -> Iterator[Row]:
    """Allocate and deallocate a cache of 60 tensors with one key."""
    datadist = new_datadist(LLMRole.PROMPT, PROMPT, POOL_BYTES, free_port())
    try:
        manager = datadist.kv_cache_manager
        live: list[KvCache] = []
        alone = 0.0
        for count in LIVE:
            live += [manager.allocate_cache(_LIVE_DESC) for _ in range(count - len(live))]
            taken, whole = _cycles(manager)
            median = statistics.median(taken)
            alone = alone or median
            targets = [Target("us median", median, MOST_US, at_least=False)]
            if count == LIVE[-1]:
                targets.append(Target("x none live", median / alone, MOST_GROWTH, at_least=False))
            beside = f"{count:,} live caches"
            name = f"allocate_cache + deallocate_cache, one key, 60 tensors, {beside}"
            wanted = tuple(targets) if count in (LIVE[0], LIVE[-1]) else ()
            yield Row(TOPIC, name, taken, targets=wanted, point=(CURVE, count))
            if count in (LIVE[0], LIVE[-1]):
                yield Row(TOPIC, f"the same and remove_cache_key, {beside}", whole)
    finally:
        datadist.finalize()


def _cycles(manager: KvCacheManager) -> tuple[list[float], list[float]]:
    """Time both calls, and both with the one that gives the memory back: a key holds its cache until it is gone."""
    clock = time.perf_counter_ns
    taken, whole = [], []
    for run in range(RUNS + 2):
        keys = [CacheKey(PROMPT, run + 1)]
        started = clock()
        cache = manager.allocate_cache(_DESC, keys)
        manager.deallocate_cache(cache)
        ended = clock()
        manager.remove_cache_key(keys[0])
        removed = clock()
        taken.append((ended - started) / 1e3)
        whole.append((removed - started) / 1e3)
    return taken[2:], whole[2:]
