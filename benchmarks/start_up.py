"""What it costs to begin: the import, ``init`` with a large pool, and the first pull into memory nobody has touched."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from llm_datadist import LLMRole

from .instances import new_datadist
from .measurement import Row, Target, time_us
from .prompt_process import bytes_desc, cache_key, linked_pair

TOPIC = "start-up"
RUNS = 9
IMPORT_MOST_MS = 80.0
INIT_MOST_S = 1.5
POOL_BYTES = 8 * 10**9
FIRST_MOST = 1.25  # the first pull does not pay for pages if it takes as long as the next one, and some noise
PULLED = bytes_desc(2, 1, 32 << 20)

_IMPORT = """
import sys, time
started = time.perf_counter()
import llm_datadist
print((time.perf_counter() - started) * 1e3, sum(name in sys.modules for name in ("numpy", "torch")))
"""


def measure() -> Iterator[Row]:
    """Measure each beginning."""
    yield _imports()
    yield _inits()
    yield from _first_pulls()


def _imports() -> Row:
    taken, unwanted = [], 0
    for _ in range(RUNS):
        printed = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True).stdout
        milliseconds, modules = printed.split()
        taken.append(float(milliseconds))
        unwanted = max(unwanted, int(modules))
    targets = (
        Target("ms median", statistics.median(taken), IMPORT_MOST_MS, at_least=False),
        Target("of numpy and torch imported", unwanted, 0, at_least=False),
    )
    return Row(TOPIC, "import llm_datadist", taken, unit="ms", targets=targets)


def _inits() -> Row:
    taken = []
    for _ in range(RUNS):
        started = time.perf_counter()
        datadist = new_datadist(LLMRole.MIX, 1, POOL_BYTES)
        taken.append(time.perf_counter() - started)
        datadist.finalize()
    target = Target("s median", statistics.median(taken), INIT_MOST_S, at_least=False)
    return Row(TOPIC, "init with a pool of 8 GB", taken, unit="s", targets=(target,))


def _first_pulls() -> Iterator[Row]:
    """Pull twice into each of some caches, on memory that was no cache before."""
    nbytes = PULLED.num_tensors * PULLED.shape[1]
    allocations = []
    first: list[float] = []
    second: list[float] = []
    with linked_pair({0: PULLED}, RUNS + 1) as (datadist, _):
        manager = datadist.kv_cache_manager
        key = cache_key(0)
        manager.pull_cache(key, manager.allocate_cache(PULLED))  # the prompt's memory is touched from here on
        caches = []
        for _ in range(RUNS):
            started = time.perf_counter()
            cache = manager.allocate_cache(PULLED)
            allocations.append((time.perf_counter() - started) * 1e6)
            caches.append(cache)
            for taken in (first, second):
                taken += time_us(partial(manager.pull_cache, key, cache), 1, warm_up=0)
    times = statistics.median(first) / statistics.median(second)
    yield Row(TOPIC, "allocate_cache, 64 MiB of fresh memory", allocations)
    target = Target("x next pull", times, FIRST_MOST, at_least=False)
    yield Row(TOPIC, "first pull_cache into fresh memory, 64 MiB", first, nbytes, targets=(target,))
    yield Row(TOPIC, "next pull_cache into it, 64 MiB", second, nbytes)
