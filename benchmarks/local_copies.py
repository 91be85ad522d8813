"""Copies inside one process: slots, blocks, and swaps with host memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from llm_datadist import CacheDesc, DataType, KvCache, LLMRole, Placement
from llm_datadist.views import tensor_view

from .instances import new_datadist
from .limits import Limits
from .measurement import Row, Target
from .work import BLOCKS_64K, TENSORS

TOPIC = "local copies"
OF_LIMIT = 0.85
RUNS = 25
_ROOM = 1 << 20


def measure(limits: Limits) -> Iterator[Row]:
    """Copy 64 MiB in each way, blocks in random order."""
    nbytes = BLOCKS_64K.nbytes
    datadist = new_datadist(LLMRole.MIX, 1, 4 * nbytes + _ROOM)
    try:
        manager = datadist.kv_cache_manager
        slot = CacheDesc(TENSORS, (1, nbytes // TENSORS), DataType.DT_UINT8)
        source, target = manager.allocate_cache(slot), manager.allocate_cache(slot)
        _fill(source)
        yield _row("copy_cache, 64 MiB", limits, nbytes, partial(manager.copy_cache, target, source))

        shape = (2 * BLOCKS_64K.blocks, BLOCKS_64K.block_bytes)
        blocks = manager.allocate_blocks_cache(CacheDesc(TENSORS, shape, DataType.DT_UINT8))
        _fill(blocks)
        lower, upper = BLOCKS_64K.block_lists()
        upper = [BLOCKS_64K.blocks + block for block in upper]
        pairs = {a: [b] for a, b in zip(lower, upper)}
        yield _row("copy_blocks, 64 MiB in 64 KiB blocks", limits, nbytes, partial(manager.copy_blocks, blocks, pairs))

        memory = [_host_memory(shape) for _ in range(TENSORS)]
        host = KvCache.create_cpu_cache(
            CacheDesc(TENSORS, shape, DataType.DT_UINT8, Placement.HOST), [tensor.ctypes.data for tensor in memory]
        )
        swap = dict(zip(lower, upper))
        name = "swap_blocks {}, 64 MiB in 64 KiB blocks"
        yield _row(name.format("out"), limits, nbytes, partial(manager.swap_blocks, blocks, host, swap))
        yield _row(name.format("in"), limits, nbytes, partial(manager.swap_blocks, host, blocks, swap))
    finally:
        datadist.finalize()


def _host_memory(shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Memory at a multiple of 64 bytes, as torch and pinned allocations have it, and NumPy has not."""
    nbytes = shape[0] * shape[1]
    room = np.ones(nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + nbytes].reshape(shape)


def _fill(cache: KvCache) -> None:
    for tensor in range(TENSORS):
        tensor_view(cache, tensor)[...] = 1


def _row(name: str, limits: Limits, nbytes: int, operation: Callable[[], None]) -> Row:
    taken, limit_us = limits.beside(nbytes, operation, RUNS)
    target = Target("of the limit", limit_us / statistics.median(taken), OF_LIMIT, at_least=True)
    return Row(TOPIC, name, taken, nbytes, limit_us=limit_us, targets=(target,))
