"""Where in a device's pool a cache goes: regions for caches of different sizes, or one region for all.

With ``llm.BufPoolCfg`` the pool is cut into regions, one for each size class, in the order of the option. A cache goes
whole into the first class whose ``max_buf_size`` covers one of its tensors. It never goes into a later one: caches of
one size cannot use up or fragment the memory of another. Its tensors lie one after the other, each a buffer of its own,
rounded up to a multiple of ``blk_size`` and of the alignment that every tensor has.

A pool has no lock: its owner serialises the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llm_datadist._pool import Pool, PoolExhausted
from llm_datadist.engine.options import SizeClass

ALIGNMENT = 512  # bytes; every tensor of a cache starts at a multiple of it (documented alignment of the API)


class CachePoolExhausted(Exception):
    """There is no room for a cache.

    Attributes
    ----------
    hopeless : bool
        Whether there would be none in an empty pool either.
    """

    def __init__(self, reason: str, hopeless: bool) -> None:
        super().__init__(reason)
        self.hopeless = hopeless


class Extent(NamedTuple):
    """The range of a cache in the pool, in bytes.

    Attributes
    ----------
    offset : int
        Of the first tensor.
    step : int
        From one tensor to the next.
    """

    offset: int
    step: int


class _Region:
    """The part of the pool for one size class."""

    def __init__(self, base: int, capacity: int, unit: int, largest_tensor: int) -> None:
        self.base = base
        self.pool = Pool(capacity)
        self.unit = unit
        self.largest_tensor = largest_tensor

    def step_of(self, tensor_nbytes: int) -> int:
        return -(-tensor_nbytes // self.unit) * self.unit


class CachePool:
    """Ranges for caches in a pool of `capacity` bytes.

    Parameters
    ----------
    capacity : int
        Bytes of the device's pool, at least 512.
    classes : sequence of SizeClass
        Checked size classes, `max_buf_size` growing, whose `total_size` fit into `capacity` together; empty for one
        region that takes caches of every size.

    Attributes
    ----------
    capacity, used, available, largest_free : int
        Bytes of all regions together; of `largest_free`, of the region where it is largest.
    allocations : int
        Number of caches.
    """

    def __init__(self, capacity: int, classes: Sequence[SizeClass] = ()) -> None:
        self._has_classes = bool(classes)
        self._regions: list[_Region] = []
        base = 0
        for size_class in classes:
            unit = max(size_class.blk_size, ALIGNMENT)
            self._regions.append(_Region(base, size_class.total_size, unit, size_class.max_buf_size))
            base += size_class.total_size
        if not classes:
            self._regions.append(_Region(0, capacity, ALIGNMENT, capacity))

    @property
    def capacity(self) -> int:
        return sum(region.pool.capacity for region in self._regions)

    @property
    def used(self) -> int:
        return sum(region.pool.used for region in self._regions)

    @property
    def available(self) -> int:
        return sum(region.pool.available for region in self._regions)

    @property
    def largest_free(self) -> int:
        return max(region.pool.largest_free for region in self._regions)

    @property
    def allocations(self) -> int:
        return sum(region.pool.allocations for region in self._regions)

    def allocate(self, tensors: int, tensor_nbytes: int) -> Extent:
        """Give room to a cache.

        Parameters
        ----------
        tensors, tensor_nbytes : int
            Number of tensors and bytes of each, > 0.

        Raises
        ------
        CachePoolExhausted
            No size class takes tensors of that size, or the free ranges of theirs are all too small.
        """
        region = self._region_of(tensor_nbytes)
        if region is None:
            largest = self._regions[-1].largest_tensor
            raise CachePoolExhausted(
                f"wanted {tensors} tensors of {tensor_nbytes} bytes, the largest size class takes tensors up to"
                f" {largest} bytes; add a class with a larger max_buf_size to llm.BufPoolCfg",
                hopeless=True,
            )
        step = region.step_of(tensor_nbytes)
        try:
            return Extent(region.base + region.pool.allocate(tensors * step), step)
        except PoolExhausted as error:
            hopeless = error.wanted > region.pool.capacity
            raise CachePoolExhausted(self._text(region, error), hopeless) from None

    def free(self, offset: int) -> None:
        """Take the range of a cache back.

        Raises
        ------
        ValueError
            No cache begins at `offset`.
        """
        region = next((region for region in reversed(self._regions) if region.base <= offset), self._regions[0])
        try:
            region.pool.free(offset - region.base)
        except ValueError:
            raise ValueError(f"no cache begins at offset {offset}") from None

    def _region_of(self, tensor_nbytes: int) -> _Region | None:
        if not self._has_classes:
            return self._regions[0]
        return next((region for region in self._regions if tensor_nbytes <= region.largest_tensor), None)

    def _text(self, region: _Region, error: PoolExhausted) -> str:
        level = f"wanted {error.wanted} bytes, free {error.free} bytes, largest free range {error.largest} bytes"
        if not self._has_classes:
            return f"{level}; deallocate caches or set ge.flowGraphMemMaxSize to more"
        name = f"in the size class of tensors up to {region.largest_tensor} bytes"
        return f"{level} {name}; deallocate caches or set its total_size in llm.BufPoolCfg to more"
