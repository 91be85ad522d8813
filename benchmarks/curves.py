"""How pulls grow: over the size of blocks and messages, and the numbers of blocks, tensors and caches at the prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from llm_datadist import BlocksCacheKey

from .limits import Limits
from .measurement import Row, time_us
from .peer_reads import PeerReads, PeerRounds
from .prompt_process import PROMPT, bytes_desc, cache_key, linked_pair
from .work import BLOCKS_64K, KIB, MIB, TENSORS, Puller, Work

TOPIC = "curves"
BLOCK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
MESSAGES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
BLOCK_COUNTS = (1, 4, 16, 64, 256, 1024, 4096)
TENSOR_COUNTS = (1, 2, 8, 32, 64, 128)
CACHE_COUNTS = (0, 1_000, 10_000, 100_000)
BLOCK = 16 * KIB
RUNS = 15
SMALL_RUNS = 500

BLOCK_SIZE_CURVE = "GB/s over block size"
MESSAGE_CURVE = "us over message size"
BLOCKS_CURVE = "us over blocks"
TENSORS_CURVE = "us over tensors"
CACHES_CURVE = "us over caches of the prompt"

# Names of lines in a plot; a curve and a line make the curve of a row. Peers have their own.
OURS, LIMIT, MEMCPY = "llm_datadist", "non-temporal copy, all cores", "memcpy, one thread"


def line(curve: str, name: str) -> str:
    return f"{curve}: {name}"


def measure(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Give one row a point."""
    yield from _over_block_size(limits, peers)
    yield from _over_message_size(limits, peers)
    yield from _over_blocks()
    yield from _over_tensors()
    yield from _over_caches()


def _over_block_size(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Move 64 MiB in blocks of each size, in random order."""
    total = BLOCKS_64K.nbytes // TENSORS
    works = tuple(
        Work(f"pull_blocks, 64 MiB in {_size(size)} blocks", size, total // size, total // size, RUNS)
        for size in BLOCK_SIZES
    )
    with linked_pair({model: work.desc for model, work in enumerate(works)}) as (datadist, _):
        puller = Puller(datadist.kv_cache_manager, works)
        for work in works:
            yield from _beside(BLOCK_SIZE_CURVE, work.block_bytes, work, puller, limits, peers)


def _over_message_size(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Move one range in each of two tensors."""
    works = tuple(
        Work(f"pull_cache, {_size(size)}", size // TENSORS, 1, 1, SMALL_RUNS if size <= MIB else RUNS)
        for size in MESSAGES
    )
    with linked_pair({model: work.desc for model, work in enumerate(works)}) as (datadist, _):
        puller = Puller(datadist.kv_cache_manager, works)
        for work in works:
            yield from _beside(MESSAGE_CURVE, work.nbytes, work, puller, limits, peers)


def _beside(curve: str, at: int, work: Work, puller: Puller, limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Measure one point of each line, in rounds."""
    rounds = PeerRounds(peers, work)
    memcpy: list[float] = []

    def run_round() -> list[float]:
        memcpy.extend(time_us(partial(limits.memcpy, work.nbytes), 3, warm_up=1))
        rounds.run()
        return time_us(puller.operation(work), work.runs_a_round)

    taken, limit_us = limits.around(work.nbytes, run_round)
    points: dict[str, Sequence[float]] = {MEMCPY: memcpy}
    limit, note = None, ""
    if not work.is_small:  # else the limit is that of a call and not that of the memory
        points[LIMIT] = [limit_us]
        limit, note = limit_us, f"{limit_us / statistics.median(taken):.2f} of the limit"
    for name, times in rounds.times.items():
        points[name] = times.total_us
    yield Row(TOPIC, work.name, taken, work.nbytes, limit_us=limit, note=note, point=(line(curve, OURS), float(at)))
    for name, values in points.items():
        yield Row(TOPIC, f"{name}, for {work.name}", values, work.nbytes, point=(line(curve, name), float(at)))


def _over_blocks() -> Iterator[Row]:
    most = max(BLOCK_COUNTS)
    works = tuple(Work(f"pull_blocks, {n} x 16 KiB", BLOCK, most, n, _runs(n)) for n in BLOCK_COUNTS)
    with linked_pair({0: works[0].desc}) as (datadist, _):
        manager = datadist.kv_cache_manager
        cache = manager.allocate_blocks_cache(works[0].desc)
        for work in works:
            pull = partial(manager.pull_blocks, BlocksCacheKey(PROMPT, 0), cache, *work.block_lists())
            point = (line(BLOCKS_CURVE, OURS), float(work.moved))
            yield Row(TOPIC, f"{work.name}, {TENSORS} tensors", time_us(pull, work.runs), work.nbytes, point=point)


def _over_tensors() -> Iterator[Row]:
    offers = {model: bytes_desc(tensors, 8, BLOCK) for model, tensors in enumerate(TENSOR_COUNTS)}
    with linked_pair(offers) as (datadist, _):
        manager = datadist.kv_cache_manager
        for model, desc in offers.items():
            cache = manager.allocate_blocks_cache(desc)
            pull = partial(manager.pull_blocks, BlocksCacheKey(PROMPT, model), cache, [3], [5])
            tensors = desc.num_tensors
            name = f"pull_blocks in {tensors} tensors, 1 x 16 KiB"
            point = (line(TENSORS_CURVE, OURS), float(tensors))
            yield Row(TOPIC, name, time_us(pull, SMALL_RUNS), tensors * BLOCK, point=point)


def _over_caches() -> Iterator[Row]:
    desc = bytes_desc(TENSORS, 1, BLOCK)
    for count in CACHE_COUNTS:
        with linked_pair({0: desc}, idle_caches=count) as (datadist, _):
            manager = datadist.kv_cache_manager
            pull = partial(manager.pull_cache, cache_key(0), manager.allocate_cache(desc))
            name = f"pull_cache, 2 x 16 KiB, {count:,} other caches at the prompt"
            point = (line(CACHES_CURVE, OURS), float(count))
            yield Row(TOPIC, name, time_us(pull, 4 * SMALL_RUNS), TENSORS * BLOCK, point=point)


def _runs(blocks: int) -> int:
    return SMALL_RUNS if blocks <= 64 else RUNS


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
