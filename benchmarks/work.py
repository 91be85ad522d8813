"""The five pieces of work that are timed for every way of moving KV, NIXL's included."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from llm_datadist import BlocksCacheKey, CacheDesc, KvCacheManager

from .limits import ROUNDS
from .measurement import Operation
from .prompt_process import PROMPT, bytes_desc, cache_key

KIB = 1 << 10
MIB = 1 << 20
TENSORS = 2


@dataclass(frozen=True)
class Work:
    """Blocks to move out of two tensors into two others.

    Attributes
    ----------
    name : str
    block_bytes, blocks : int
        Size of a block, and how many of them a tensor has.
    moved : int
        Blocks that are moved in each tensor; all, or a random choice. The order is random on both sides.
    runs : int
        Runs to measure.
    of_limit : float or None
        Share of the machine's limit that should be reached.
    median_us, p99_us : float or None
        Time that should not be exceeded.
    times_nixl : float or None
        How often the work should be done while NIXL does it once.
    with_preparation : bool
        Whether the preparation of descriptors counts as a part of NIXL's time.
    """

    name: str
    block_bytes: int
    blocks: int
    moved: int
    runs: int
    of_limit: float | None = None
    median_us: float | None = None
    p99_us: float | None = None
    times_nixl: float | None = None
    with_preparation: bool = False

    @property
    def nbytes(self) -> int:
        return TENSORS * self.moved * self.block_bytes

    @property
    def runs_a_round(self) -> int:
        return -(-self.runs // ROUNDS)

    @property
    def is_small(self) -> bool:
        """Whether the time of a call counts, and not the speed of memory."""
        return self.nbytes <= MIB

    @property
    def desc(self) -> CacheDesc:
        return bytes_desc(TENSORS, self.blocks, self.block_bytes)

    def block_lists(self) -> tuple[list[int], list[int]]:
        """Source and target blocks."""
        choice = random.Random(1)
        blocks = range(self.blocks)
        return choice.sample(blocks, self.moved), choice.sample(blocks, self.moved)


CONTIGUOUS = Work("pull_cache, contiguous, 256 MiB", 128 * MIB, 1, 1, 15, of_limit=0.90, times_nixl=4)
BLOCKS_64K = Work(
    "pull_blocks, 64 MiB in 64 KiB blocks, random order", 64 * KIB, 512, 512, 25, of_limit=0.85, times_nixl=6
)
BLOCKS_4K = Work("pull_blocks, 64 MiB in 4 KiB blocks, random order", 4 * KIB, 8192, 8192, 25, of_limit=0.5)
FEW_BLOCKS = Work(
    "pull_blocks, 64 blocks of 16 KiB",
    16 * KIB,
    1024,
    32,
    500,
    median_us=45,
    times_nixl=3,
    with_preparation=True,
)
ONE_BLOCK = Work("pull_blocks, 1 block of 16 KiB, 2 tensors", 16 * KIB, 1024, 1, 5000, median_us=5, p99_us=15)

ALL = (CONTIGUOUS, BLOCKS_64K, BLOCKS_4K, FEW_BLOCKS, ONE_BLOCK)
OFFERS = {model: work.desc for model, work in enumerate(ALL)}


class Puller:
    """Does the work by pulling from the prompt, which offers each piece as the model of its place in the list."""

    def __init__(self, manager: KvCacheManager, works: tuple[Work, ...] = ALL) -> None:
        self._pulls = {work: _pull(manager, model, work) for model, work in enumerate(works)}

    def operation(self, work: Work) -> Operation:
        """Give the call that does a piece of work, with its arguments at hand."""
        return self._pulls[work]


def _pull(manager: KvCacheManager, model: int, work: Work) -> Operation:
    if work.blocks == 1:
        return partial(manager.pull_cache, cache_key(model), manager.allocate_cache(work.desc))
    cache = manager.allocate_blocks_cache(work.desc)
    return partial(manager.pull_blocks, BlocksCacheKey(PROMPT, model), cache, *work.block_lists())
