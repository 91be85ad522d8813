"""Where the layers of a transfer go: to addresses of a decoder, or to a cache that a key names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from llm_datadist.arguments import check_isinstance, check_list_uint64, check_uint32, check_uint64
from llm_datadist.cache_keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist.status import InvalidArgument


class TransferConfig:
    """Destination of a layer-wise transfer by addresses; every property can be assigned, with the same check.

    Parameters
    ----------
    dst_cluster_id : int
        Decoder to send to, uint64; it must be linked.
    dst_addrs : list or tuple of int
        Addresses in the decoder, uint64, two a layer of the range: K of its first layer, V of its first layer, and so
        on. A cache that is sent as a slot goes to the address of a slot; blocks count from the address of a tensor.
    src_layer_range : range, optional
        Layers of the source cache, step 1, not empty; None means all.
    src_batch_index : int
        Slot of the source cache, uint32; 0 if blocks are sent.

    Attributes
    ----------
    dst_layer_range : None
        Not used with addresses.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        An integer is out of the range of its width.
    LLMException
        LLM_PARAM_INVALID: the step of the range is not 1, or it is empty or starts below 0.

    Examples
    --------
    >>> from llm_datadist import TransferConfig
    >>> TransferConfig(2, [4096, 8192], range(0, 1))
    TransferConfig(dst_cluster_id=2, dst_addrs=[4096, 8192], src_layer_range=range(0, 1), src_batch_index=0)
    """

    def __init__(
        self,
        dst_cluster_id: int,
        dst_addrs: Sequence[int],
        src_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index
        self.dst_layer_range: range | None = None

    @property
    def dst_cluster_id(self) -> int:
        """Decoder to send to."""
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, dst_cluster_id: int) -> None:
        self._dst_cluster_id = check_uint64("dst_cluster_id", dst_cluster_id)

    @property
    def dst_addrs(self) -> Sequence[int]:
        """Addresses in the decoder, two a layer of the range."""
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, dst_addrs: Sequence[int]) -> None:
        check_isinstance("dst_addrs", dst_addrs, [list, tuple], int, allow_none=False)
        check_list_uint64("dst_addrs", dst_addrs)
        self._dst_addrs = dst_addrs

    @property
    def src_layer_range(self) -> range | None:
        """Layers of the source cache; a transfer replaces None by the range of all its layers."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range | None) -> None:
        if src_layer_range is not None:
            check_layer_range("src_layer_range", src_layer_range)
        self._src_layer_range = src_layer_range

    @property
    def src_batch_index(self) -> int:
        """Slot of the source cache."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", src_batch_index)

    def __repr__(self) -> str:
        return (
            f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, dst_addrs={self._dst_addrs}, "
            f"src_layer_range={self._src_layer_range}, src_batch_index={self._src_batch_index})"
        )


DestinationKey = Union[BlocksCacheKey, CacheKeyByIdAndIndex]


class TransferWithCacheKeyConfig:
    """Destination of a layer-wise transfer by key; every property can be assigned.

    Assigning checks the one value, and that a blocks key goes with slot 0; lengths of ranges are compared only here.

    Parameters
    ----------
    cache_key : BlocksCacheKey or CacheKeyByIdAndIndex
        Cache of the destination.
    src_layer_range, dst_layer_range : range
        Layers of the source and of the destination: step 1, not empty, equally many.
    src_batch_index : int
        Slot of the source cache, uint32; 0 with a BlocksCacheKey.

    Attributes
    ----------
    dst_cluster_id : int
        Cluster of the key at construction.

    Raises
    ------
    TypeError
        An argument of the wrong type; a range that is None.
    ValueError
        `src_batch_index` is out of range.
    LLMException
        LLM_PARAM_INVALID: a range that cannot be used, ranges of different lengths, or a slot beside a blocks key.

    Examples
    --------
    >>> from llm_datadist import BlocksCacheKey, TransferWithCacheKeyConfig
    >>> TransferWithCacheKeyConfig(BlocksCacheKey(1), range(0, 4), range(4, 8)).dst_cluster_id
    1
    """

    def __init__(
        self,
        cache_key: DestinationKey,
        src_layer_range: range | None = None,
        dst_layer_range: range | None = None,
        src_batch_index: int = 0,
    ) -> None:
        self._src_batch_index = 0
        self.cache_key = cache_key
        self._src_layer_range = check_layer_range("src_layer_range", src_layer_range)
        self._dst_layer_range = check_layer_range("dst_layer_range", dst_layer_range)
        if len(self._src_layer_range) != len(self._dst_layer_range):
            raise InvalidArgument(
                f"src_layer_range {src_layer_range} and dst_layer_range {dst_layer_range} differ in length, should have"
                " equally many layers"
            )
        self.src_batch_index = src_batch_index
        self.dst_cluster_id = cache_key.cluster_id

    @property
    def cache_key(self) -> DestinationKey:
        """Cache of the destination."""
        return self._cache_key

    @cache_key.setter
    def cache_key(self, cache_key: DestinationKey) -> None:
        check_isinstance("cache_key", cache_key, [BlocksCacheKey, CacheKeyByIdAndIndex], allow_none=False)
        _check_slot_of_key(cache_key, self._src_batch_index)
        self._cache_key = cache_key

    @property
    def src_layer_range(self) -> range:
        """Layers of the source cache."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: range) -> None:
        self._src_layer_range = check_layer_range("src_layer_range", src_layer_range)

    @property
    def dst_layer_range(self) -> range:
        """Layers of the destination."""
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, dst_layer_range: range) -> None:
        self._dst_layer_range = check_layer_range("dst_layer_range", dst_layer_range)

    @property
    def src_batch_index(self) -> int:
        """Slot of the source cache."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        check_uint32("src_batch_index", src_batch_index)
        _check_slot_of_key(self._cache_key, src_batch_index)
        self._src_batch_index = src_batch_index

    def __repr__(self) -> str:
        return (
            f"TransferWithCacheKeyConfig(cache_key={self._cache_key}, src_layer_range={self._src_layer_range}, "
            f"dst_layer_range={self._dst_layer_range}, src_batch_index={self._src_batch_index})"
        )


def check_layer_range(name: str, layers: object) -> range:
    """Check layers to send and give them back; raises what `TransferConfig` raises for its range."""
    check_isinstance(name, layers, range, allow_none=False)
    assert isinstance(layers, range)
    if layers.step != 1:
        raise InvalidArgument(f"{name} is {layers}, step must be 1")
    if not 0 <= layers.start < layers.stop:
        raise InvalidArgument(f"{name} is {layers}, should be 0 <= start < stop")
    return layers


def _check_slot_of_key(cache_key: DestinationKey, src_batch_index: int) -> None:
    if src_batch_index != 0 and isinstance(cache_key, BlocksCacheKey):
        raise InvalidArgument(f"src_batch_index {src_batch_index} is invalid, should be 0 with a BlocksCacheKey")
