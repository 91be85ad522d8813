"""Caches of the check, and the bytes in them."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from llm_datadist import CacheDesc, DataType

Bytes = npt.NDArray[np.uint8]

LAYERS = 4
TENSORS = 2 * LAYERS
BLOCK_BYTES = 16 << 10
BLOCKS = 64
MOVED_BLOCKS = 32  # of them, in random order on both sides
SMALLEST_BYTES = TENSORS * 64

_SLACK_BYTES = 4 << 20


def whole_desc(nbytes: int) -> CacheDesc:
    """Describe the large cache: `nbytes` in all tensors together, a multiple of `SMALLEST_BYTES`."""
    return CacheDesc(TENSORS, (1, nbytes // TENSORS), DataType.DT_UINT8)


def blocks_desc() -> CacheDesc:
    """Describe the paged cache."""
    return CacheDesc(TENSORS, (BLOCKS, BLOCK_BYTES), DataType.DT_UINT8)


def pool_bytes(nbytes: int) -> int:
    """Give the bytes of a pool for two large caches and the paged one."""
    return 2 * nbytes + TENSORS * BLOCKS * BLOCK_BYTES + _SLACK_BYTES


def block_lists() -> tuple[list[int], list[int]]:
    """Give source and target blocks, in random order."""
    choice = np.random.default_rng(1)
    return choice.permutation(BLOCKS)[:MOVED_BLOCKS].tolist(), choice.permutation(BLOCKS)[:MOVED_BLOCKS].tolist()


@functools.lru_cache(4 * TENSORS)
def pattern(seed: int, tensor: int, nbytes: int) -> Bytes:
    """Give bytes that a mistake does not make by itself: they differ from tensor to tensor and from step to step."""
    return np.frombuffer(np.random.default_rng([seed, tensor]).bytes(nbytes), np.uint8)


def compare(where: str, tensor: int, got: Bytes, wanted: Bytes) -> None:
    """Check that the bytes of a tensor are those that should be there.

    Raises
    ------
    WrongBytes
        They are not.
    """
    wrong = np.flatnonzero(got.reshape(-1) != wanted.reshape(-1))
    if wrong.size:
        first = int(wrong[0])
        raise WrongBytes(
            f"wrong bytes {where}: {wrong.size} of {wanted.size} of tensor {tensor}, the first one at {first}:"
            f" {got.reshape(-1)[first]:#04x}, should be {wanted.reshape(-1)[first]:#04x}"
        )


class WrongBytes(Exception):
    """A call succeeded, but the bytes are not those that should have come; says where."""
