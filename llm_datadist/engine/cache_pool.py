"""Where in a device's pool a cache goes: regions for caches of different sizes or placements, or one region for all.

With ``llm.BufPoolCfg`` the pool is cut into regions, one for each size class, in the order of the option. A cache goes
whole into the first class whose ``max_buf_size`` covers one of its tensors. It never goes into a later one: caches of
one size cannot use up or fragment the memory of another. Its tensors lie one after the other, each a buffer of its own,
rounded up to a multiple of ``blk_size`` and of the alignment that every tensor has.

In cache-manager mode there is a region for each placement that a pool was configured for.

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


class Placed(NamedTuple):
    """The part of the pool for one placement.

    Attributes
    ----------
    capacity : int
        Bytes; 0 = no such part.
    page : int
        Bytes that every range is rounded up to, a power of two.
    """

    capacity: int
    page: int


class _Region:
    """The part of the pool for one size class or placement."""

    def __init__(
        self, base: int, capacity: int, unit: int, largest_tensor: int, option: str, page: int = ALIGNMENT
    ) -> None:
        self.base = base
        self.pool = Pool(capacity)
        self.unit = unit
        self.largest_tensor = largest_tensor
        self.option = option  # that sets its size
        self.page = page

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
    device, host : Placed, optional
        Parts for the two placements, instead of size classes; `capacity` is theirs together then.

    Attributes
    ----------
    capacity, used, available, largest_free : int
        Bytes of all regions together; of `largest_free`, of the region where it is largest.
    allocations : int
        Number of caches.
    """

    def __init__(
        self,
        capacity: int,
        classes: Sequence[SizeClass] = (),
        *,
        device: Placed | None = None,
        host: Placed | None = None,
    ) -> None:
        self._has_classes = bool(classes)
        self._regions: list[_Region] = []
        self._device: _Region | None = None
        self._host: _Region | None = None
        if device is not None and host is not None:
            self._device = self._placed(device, "llm.MemPoolConfig")
            self._host = self._placed(host, "llm.HostMemPoolConfig", device.capacity)
            return
        base = 0
        for size_class in classes:
            unit = max(size_class.blk_size, ALIGNMENT)
            region = _Region(base, size_class.total_size, unit, size_class.max_buf_size, "llm.BufPoolCfg")
            self._regions.append(region)
            base += size_class.total_size
        if not classes:
            self._device = _Region(0, capacity, ALIGNMENT, capacity, "ge.flowGraphMemMaxSize")
            self._regions.append(self._device)

    def _placed(self, part: Placed, option: str, base: int = 0) -> _Region | None:
        if part.capacity == 0:
            return None
        self._regions.append(_Region(base, part.capacity, ALIGNMENT, part.capacity, option, part.page))
        return self._regions[-1]

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
        return max((region.pool.largest_free for region in self._regions), default=0)

    @property
    def allocations(self) -> int:
        return sum(region.pool.allocations for region in self._regions)

    def allocate(self, tensors: int, tensor_nbytes: int, on_host: bool = False) -> Extent:
        """Give room to a cache.

        Parameters
        ----------
        tensors, tensor_nbytes : int
            Number of tensors and bytes of each, > 0.
        on_host : bool
            In the part for the placement HOST, which must exist.

        Raises
        ------
        CachePoolExhausted
            There is no such part, no size class takes tensors of that size, or the free ranges are all too small.
        """
        region = self._host if on_host else self._region_of(tensor_nbytes)
        if region is None:
            raise CachePoolExhausted(self._no_region(tensors, tensor_nbytes, on_host), hopeless=True)
        step = region.step_of(tensor_nbytes)
        try:
            nbytes = -(-tensors * step // region.page) * region.page
            return Extent(region.base + region.pool.allocate(nbytes), step)
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
        regions = self._regions
        region = regions[0]
        if len(regions) > 1:
            region = next((part for part in reversed(regions) if part.base <= offset), region)
        try:
            region.pool.free(offset - region.base)
        except ValueError:
            raise ValueError(f"no cache begins at offset {offset}") from None

    def _region_of(self, tensor_nbytes: int) -> _Region | None:
        if not self._has_classes:
            return self._device
        return next((region for region in self._regions if tensor_nbytes <= region.largest_tensor), None)

    def _no_region(self, tensors: int, tensor_nbytes: int, on_host: bool) -> str:
        wanted = f"wanted {tensors} tensors of {tensor_nbytes} bytes"
        if not self._has_classes:
            return f"{wanted}, no pool is configured: set {'llm.HostMemPoolConfig' if on_host else 'llm.MemPoolConfig'}"
        return (
            f"{wanted}, the largest size class takes tensors up to {self._regions[-1].largest_tensor} bytes; add a"
            " class with a larger max_buf_size to llm.BufPoolCfg"
        )

    def _text(self, region: _Region, error: PoolExhausted) -> str:
        level = f"wanted {error.wanted} bytes, free {error.free} bytes, largest free range {error.largest} bytes"
        if not self._has_classes:
            return f"{level}; deallocate caches or set {region.option} to more"
        name = f"in the size class of tensors up to {region.largest_tensor} bytes"
        return f"{level} {name}; deallocate caches or set its total_size in llm.BufPoolCfg to more"
