"""Checks of what a layer-wise transfer of the cache manager is called with, in the documented order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from llm_datadist.arguments import check_isinstance
from llm_datadist.cache import Cache
from llm_datadist.cache_keys import BlocksCacheKey, check_blocks_cache_key
from llm_datadist.cache_kinds import check_on_device
from llm_datadist.engine.transfer_job import Destination
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.status import InvalidArgument
from llm_datadist.transfer_arguments import (
    check_block_integers,
    check_block_table,
    check_config,
    check_no_block_size,
    check_num_layers,
    check_source_layers,
)
from llm_datadist.transfer_config import TransferConfig, TransferWithCacheKeyConfig

AnyConfig = Union[TransferConfig, TransferWithCacheKeyConfig]


def check_cache_transfer(
    src_cache: Cache,
    layer_synchronizer: LayerSynchronizer,
    transfer_configs: Sequence[AnyConfig],
    src_block_indices: Sequence[int] | None,
    dst_block_indices: Sequence[int] | None,
    dst_block_memory_size: int | None,
    by_key: bool,
) -> tuple[Destination, ...]:
    """Check the arguments of `CacheManager.transfer_cache_async`, which documents what is raised.

    Parameters
    ----------
    by_key : bool
        Whether configs name destinations by key, and not by addresses.

    Returns
    -------
    tuple of Destination
        What the configs say now; a config without a layer range got one.
    """
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    check_on_device("src_cache", src_cache)
    check_block_integers(src_block_indices, dst_block_indices, dst_block_memory_size)
    from_blocks = bool(src_block_indices)
    if src_block_indices:
        check_block_table(src_block_indices, dst_block_indices)
    elif dst_block_indices is not None:
        _check_cut(dst_block_indices, dst_block_memory_size)
    check_isinstance("layer_synchronizer", layer_synchronizer, LayerSynchronizer, allow_none=False)
    kind = TransferWithCacheKeyConfig if by_key else TransferConfig
    check_isinstance("transfer_configs", transfer_configs, [list, tuple], kind, allow_none=False)
    into_blocks = bool(dst_block_indices)
    if not into_blocks:
        check_no_block_size(dst_block_memory_size)
    num_layers = check_num_layers(src_cache)
    destinations = []
    for index, config in enumerate(transfer_configs):
        name = f"transfer_configs[{index}]"
        if isinstance(config, TransferConfig):
            destinations.append(check_config(name, config, num_layers, from_blocks))
        else:
            destinations.append(_check_key_config(name, config, num_layers, from_blocks, into_blocks))
    return tuple(destinations)


def _check_cut(dst_block_indices: Sequence[int], dst_block_memory_size: int | None) -> None:
    """Check what is needed to cut a slot into blocks."""
    if not dst_block_indices:
        raise InvalidArgument("dst_block_indices can not be empty, should be None to send a slot as it is")
    if not dst_block_memory_size:
        raise InvalidArgument(
            f"dst_block_memory_size is {dst_block_memory_size}, must be set to the bytes of a block when"
            " dst_block_indices is given without src_block_indices"
        )


def _check_key_config(
    name: str, config: TransferWithCacheKeyConfig, num_layers: int, from_blocks: bool, into_blocks: bool
) -> Destination:
    """Check one config against the source and the block table, and take its values."""
    layers, dst_layers, key = config.src_layer_range, config.dst_layer_range, config.cache_key
    check_source_layers(name, layers, num_layers)
    if len(layers) != len(dst_layers):
        raise InvalidArgument(
            f"{name} has src_layer_range {layers} and dst_layer_range {dst_layers}, should have equally many layers"
        )
    if isinstance(key, BlocksCacheKey):
        check_blocks_cache_key(key)
    if isinstance(key, BlocksCacheKey) is not into_blocks:
        wanted = "a BlocksCacheKey" if into_blocks else "a CacheKeyByIdAndIndex"
        raise InvalidArgument(
            f"{name}.cache_key is {key}, should be {wanted} {'with' if into_blocks else 'without'} dst_block_indices"
        )
    slot = None if from_blocks else config.src_batch_index
    return Destination(key.cluster_id, layers, (), slot, key=key._name, dst_layers=dst_layers)
