"""Checks of what a layer-wise transfer is called with, in the documented order."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.arguments import check_isinstance, check_list_uint64, check_uint64
from llm_datadist.cache_handle import CacheHandle
from llm_datadist.engine.transfer_job import TENSORS_PER_LAYER, Destination
from llm_datadist.kv_cache import KvCache
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.status import InvalidArgument
from llm_datadist.transfer_config import TransferConfig


def check_transfer(
    src_cache: KvCache,
    layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[TransferConfig],
    src_block_indices: Sequence[int] | None,
    dst_block_indices: Sequence[int] | None,
    dst_block_memory_size: int | None,
) -> tuple[Destination, ...]:
    """Check the arguments of `KvCacheManager.transfer_cache_async`, which documents what is raised.

    Returns
    -------
    tuple of Destination
        What the configs say now; a config without a layer range got one.
    """
    check_isinstance("src_cache", src_cache, KvCache, allow_none=False)
    check_block_integers(src_block_indices, dst_block_indices, dst_block_memory_size)
    by_blocks = bool(src_block_indices)
    if src_block_indices:
        check_block_table(src_block_indices, dst_block_indices)
    elif dst_block_indices is not None:
        raise InvalidArgument(
            "transfer from cache to blocks is not supported: dst_block_indices is given without src_block_indices"
        )
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    check_isinstance("transfer_configs", transfer_configs, [list, tuple], TransferConfig, allow_none=False)
    if not by_blocks:
        check_no_block_size(dst_block_memory_size)
    num_layers = check_num_layers(src_cache)
    return tuple(
        check_config(f"transfer_configs[{index}]", config, num_layers, by_blocks)
        for index, config in enumerate(transfer_configs)
    )


def check_block_integers(
    src_block_indices: Sequence[int] | None,
    dst_block_indices: Sequence[int] | None,
    dst_block_memory_size: int | None,
) -> None:
    """Check types and widths of block numbers and of the size of a block."""
    _check_block_indices("dst_block_indices", dst_block_indices)
    _check_block_indices("src_block_indices", src_block_indices)
    if dst_block_memory_size is not None:
        check_uint64("dst_block_memory_size", dst_block_memory_size)


def check_no_block_size(dst_block_memory_size: int | None) -> None:
    """Check that there is no size of a block, as there are no blocks."""
    if dst_block_memory_size:
        raise InvalidArgument(
            f"dst_block_memory_size {dst_block_memory_size} is invalid, should be None or 0 without dst_block_indices"
        )


def check_num_layers(src_cache: CacheHandle) -> int:
    """Check that the tensors of a cache make layers, and give their number."""
    num_tensors = src_cache.cache_desc.num_tensors
    if num_tensors % TENSORS_PER_LAYER != 0:
        raise InvalidArgument(
            f"num_tensors {num_tensors} of src_cache is not even, should have two tensors for each layer"
        )
    return num_tensors // TENSORS_PER_LAYER


def _check_block_indices(name: str, indices: Sequence[int] | None) -> None:
    check_isinstance(name, indices, [list, tuple], int)
    if indices is not None:
        check_list_uint64(name, indices)


def check_block_table(src_block_indices: Sequence[int], dst_block_indices: Sequence[int] | None) -> None:
    """Check that there is a destination block for each source block."""
    if not dst_block_indices:
        raise InvalidArgument(
            "transfer from blocks to cache is not supported: src_block_indices is given without dst_block_indices"
        )
    if len(src_block_indices) != len(dst_block_indices):
        raise InvalidArgument(
            f"num_block_indices mismatches: {len(src_block_indices)} src_block_indices and {len(dst_block_indices)}"
            " dst_block_indices"
        )


def check_config(name: str, config: TransferConfig, num_layers: int, by_blocks: bool) -> Destination:
    """Check one config against the source, and take its values."""
    layers = config.src_layer_range
    if layers is None:
        layers = config.src_layer_range = range(num_layers)
    slot = config.src_batch_index
    if by_blocks and slot != 0:
        raise InvalidArgument(f"{name}.src_batch_index {slot} is invalid, should be 0 when blocks are sent")
    check_source_layers(name, layers, num_layers)
    addresses = tuple(config.dst_addrs)
    if len(addresses) != TENSORS_PER_LAYER * len(layers):
        raise InvalidArgument(
            f"{name} has {len(addresses)} dst_addrs for {len(layers)} layers, should have two for each layer"
        )
    return Destination(config.dst_cluster_id, layers, addresses, None if by_blocks else slot)


def check_source_layers(name: str, layers: range, num_layers: int) -> None:
    """Check that the source has the layers of a config, which has checked the rest."""
    if layers.stop > num_layers:
        raise InvalidArgument(f"{name}.src_layer_range {layers} is out of range, src_cache has {num_layers} layers")
