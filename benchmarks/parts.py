"""Where the time of a pull goes: the same pull begun at each layer, from the public call down to the copy.

What a layer costs is the difference to the layer below it. Only this benchmark calls private names: it has to enter the
layers from the side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from llm_datadist import BlocksCacheKey, KvCacheManager
from llm_datadist._local import block_pairs
from llm_datadist.engine.engine import Engine

from .measurement import Operation, Row, time_us
from .prompt_process import PROMPT, cache_key, linked_pair
from .work import CONTIGUOUS, ONE_BLOCK, TENSORS, Work

TOPIC = "parts"
BATCHES = 25
CALLS = 400  # in a batch
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
        yield from _small(manager)
        yield from _large(manager)


def _small(manager: KvCacheManager) -> Iterator[Row]:
    engine = manager._engine
    assert isinstance(engine, Engine)
    key = BlocksCacheKey(PROMPT, 0)
    kind, number, model = key._name
    cache = manager.allocate_blocks_cache(ONE_BLOCK.desc)
    end, local = engine._links.puller("", PROMPT), engine._caches.by_id[cache.cache_id]
    source, target = [7], [9]
    pairs = block_pairs(source, target)
    deadline = time.monotonic_ns() + _MINUTE_NS

    batches = _batches(
        {
            PUBLIC: partial(manager.pull_blocks, key, cache, source, target),
            ENGINE: partial(engine.pull_blocks, PROMPT, key._name, cache.cache_id, source, target, None, None),
            TABLE: partial(block_pairs, source, target),
            COPY: partial(end.pull_blocks, local, kind, number, model, 0, pairs, 0, ALL, 0, TENSORS, None, deadline),
            NATIVE: partial(
                end.pull_cache, local, kind, number, model, 0, 0, 0, 0, ALL, 0, TENSORS, 0, 0, False, deadline
            ),
        }
    )
    parts = {
        PUBLIC: [batch[PUBLIC] - batch[ENGINE] for batch in batches],
        ENGINE: [batch[ENGINE] - batch[COPY] - batch[TABLE] for batch in batches],
        TABLE: [batch[TABLE] for batch in batches],
        NATIVE: [batch[NATIVE] for batch in batches],
        COPY: [batch[COPY] - batch[NATIVE] for batch in batches],
    }
    yield from _rows(ONE_BLOCK, [batch[PUBLIC] for batch in batches], parts)


def _large(manager: KvCacheManager) -> Iterator[Row]:
    """Measure the layers with a pull of a few bytes, whose cost above the copy is the same; the copy is the rest."""
    engine = manager._engine
    assert isinstance(engine, Engine)
    key = cache_key(1)
    kind, number, model = key._name
    cache = manager.allocate_cache(CONTIGUOUS.desc)
    end, local = engine._links.puller("", PROMPT), engine._caches.by_id[cache.cache_id]
    deadline = time.monotonic_ns() + _MINUTE_NS

    batches = _batches(
        {
            PUBLIC: partial(manager.pull_cache, key, cache, 0, 1),
            ENGINE: partial(engine.pull_cache, PROMPT, key._name, cache.cache_id, 0, 1, None, None, 0, 0, True),
            NATIVE: partial(
                end.pull_cache, local, kind, number, model, 0, 0, 1, 0, ALL, 0, TENSORS, 0, 0, True, deadline
            ),
        }
    )
    whole = time_us(partial(manager.pull_cache, key, cache), BATCHES)
    layers = statistics.median(batch[PUBLIC] for batch in batches)
    parts = {
        PUBLIC: [batch[PUBLIC] - batch[ENGINE] for batch in batches],
        ENGINE: [batch[ENGINE] - batch[NATIVE] for batch in batches],
        NATIVE: [batch[NATIVE] for batch in batches],
        COPY: [us - layers for us in whole],
    }
    yield from _rows(CONTIGUOUS, whole, parts)


def _batches(entries: Mapping[str, Operation]) -> list[dict[str, float]]:
    """Measure all entries in turn, again and again; gives the microseconds of a call in each batch."""
    return [{name: _per_call_us(operation) for name, operation in entries.items()} for _ in range(BATCHES)]


def _per_call_us(operation: Operation) -> float:
    operation()
    started = time.perf_counter_ns()
    for _ in range(CALLS):
        operation()
    return (time.perf_counter_ns() - started) / CALLS / 1e3


def _rows(work: Work, whole: Sequence[float], parts: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    yield Row(TOPIC, work.name, whole, work.nbytes)
    for part, values in parts.items():
        share = statistics.median(values) / statistics.median(whole)
        yield Row(TOPIC, f"- {part} ({work.name})", values, note=f"{share:.2%}")
