"""Measure pulls of one decoder from one prompt, and one memory copy of the same size beside them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llm_datadist import BlocksCacheKey, CacheKey, KvCache, KvCacheManager

from . import prompt_process as prompt

MIB = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """Many runs of one operation; seconds and bytes."""

    name: str
    nbytes: int
    seconds: list[float]

    @property
    def median_us(self) -> float:
        return statistics.median(self.seconds) * 1e6

    @property
    def p99_us(self) -> float:
        return float(np.quantile(self.seconds, 0.99)) * 1e6

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / statistics.median(self.seconds) / 1e9


class Decoder:
    """Local caches and the operations that are measured on them."""

    def __init__(self, manager: KvCacheManager) -> None:
        self._manager = manager
        self._contiguous = manager.allocate_cache(prompt.CONTIGUOUS)
        self._blocks_64k = manager.allocate_blocks_cache(prompt.BLOCKS_64K)
        self._blocks_16k = manager.allocate_blocks_cache(prompt.BLOCKS_16K)
        choice = random.Random(1)
        self._source = choice.sample(range(512), 512)
        self._target = choice.sample(range(512), 512)
        self._few_source = choice.sample(range(1024), 32)
        self._few_target = choice.sample(range(1024), 32)

    def measure_all(self) -> Iterator[Measurement]:
        """Run every case."""
        yield self._measure("pull_cache, contiguous, 64 MiB", 64 * MIB, 15, self.pull_contiguous)
        yield self._measure("pull_blocks, 64 MiB in 64 KiB blocks, random", 64 * MIB, 15, self.pull_64k)
        yield self._measure("pull_blocks, 64 blocks of 16 KiB", MIB, 300, self.pull_few)
        yield self._measure("pull_blocks, 1 block of 16 KiB, 2 tensors", 32 << 10, 2000, self.pull_one)

    def pull_contiguous(self) -> None:
        key = CacheKey(prompt.CLUSTER, prompt.ANY_REQUEST, 0, prompt.PREFIX)
        self._manager.pull_cache(key, self._contiguous)

    def pull_64k(self) -> None:
        self._pull(prompt.MODEL_64K, self._blocks_64k, self._source, self._target)

    def pull_few(self) -> None:
        self._pull(prompt.MODEL_16K, self._blocks_16k, self._few_source, self._few_target)

    def pull_one(self) -> None:
        self._pull(prompt.MODEL_16K, self._blocks_16k, [7], [9])

    def _pull(self, model: int, cache: KvCache, source: list[int], target: list[int]) -> None:
        self._manager.pull_blocks(BlocksCacheKey(prompt.CLUSTER, model), cache, source, target)

    @staticmethod
    def _measure(name: str, nbytes: int, runs: int, operation: Callable[[], None]) -> Measurement:
        for _ in range(2):
            operation()
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - started)
        return Measurement(name, nbytes, seconds)


def measure_memcpy() -> Measurement:
    """One thread copies 64 MiB inside one process: what the machine gives without any transfer."""
    source = np.ones(64 * MIB, np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return Measurement("memcpy, one thread, 64 MiB", 64 * MIB, seconds)
