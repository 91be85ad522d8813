"""Checks of what a pull is called with, as far as they need no engine, in the documented order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_datadist.arguments import (
    check_int64,
    check_isinstance,
    check_positive_or_set_default,
    check_uint32,
)
from llm_datadist.block_list import check_block_list
from llm_datadist.cache_handle import CacheHandle
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, check_blocks_cache_key
from llm_datadist.cache_kinds import check_device_cache
from llm_datadist.kv_cache import KvCache
from llm_datadist.layer_range import TensorRange, TensorRanges, tensor_ranges
from llm_datadist.sealed_blocks import check_token
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist._local import BlockList

DEFAULT_TENSORS_PER_LAYER = 2  # K and V


class PullCacheArguments(NamedTuple):
    """What a pull of a slot asks the engine for, beside key, cache, slot and size.

    Attributes
    ----------
    src_tensors, dst_tensors : (int, int) or None
        First tensor and number of tensors; None = all.
    src_offset, dst_offset : int
        Bytes into the slots.
    consume : bool
        Whether the pull may release the key: it does unless an offset was given, be it 0.
    """

    src_tensors: TensorRange
    dst_tensors: TensorRange
    src_offset: int
    dst_offset: int
    consume: bool


def check_pull_cache(
    cache_key: CacheKey | CacheKeyByIdAndIndex,
    kv_cache: KvCache,
    batch_index: int,
    size: int,
    keywords: Mapping[str, Any],
) -> PullCacheArguments:
    """Check the arguments of `KvCacheManager.pull_cache`, which documents what is raised."""
    check_isinstance("cache_key", cache_key, [CacheKey, CacheKeyByIdAndIndex], allow_none=False)
    check_device_cache("kv_cache", kv_cache)
    check_int64("size", size)
    check_uint32("batch_index", batch_index)
    check_pulled_size(size)
    _check_offsets(keywords)
    check_pullable(cache_key)
    return check_pull_cache_keywords(keywords, kv_cache)


def check_pulled_size(size: int) -> None:
    """Check the size of a pull, which is an int64."""
    if size != -1 and size <= 0:
        raise InvalidArgument(f"size {size} is invalid, should be greater than 0, or -1 for the rest of the slot")


def check_pullable(cache_key: CacheKey | CacheKeyByIdAndIndex) -> None:
    """Check that a key names one slot."""
    if not cache_key._pullable:
        raise InvalidArgument(f"one of req id and prefix id should be valid, and not both, but the key is {cache_key}")


def check_pull_cache_keywords(keywords: Mapping[str, Any], kv_cache: KvCache) -> PullCacheArguments:
    """Check the keyword arguments of `KvCacheManager.pull_cache`; the others are good."""
    src_offset, dst_offset, consume = _check_offsets(keywords)
    src_tensors, dst_tensors = check_tensor_ranges(keywords, kv_cache)
    return PullCacheArguments(src_tensors, dst_tensors, src_offset, dst_offset, consume)


def check_pull_blocks(
    prompt_cache_key: BlocksCacheKey,
    decoder_kv_cache: KvCache,
    prompt_blocks: BlockList,
    decoder_blocks: BlockList,
    token: bytes | None,
    keywords: Mapping[str, Any],
) -> TensorRanges:
    """Check the arguments of `KvCacheManager.pull_blocks`, which documents what is raised."""
    check_isinstance("prompt_cache_key", prompt_cache_key, BlocksCacheKey, allow_none=False)
    check_isinstance("decoder_kv_cache", decoder_kv_cache, KvCache, allow_none=False)
    check_block_list("prompt_blocks", prompt_blocks, list)
    check_block_list("decoder_blocks", decoder_blocks, list)
    check_token(token)
    check_device_cache("decoder_kv_cache", decoder_kv_cache)
    for name, blocks in (("prompt_blocks", prompt_blocks), ("decoder_blocks", decoder_blocks)):
        if len(blocks) == 0:
            raise InvalidArgument(f"{name} can not be empty")
    if len(prompt_blocks) != len(decoder_blocks):
        raise InvalidArgument(
            f"{len(prompt_blocks)} prompt_blocks and {len(decoder_blocks)} decoder_blocks, size should be same"
        )
    ranges = check_tensor_ranges(keywords, decoder_kv_cache)
    # The engine refuses block numbers that are no uint64; it turns them into machine integers anyway.
    check_blocks_cache_key(prompt_cache_key)
    return ranges


def _check_offsets(keywords: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Give both offsets, and whether neither was given."""
    src_offset, dst_offset = keywords.get("src_cache_offset"), keywords.get("dst_cache_offset")
    return (
        check_positive_or_set_default("src_cache_offset", src_offset, 0),
        check_positive_or_set_default("dst_cache_offset", dst_offset, 0),
        src_offset is None and dst_offset is None,
    )


def check_tensor_ranges(keywords: Mapping[str, Any], cache: CacheHandle) -> TensorRanges:
    """Check the layer ranges of a pull, and say which tensors they choose."""
    return check_layer_ranges(keywords, check_tensors_per_layer(keywords, cache), cache)


def check_tensors_per_layer(keywords: Mapping[str, Any], cache: CacheHandle) -> int:
    """Check the number of tensors that make one layer, and give it."""
    per_layer = check_uint32("tensor_num_per_layer", keywords.get("tensor_num_per_layer", DEFAULT_TENSORS_PER_LAYER))
    if per_layer == 0:
        raise InvalidArgument(f"tensor_num_per_layer 0 is invalid, should [1, {cache.cache_desc.num_tensors}]")
    return per_layer


def check_layer_ranges(keywords: Mapping[str, Any], per_layer: int, cache: CacheHandle) -> TensorRanges:
    """Check the layer ranges of a pull, given the tensors that make one layer, and say which tensors they choose."""
    num_tensors = cache.cache_desc.num_tensors
    ranges = tensor_ranges(keywords.get("src_layer_range"), keywords.get("dst_layer_range"), per_layer)
    if ranges != (None, None) and num_tensors % per_layer != 0:
        raise InvalidArgument(
            f"tensor_num_per_layer {per_layer} is invalid, should [1, {num_tensors}] and divide the number of tensors,"
            f" which is {num_tensors}, when a layer range is given"
        )
    return ranges
