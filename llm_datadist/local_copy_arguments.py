"""Checks of what local copies are called with, as far as they need no engine, in the documented order."""

from __future__ import annotations

from typing import Callable, NamedTuple

from llm_datadist._local import flatten_copies
from llm_datadist.arguments import (
    are_block_numbers,
    check_dict,
    check_int64,
    check_isinstance,
    check_uint32,
    check_uint64,
)
from llm_datadist.cache import Cache
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_handle import CacheHandle
from llm_datadist.cache_kinds import check_blocks_cache, check_device_cache
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument


class BlockTable(NamedTuple):
    """Block ``sources[i]`` goes into block ``targets[i]``.

    Attributes
    ----------
    sources, targets : list of int
        Equally many.
    """

    sources: list[int]
    targets: list[int]


class SwapArguments(NamedTuple):
    """What a swap asks the engine for.

    Attributes
    ----------
    device, host : CacheHandle
        The two caches.
    block_nbytes : int
        Bytes of a block in one tensor.
    blocks : BlockTable
        What goes where.
    swap_in : bool
        Whether the host is the source.
    """

    device: CacheHandle
    host: CacheHandle
    block_nbytes: int
    blocks: BlockTable
    swap_in: bool


def check_copy_cache(
    dst: CacheHandle,
    src: CacheHandle,
    dst_batch_index: int,
    src_batch_index: int,
    offset: int,
    size: int,
    req_id: int | None,
    check_cache: Callable[[str, object], None] = check_device_cache,
) -> None:
    """Check the arguments of `KvCacheManager.copy_cache`, which documents what is raised.

    `check_cache` is the check of a handle and its kind.
    """
    check_cache("dst", dst)
    check_cache("src", src)
    check_uint32("dst_batch_index", dst_batch_index)
    check_uint32("src_batch_index", src_batch_index)
    check_uint64("offset", offset)
    check_int64("size", size)
    if size != -1 and size <= 0:
        raise InvalidArgument(f"size {size} is invalid, should be greater than 0, or -1 for the rest of the slot")
    check_isinstance("req_id", req_id, int)


def check_copy_blocks(
    cache: CacheHandle,
    copy_block_info: dict[int, list[int]],
    handle: type[CacheHandle] = KvCache,
    check_cache: Callable[[str, object], None] = check_device_cache,
) -> BlockTable:
    """Check the arguments of `KvCacheManager.copy_blocks`, and give the pairs in the order of the dict.

    `handle` is the class of handles, `check_cache` the check of a handle and its kind.
    """
    check_isinstance("cache", cache, handle, allow_none=False)
    check_isinstance("copy_block_info", copy_block_info, dict, allow_none=False)
    flat = flatten_copies(copy_block_info) if type(copy_block_info) is dict else None
    if flat is not None:
        check_cache("cache", cache)
        return BlockTable(*flat)
    check_dict("copy_block_info", copy_block_info, int, list, int)
    check_cache("cache", cache)
    blocks = BlockTable([], [])
    for source, targets in copy_block_info.items():
        check_uint64("source block", source)
        for target in targets:
            check_uint64("destination block", target)
        blocks.sources.extend([source] * len(targets))
        blocks.targets.extend(targets)
    return blocks


def check_swap_blocks(src: KvCache, dst: KvCache, src_to_dst: dict[int, int]) -> SwapArguments:
    """Check the arguments of `KvCacheManager.swap_blocks`, which documents what is raised."""
    check_isinstance("src", src, KvCache, allow_none=False)
    check_isinstance("dst", dst, KvCache, allow_none=False)
    check_isinstance("src_to_dst", src_to_dst, dict, int, allow_none=False)
    return _swap_arguments(src, dst, src_to_dst)


def check_swap_of_blocks_caches(src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> SwapArguments:
    """Check the arguments of `CacheManager.swap_blocks`, which documents what is raised."""
    check_isinstance("src_cache", src_cache, Cache, allow_none=False)
    check_isinstance("dst_cache", dst_cache, Cache, allow_none=False)
    check_isinstance("src_to_dst", src_to_dst, dict, int, allow_none=False)
    check_blocks_cache("src_cache", src_cache)
    check_blocks_cache("dst_cache", dst_cache)
    return _swap_arguments(src_cache, dst_cache, src_to_dst)


def _swap_arguments(src: CacheHandle, dst: CacheHandle, src_to_dst: dict[int, int]) -> SwapArguments:
    """Check two handles and a table of the right types against each other."""
    block_nbytes = _block_nbytes("src", src.cache_desc)
    other_nbytes = _block_nbytes("dst", dst.cache_desc)
    if block_nbytes != other_nbytes:
        raise InvalidArgument(
            f"block sizes of src and dst must be equal, but are {block_nbytes} and {other_nbytes} bytes"
        )
    if src.cache_desc.num_tensors != dst.cache_desc.num_tensors:
        raise InvalidArgument(
            f"num_tensors of src and dst must be equal, but are {src.cache_desc.num_tensors} and"
            f" {dst.cache_desc.num_tensors}"
        )
    blocks = _swap_table(src.cache_desc.batch_size, dst.cache_desc.batch_size, src_to_dst)
    swap_in = _is_swap_in(src, dst)
    device, host = (dst, src) if swap_in else (src, dst)
    _check_same_devices(device, host)
    return SwapArguments(device, host, block_nbytes, blocks, swap_in)


def _block_nbytes(name: str, desc: CacheDesc) -> int:
    nbytes = desc.size
    if desc.batch_size <= 0:
        raise InvalidArgument(f"batch_size of {name} is {desc.batch_size}, should be greater than 0")
    return nbytes // desc.batch_size


def _swap_table(src_batch_size: int, dst_batch_size: int, src_to_dst: dict[int, int]) -> BlockTable:
    blocks = BlockTable(list(src_to_dst), list(src_to_dst.values()))
    if are_block_numbers(blocks.sources, src_batch_size) and are_block_numbers(blocks.targets, dst_batch_size):
        return blocks
    for source, target in src_to_dst.items():
        check_isinstance("src_to_dst dict value", target, int, allow_none=False)
        _check_block("source", source, src_batch_size)
        _check_block("destination", target, dst_batch_size)
    return blocks


def _check_block(side: str, block: int, batch_size: int) -> None:
    if not 0 <= block < batch_size:
        raise InvalidArgument(f"{side} block {block} must be in [0, {batch_size})")


def _is_swap_in(src: CacheHandle, dst: CacheHandle) -> bool:
    placements = (src.cache_desc.placement, dst.cache_desc.placement)
    if placements == (Placement.HOST, Placement.DEVICE):
        return True
    if placements == (Placement.DEVICE, Placement.HOST):
        return False
    raise InvalidArgument(
        f"a swap from {placements[0]} to {placements[1]} is not support, one side should be HOST, the other DEVICE"
    )


def _check_same_devices(device: CacheHandle, host: CacheHandle) -> None:
    """Check that there is one host address for each address of the device cache."""
    wanted = [len(addresses) for addresses in device._addresses()]
    given = [len(addresses) for addresses in host._addresses()]
    if not wanted:
        raise InvalidArgument(f"device cache {device.cache_id} has no addresses, it was deallocated")
    if wanted != given:
        raise InvalidArgument(
            f"addresses on each device should be equally many, the device cache has {wanted}, the host cache {given}"
        )
