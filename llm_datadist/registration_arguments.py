"""Checks of memory that a program registers, as far as they need no engine, in the documented order."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.arguments import check_isinstance, check_list_uint64
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.memory_info import MemInfo, Memtype
from llm_datadist.status import InvalidArgument


def check_registered_types(
    cache_desc: CacheDesc,
    addrs: list[int],
    key_name: str,
    keys: object,
    key_classes: type | Sequence[type],
    key_class: type | None,
    remote_accessible: bool | None,
) -> None:
    """Check the types of what `CacheManager.register_cache` and `register_blocks_cache` are called with.

    `key_name` is the name of the argument `keys`, which is one of `key_classes` with elements of `key_class`.
    """
    check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
    check_isinstance("addrs", addrs, list, int, allow_none=False)
    check_isinstance(key_name, keys, key_classes, key_class, allow_none=key_class is None)
    check_isinstance("remote_accessible", remote_accessible, bool)


def accessible(placement: Placement, remote_accessible: bool | None, has_members: bool) -> bool:
    """Tell whether peers may reach memory that is registered, by default or as asked.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: it should be, but members of a communicator have exchanged their memory already.
    """
    if remote_accessible and has_members:
        raise InvalidArgument("remote_accessible is True after link, memory that peers reach is registered before it")
    if remote_accessible is None:
        return placement is Placement.DEVICE and not has_members
    return remote_accessible


def check_addresses(addrs: list[int], num_tensors: int | None = None) -> None:
    """Check that there are addresses; with `num_tensors` one for each tensor, and none that is 0."""
    if not addrs:
        raise InvalidArgument("addrs is empty, should have an address for each tensor")
    check_list_uint64("addrs", addrs)
    if num_tensors is None:
        return
    if len(addrs) != num_tensors:
        raise InvalidArgument(
            f"addrs has {len(addrs)} addresses for {num_tensors} tensors, the numbers should be equal"
        )
    if 0 in addrs:
        raise InvalidArgument(f"addrs[{addrs.index(0)}] is 0, should be the address of a tensor")


def check_remapped(mem_infos: MemInfo | list[MemInfo]) -> None:
    """Check the argument of `CacheManager.remap_registered_memory`, which documents what is raised."""
    infos = mem_infos if isinstance(mem_infos, list) else [mem_infos]
    for index, info in enumerate(infos):
        what = f"mem_infos[{index}]"
        if not isinstance(info, MemInfo):
            raise InvalidArgument(f"{what} only support MemInfo, but got {type(info).__name__} {info!r}")
        if info.mem_type is not Memtype.MEM_TYPE_DEVICE:
            raise InvalidArgument(f"{what} is {info}, should be of {Memtype.MEM_TYPE_DEVICE}")
        if info.addr == 0:
            raise InvalidArgument(f"{what} is {info}, its address should not be 0")
        if info.size <= 0:
            raise InvalidArgument(f"{what} is {info}, its size should be greater than 0")
