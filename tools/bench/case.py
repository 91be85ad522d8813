"""What is moved: so many bytes, in one piece or in blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm_datadist import CacheDesc, DataType


@dataclass(frozen=True)
class Case:
    """One message.

    Attributes
    ----------
    nbytes : int
        Bytes of the message, all tensors together.
    tensors : int
        Tensors that it is spread over.
    block_bytes : int or None
        Bytes of a block; None: one piece of each tensor.
    """

    nbytes: int
    tensors: int
    block_bytes: int | None

    @property
    def tensor_bytes(self) -> int:
        return self.nbytes // self.tensors

    @property
    def blocks(self) -> int:
        """Blocks of each tensor; 1 if it is moved in one piece."""
        return 1 if self.block_bytes is None else self.tensor_bytes // self.block_bytes

    @property
    def desc(self) -> CacheDesc:
        """Description of the cache that holds the message, on both sides."""
        return CacheDesc(self.tensors, (self.blocks, self.tensor_bytes // self.blocks), DataType.DT_UINT8)

    def block_lists(self) -> tuple[list[int], list[int]]:
        """Source and target blocks: every block once, in random order on both sides."""
        choice = random.Random(1)
        numbers = range(self.blocks)
        return choice.sample(numbers, self.blocks), choice.sample(numbers, self.blocks)


def all_cases(sizes: Sequence[int], blocks: Sequence[int], tensors: int, contiguous: bool) -> Iterator[Case]:
    """Combine sizes of messages and of blocks; a block that does not fit into a message is left out there.

    Raises
    ------
    ValueError
        A message cannot be spread over the tensors or cut into the blocks without a rest.
    """
    for nbytes in sizes:
        if nbytes % tensors:
            raise ValueError(f"{nbytes} bytes cannot be spread over {tensors} tensors")
        if contiguous:
            yield Case(nbytes, tensors, None)
        for block_bytes in blocks:
            if block_bytes > nbytes // tensors:
                continue
            if nbytes // tensors % block_bytes:
                raise ValueError(f"{nbytes // tensors} bytes of a tensor cannot be cut into blocks of {block_bytes}")
            yield Case(nbytes, tensors, block_bytes)
