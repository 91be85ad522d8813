"""Checks of what a push is called with, as far as they need no engine, in the documented order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.arguments import check_int64, check_isinstance, check_uint32
from llm_datadist.block_list import check_block_list, check_block_numbers
from llm_datadist.cache import Cache
from llm_datadist.cache_keys import BlocksCacheKey, CacheKeyByIdAndIndex, check_blocks_cache_key
from llm_datadist.cache_kinds import check_blocks_cache, check_plain_cache
from llm_datadist.cache_pull_arguments import check_other_cluster
from llm_datadist.layer_range import TensorRanges, tensor_ranges
from llm_datadist.status import InvalidArgument
from llm_datadist.transfer_config import check_layer_range

if TYPE_CHECKING:
    from llm_datadist._local import BlockList


def check_push_cache(
    dst_cache_key: CacheKeyByIdAndIndex,
    src_cache: Cache,
    src_batch_index: int,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    size: int,
    tensor_num_per_layer: int,
    own_cluster_id: int,
) -> TensorRanges:
    """Check the arguments of `CacheManager.push_cache`, which documents what is raised."""
    check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
    check_plain_cache("src_cache", src_cache)
    check_uint32("src_batch_index", src_batch_index)
    ranges = _check_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
    check_int64("size", size)
    if size != -1:
        raise InvalidArgument(f"size {size} is invalid, should be -1, which is the whole slot")
    check_other_cluster(dst_cache_key.cluster_id, own_cluster_id)
    return ranges


def check_push_blocks(
    dst_cache_key: BlocksCacheKey,
    src_cache: Cache,
    src_blocks: BlockList,
    dst_blocks: BlockList,
    src_layer_range: range | None,
    dst_layer_range: range | None,
    tensor_num_per_layer: int,
    own_cluster_id: int,
) -> TensorRanges:
    """Check the arguments of `CacheManager.push_blocks`, which documents what is raised."""
    check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey, allow_none=False)
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    check_block_list("src_blocks", src_blocks, [list, tuple])
    check_block_list("dst_blocks", dst_blocks, [list, tuple])
    check_blocks_cache("src_cache", src_cache)
    if len(dst_blocks) == 0:
        raise InvalidArgument("dst_blocks can not be empty")
    if len(src_blocks) != len(dst_blocks):
        raise InvalidArgument(f"{len(src_blocks)} src_blocks and {len(dst_blocks)} dst_blocks, size should be same")
    ranges = _check_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
    check_blocks_cache_key(dst_cache_key)
    check_block_numbers("src_blocks", src_blocks)
    check_block_numbers("dst_blocks", dst_blocks)
    check_other_cluster(dst_cache_key.cluster_id, own_cluster_id)
    return ranges


def _check_layers(
    src_cache: Cache, src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int
) -> TensorRanges:
    """Check the layers of a push, by default all that the source has, and say which tensors they choose."""
    num_tensors = src_cache.cache_desc.num_tensors
    check_uint32("tensor_num_per_layer", tensor_num_per_layer)
    if tensor_num_per_layer == 0 or num_tensors % tensor_num_per_layer != 0:
        raise InvalidArgument(
            f"tensor_num_per_layer {tensor_num_per_layer} is invalid, should [1, {num_tensors}] and divide the number"
            f" of tensors, which is {num_tensors}"
        )
    num_layers = num_tensors // tensor_num_per_layer
    src_layers = _layers("src_layer_range", src_layer_range, num_layers)
    dst_layers = _layers("dst_layer_range", dst_layer_range, num_layers)
    if src_layers.stop > num_layers:
        raise InvalidArgument(f"src_layer_range {src_layers} is out of range, src_cache has {num_layers} layers")
    if len(src_layers) != len(dst_layers):
        raise InvalidArgument(
            f"src_layer_range {src_layers} and dst_layer_range {dst_layers} differ in length, should have equally many"
            " layers"
        )
    return tensor_ranges(src_layers, dst_layers, tensor_num_per_layer)


def _layers(name: str, layers: range | None, num_layers: int) -> range:
    return range(num_layers) if layers is None else check_layer_range(name, layers)
