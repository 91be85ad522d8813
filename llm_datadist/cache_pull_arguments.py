"""Checks of what a pull of the cache manager is called with, as far as they need no engine, in the documented order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from llm_datadist.arguments import check_int64, check_isinstance, check_uint32
from llm_datadist.block_list import check_block_list, check_block_numbers
from llm_datadist.cache import Cache
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, check_blocks_cache_key
from llm_datadist.cache_kinds import check_blocks_cache, check_plain_cache
from llm_datadist.layer_range import TensorRange, TensorRanges
from llm_datadist.pull_arguments import (
    check_layer_ranges,
    check_pullable,
    check_pulled_size,
    check_tensor_ranges,
    check_tensors_per_layer,
)
from llm_datadist.sealed_blocks import check_token
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist._local import BlockList

SlotKey = Union[CacheKey, CacheKeyByIdAndIndex]
BlocksSource = Union[BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex]


class PullBlocksArguments(NamedTuple):
    """What a pull of blocks asks the engine for, beside key, cache and token.

    Attributes
    ----------
    src_blocks : list, tuple or array of int, or None
        Remote blocks; None = the remote slot, cut into blocks.
    dst_blocks : list, tuple or array of int
        Local blocks.
    src_tensors, dst_tensors : (int, int) or None
        First tensor and number of tensors; None = all.
    """

    src_blocks: BlockList | None
    dst_blocks: BlockList
    src_tensors: TensorRange
    dst_tensors: TensorRange


def check_other_cluster(remote_cluster_id: int, own_cluster_id: int) -> None:
    """Check that a key names another cluster than the own one."""
    if remote_cluster_id == own_cluster_id:
        raise InvalidArgument(f"cluster_id {remote_cluster_id} of the key is the own one, should be that of a peer")


def check_pull_of_slot(
    cache_key: SlotKey,
    cache: Cache,
    batch_index: int,
    size: int,
    keywords: Mapping[str, Any],
    key_classes: Sequence[type],
    own_cluster_id: int,
) -> TensorRanges:
    """Check the arguments of `CacheManager.pull_cache`, which documents what is raised."""
    check_isinstance("cache_key", cache_key, key_classes, allow_none=False)
    check_isinstance("cache", cache, Cache, allow_none=False)
    check_uint32("batch_index", batch_index)
    check_int64("size", size)
    check_plain_cache("cache", cache)
    check_pulled_size(size)
    per_layer = check_tensors_per_layer(keywords, cache)
    check_pullable(cache_key)
    ranges = check_layer_ranges(keywords, per_layer, cache)
    check_other_cluster(cache_key.cluster_id, own_cluster_id)
    return ranges


def check_pull_into_blocks(
    src_cache_key: BlocksSource,
    dst_cache: Cache,
    src_blocks: BlockList,
    dst_blocks: BlockList,
    token: bytes | None,
    keywords: Mapping[str, Any],
    own_cluster_id: int,
) -> PullBlocksArguments:
    """Check the arguments of `CacheManager.pull_blocks`, which documents what is raised."""
    kinds = [BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex]
    check_isinstance("src_cache_key", src_cache_key, kinds, allow_none=False)
    check_isinstance("dst_cache", dst_cache, Cache, allow_none=False)
    check_block_list("src_blocks", src_blocks, [list, tuple])
    check_block_list("dst_blocks", dst_blocks, [list, tuple])
    check_token(token)
    check_blocks_cache("dst_cache", dst_cache)
    if len(dst_blocks) == 0:
        raise InvalidArgument("dst_blocks can not be empty")
    _check_source_blocks(src_cache_key, src_blocks, dst_blocks)
    if token is not None and not isinstance(src_cache_key, BlocksCacheKey):
        raise InvalidArgument(f"token is given with {src_cache_key}, only blocks of a BlocksCacheKey are published")
    ranges = check_tensor_ranges(keywords, dst_cache)
    if isinstance(src_cache_key, BlocksCacheKey):
        check_blocks_cache_key(src_cache_key)
    else:
        check_pullable(src_cache_key)
    check_block_numbers("src_blocks", src_blocks)
    check_block_numbers("dst_blocks", dst_blocks)
    check_other_cluster(src_cache_key.cluster_id, own_cluster_id)
    return PullBlocksArguments(src_blocks if len(src_blocks) else None, dst_blocks, *ranges)


def _check_source_blocks(key: BlocksSource, src_blocks: BlockList, dst_blocks: BlockList) -> None:
    """Check that there are source blocks for a blocks key, one for each destination, and none for other keys."""
    if not isinstance(key, BlocksCacheKey):
        if len(src_blocks):
            raise InvalidArgument(f"src_blocks should be empty with {key}, whose slot is cut into blocks")
    elif len(src_blocks) == 0:
        raise InvalidArgument("src_blocks can not be empty with a BlocksCacheKey")
    elif len(src_blocks) != len(dst_blocks):
        raise InvalidArgument(f"{len(src_blocks)} src_blocks and {len(dst_blocks)} dst_blocks, size should be same")
