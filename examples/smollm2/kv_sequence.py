"""Where K and V of one sequence live: in a slot of contiguous tensors, or in blocks named by a block table.

Both forms read and write the same bits, so the model's answers do not depend on the form. Tensor ``2 * layer`` holds K
of a layer and tensor ``2 * layer + 1`` its V; all are float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]


class KvSequence(Protocol):
    """K and V of the tokens of one sequence, in all layers."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    def write(self, layer: int, start: int, keys: Float32Array, values: Float32Array) -> None:
        """Store K and V ([tokens, kv_heads, head_dim]) of the tokens from position `start` on, rounded to float16."""

    def read(self, layer: int, length: int) -> tuple[Float16Array, Float16Array]:
        """Return K and V ([length, kv_heads, head_dim]) of the first `length` tokens."""


class ContiguousSequence:
    """A sequence in slot `slot` of tensors of the shape [slots, tokens, kv_heads, head_dim]."""

    def __init__(self, tensors: Sequence[Float16Array], slot: int) -> None:
        self._tensors = [tensor[slot] for tensor in tensors]

    @property
    def capacity(self) -> int:
        return int(self._tensors[0].shape[0])

    def write(self, layer: int, start: int, keys: Float32Array, values: Float32Array) -> None:
        stop = start + len(keys)
        self._tensors[2 * layer][start:stop] = keys
        self._tensors[2 * layer + 1][start:stop] = values

    def read(self, layer: int, length: int) -> tuple[Float16Array, Float16Array]:
        return self._tensors[2 * layer][:length], self._tensors[2 * layer + 1][:length]


class PagedSequence:
    """A sequence in blocks of tensors of the shape [blocks, block_size, kv_heads, head_dim].

    Token ``t`` lies in block ``block_table[t // block_size]`` at row ``t % block_size``.
    """

    def __init__(self, tensors: Sequence[Float16Array], block_table: Sequence[int]) -> None:
        self._tensors = tensors
        self._block_table = np.asarray(block_table, dtype=np.intp)
        self._block_size = int(tensors[0].shape[1])

    @property
    def capacity(self) -> int:
        return len(self._block_table) * self._block_size

    def write(self, layer: int, start: int, keys: Float32Array, values: Float32Array) -> None:
        index, row = divmod(np.arange(start, start + len(keys)), self._block_size)
        block = self._block_table[index]
        self._tensors[2 * layer][block, row] = keys
        self._tensors[2 * layer + 1][block, row] = values

    def read(self, layer: int, length: int) -> tuple[Float16Array, Float16Array]:
        blocks = self._block_table[: -(-length // self._block_size)]
        keys, values = self._tensors[2 * layer][blocks], self._tensors[2 * layer + 1][blocks]
        return keys.reshape(-1, *keys.shape[2:])[:length], values.reshape(-1, *values.shape[2:])[:length]
