"""A prompt that computes holds its interpreter lock; pulls do not notice."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time

from llm_datadist import BlocksCacheKey, CacheKey
from tests import datadist_member as dd
from tests.pair import PROMPT, Pair

MIB = 1 << 20
HOLD_S = 3


def hold_lock_in_a_c_call(_: dd.State) -> float:
    """Sleep in a C call that keeps the interpreter lock: no other Python code of this process runs."""
    started = time.monotonic()
    ctypes.PyDLL(None).sleep(HOLD_S)
    return time.monotonic() - started


def hold_lock_in_a_loop(_: dd.State) -> float:
    """Compute in pure Python and do not hand the lock over."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(HOLD_S)
    started = time.monotonic()
    try:
        while time.monotonic() - started < HOLD_S:
            pass
    finally:
        sys.setswitchinterval(interval)
    return time.monotonic() - started


def pull_for(state: dd.State, cache: int, blocks: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each large pull and of each pull of one block, for a while."""
    large, small = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        dd.pull_cache(state, CacheKey(PROMPT, 2**64 - 1, 0, 9), cache)
        large.append(time.perf_counter() - started)
        for number in range(20):
            started = time.perf_counter()
            dd.pull_blocks(state, BlocksCacheKey(PROMPT), blocks, [number], [number])
            small.append(time.perf_counter() - started)
    return large, small


def prepare(pair: Pair) -> tuple[int, int]:
    cache = pair.prompt.call(dd.allocate, 2, (1, 4 * MIB), keys=[CacheKey(PROMPT, 2**64 - 1, 0, 9)])
    pair.prompt.call(dd.fill, cache, 1)
    pair.prompt.call(dd.allocate_blocks, 2, (64, 16384), key=BlocksCacheKey(PROMPT))
    return (
        pair.decoder.call(dd.allocate, 2, (1, 4 * MIB)),
        pair.decoder.call(dd.allocate_blocks, 2, (64, 16384)),
    )


def test_pulls_go_on_while_the_prompt_holds_its_lock(pair: Pair) -> None:
    cache, blocks = prepare(pair)
    for hold in (hold_lock_in_a_c_call, hold_lock_in_a_loop):
        pair.decoder.call(pull_for, cache, blocks, 0.1)
        holding = pair.prompt.start(hold)
        started = time.monotonic()
        large, small = pair.decoder.call(pull_for, cache, blocks, HOLD_S / 3)
        assert time.monotonic() - started < HOLD_S, "the lock was free again before the pulls were done"
        assert len(large) > 10
        # Generous: the point is milliseconds against seconds. Speed itself is measured by the benchmarks.
        assert statistics.median(large) < 0.1
        assert statistics.median(small) < 0.005
        assert holding.result() >= HOLD_S
    for tensor in range(2):
        assert pair.decoder.call(dd.read, cache, tensor) == dd.payload(1, tensor, 4 * MIB).tobytes()
