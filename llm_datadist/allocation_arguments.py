"""Checks of descriptions and keys that memory is allocated or registered under."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.arguments import INT64_MAX
from llm_datadist.cache_desc import CacheDesc, tensor_nbytes
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, check_blocks_cache_key
from llm_datadist.engine.keys import KeyName
from llm_datadist.status import InvalidArgument

MAX_DIMENSIONS = 31
_ALIGNMENT = 512  # bytes; what a tensor occupies is a multiple of it


def check_num_tensors(cache_desc: CacheDesc) -> None:
    """Check that a description has a tensor."""
    if cache_desc.num_tensors == 0:
        raise InvalidArgument("num_tensors should be bigger than zero, but is 0")


def check_tensor_nbytes(cache_desc: CacheDesc) -> int:
    """Check that a shape can be allocated, and give the bytes of one tensor."""
    check_dimensions(len(cache_desc.shape))
    nbytes = tensor_nbytes(cache_desc.shape, cache_desc.data_type)
    aligned = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    if cache_desc.num_tensors * aligned > INT64_MAX:
        raise InvalidArgument(f"{cache_desc.num_tensors} tensors of {nbytes} bytes do not fit into int64")
    return nbytes


def check_dimensions(dimensions: int) -> None:
    """Check the number of dimensions of a tensor."""
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise InvalidArgument(f"shape has {dimensions} dimensions, should have 1 to {MAX_DIMENSIONS}")


def key_names(cache_keys: Sequence[CacheKey], slots: int, unique: bool = False) -> list[KeyName | None]:
    """Give the name of each key, None for a placeholder.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: more keys than slots, or, with `unique`, two keys of the same name.
    """
    if len(cache_keys) > slots:
        raise InvalidArgument(f"{len(cache_keys)} cache_keys for {slots} slots, should be at most one for each slot")
    if not cache_keys:
        return []
    names = [None if key._is_placeholder else key._name for key in cache_keys]
    if unique:
        given: set[KeyName] = set()
        for index, name in enumerate(names):
            if name in given:
                raise InvalidArgument(f"cache_keys[{index}] {cache_keys[index]} is given twice, should name one slot")
            if name is not None:
                given.add(name)
    return names


def blocks_model(blocks_cache_key: BlocksCacheKey | None) -> int | None:
    """Give the model of a key; raises ValueError for numbers that are no uint64."""
    if blocks_cache_key is None:
        return None
    check_blocks_cache_key(blocks_cache_key)
    return blocks_cache_key.model_id
