"""What a transfer may touch on this side: slots, tensors, bytes. Each rule raises LLM_PARAM_INVALID with the values."""

from __future__ import annotations

from typing import Optional

from llm_datadist._local import BlockPairs, LocalCache
from llm_datadist.engine.failures import invalid

TensorRange = Optional[tuple[int, int]]  # first tensor, number of tensors; None = all


def local_tensors(call: str, cache: LocalCache, tensors: TensorRange) -> tuple[int, int]:
    """Resolve the range of local tensors, which must exist."""
    if tensors is None:
        return 0, cache.tensors
    first, count = tensors
    if first + count > cache.tensors:
        last = first + count - 1
        have = f"cache {cache.cache_id} has {cache.tensors}"
        raise invalid(call, f"local tensors {first} to {last} are out of range, {have}")
    return first, count


def local_slot(call: str, cache: LocalCache, slot: int) -> None:
    """Check that a local slot exists."""
    if slot >= cache.slots:
        raise invalid(call, f"batch_index {slot} is out of range, cache {cache.cache_id} has {cache.slots} slots")


def slot_bytes(call: str, cache: LocalCache, offset: int, size: int) -> int:
    """Resolve how many bytes go into a local slot; -1 means the rest of the slot after `offset`."""
    if offset >= cache.stride:
        raise invalid(call, f"dst_cache_offset {offset} is out of range, {_slot_text(cache)}")
    if size == -1:
        return cache.stride - offset
    if offset + size > cache.stride:
        raise invalid(call, f"dst_cache_offset {offset} + size {size} is out of range, {_slot_text(cache)}")
    return size


def local_blocks(call: str, cache: LocalCache, pairs: BlockPairs) -> None:
    """Check that every destination block exists."""
    if pairs.max_target >= cache.slots:
        have = f"cache {cache.cache_id} has {cache.slots} blocks"
        raise invalid(call, f"decoder block {pairs.max_target} is out of range, {have}")


def _slot_text(cache: LocalCache) -> str:
    return f"a slot of cache {cache.cache_id} has {cache.stride} bytes"
