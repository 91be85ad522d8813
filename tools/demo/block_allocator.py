"""Which blocks of a paged cache are free."""

from __future__ import annotations


class BlockAllocator:
    """Hands out block numbers; the blocks given back last are reused first.

    Parameters
    ----------
    num_blocks : int
        Blocks 0 .. num_blocks - 1 exist, all free at first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks, not necessarily neighbours.

        Raises
        ------
        MemoryError
            Fewer blocks are free.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} blocks wanted, {len(self._free)} are free")
        kept = len(self._free) - count
        self._free, blocks = self._free[:kept], self._free[kept:]
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give back blocks that `allocate` returned."""
        self._free.extend(blocks)
