"""Where the time of a pull goes: the same pull begun at each layer, from the public call down to the copy.

What a layer costs is the difference to the layer below it. Only this benchmark calls private names: it has to enter the
layers from the side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial

from llm_datadist import BlocksCacheKey, KvCacheManager
from llm_datadist._local import block_pairs
from llm_datadist.engine.engine import Engine

from .measurement import Operation, Row
from .prompt_process import PROMPT, cache_key, linked_pair
from .work import CONTIGUOUS, ONE_BLOCK, TENSORS, Work

TOPIC = "parts"
BATCHES = 25
ALL = -1  # remote tensors
_MINUTE_NS = 60 * 10**9

PUBLIC = "public call: checks of the arguments"
ENGINE = "engine: cache, link, geometry, deadline"
TABLE = "engine: block table unpacked"
NATIVE = "native: key found, claimed, released"
COPY = "native: copy"


def measure() -> Iterator[Row]:
    """Take apart a pull of one block of 16 KiB in each of two tensors, and one of 256 MiB."""
    with linked_pair({0: ONE_BLOCK.desc, 1: CONTIGUOUS.desc}) as (datadist, _):
        manager = datadist.kv_cache_manager
        yield from _rows(ONE_BLOCK, _small(manager), calls=400)
        yield from _rows(CONTIGUOUS, _large(manager), calls=1)


def _small(manager: KvCacheManager) -> dict[str, Operation]:
    engine = manager._engine
    assert isinstance(engine, Engine)
    key = BlocksCacheKey(PROMPT, 0)
    cache = manager.allocate_blocks_cache(ONE_BLOCK.desc)
    end, local = engine._links.puller("", PROMPT), engine._caches.by_id[cache.cache_id]
    source, target = [7], [9]
    deadline = time.monotonic_ns() + _MINUTE_NS
    native = partial(
        end.pull_blocks, local, *key._name[:2], 0, 0, block_pairs(source, target), 0, ALL, 0, TENSORS, None, deadline
    )
    empty = partial(end.pull_cache, local, *key._name[:2], 0, 0, 0, 0, 0, ALL, 0, TENSORS, 0, 0, False, deadline)
    whole = partial(manager.pull_blocks, key, cache, source, target)
    inside = partial(engine.pull_blocks, PROMPT, key._name, cache.cache_id, source, target, None, None)
    return {PUBLIC: whole, ENGINE: inside, COPY: native, NATIVE: empty, TABLE: partial(block_pairs, source, target)}


def _large(manager: KvCacheManager) -> dict[str, Operation]:
    engine = manager._engine
    assert isinstance(engine, Engine)
    key = cache_key(1)
    cache = manager.allocate_cache(CONTIGUOUS.desc)
    end, local = engine._links.puller("", PROMPT), engine._caches.by_id[cache.cache_id]
    deadline = time.monotonic_ns() + _MINUTE_NS

    def native(nbytes: int) -> None:
        kind, number, model = key._name
        end.pull_cache(local, kind, number, model, 0, 0, nbytes, 0, ALL, 0, TENSORS, 0, 0, True, deadline)

    return {
        PUBLIC: partial(manager.pull_cache, key, cache),
        ENGINE: partial(engine.pull_cache, PROMPT, key._name, cache.cache_id, 0, -1, None, None, 0, 0, True),
        COPY: partial(native, CONTIGUOUS.block_bytes),
        NATIVE: partial(native, 0),
    }


def _rows(work: Work, entries: Mapping[str, Operation], *, calls: int) -> Iterator[Row]:
    """Measure all entries in turn, batch by batch, and give what each adds to those below it."""
    batches = [{name: _per_call_us(operation, calls) for name, operation in entries.items()} for _ in range(BATCHES)]
    added = {
        PUBLIC: [batch[PUBLIC] - batch[ENGINE] for batch in batches],
        ENGINE: [batch[ENGINE] - batch[COPY] - batch.get(TABLE, 0.0) for batch in batches],
        TABLE: [batch[TABLE] for batch in batches if TABLE in batch],
        NATIVE: [batch[NATIVE] for batch in batches],
        COPY: [batch[COPY] - batch[NATIVE] for batch in batches],
    }
    whole = [batch[PUBLIC] for batch in batches]
    yield Row(TOPIC, work.name, whole, work.nbytes)
    for part, values in added.items():
        if values:
            share = statistics.median(values) / statistics.median(whole)
            yield Row(TOPIC, f"- {part} ({work.name})", values, note=f"{share:.1%}")


def _per_call_us(operation: Operation, calls: int) -> float:
    operation()
    started = time.perf_counter_ns()
    for _ in range(calls):
        operation()
    return (time.perf_counter_ns() - started) / calls / 1e3
