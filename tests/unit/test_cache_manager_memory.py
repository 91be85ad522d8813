"""What `CacheManager` checks before it allocates or registers memory, in which order, and what it asks."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LLMException,
    LLMStatusCode,
    MemInfo,
    Memtype,
)
from llm_datadist.cache_manager import CacheManager
from llm_datadist.engine.keys import KeyKind
from tests.recording_manager import HOST, INVALID_ID, asked, cpu_cache, desc, make_manager, prepared, refused

NO_KEYS: list[Any] = []


@pytest.fixture
def manager() -> CacheManager:
    return make_manager()


# ---- allocation


def test_allocation_asks_for_bytes_slots_and_names(manager: CacheManager) -> None:
    description = desc(2, [4, 256])
    keys = (CacheKey(9, 10), CacheKey(9, INVALID_ID), CacheKey(9, INVALID_ID), CacheKey(9, 10, 3, 30))
    cache = manager.allocate_cache(description, keys)
    names = [(KeyKind.ORDINARY, 10, 0), None, None, (KeyKind.PREFIX, 30, 3)]
    assert prepared(manager) == [("allocate", (2, 2048, 4, names, None))]
    assert (type(cache), cache.cache_id, cache.tensor_addrs) == (Cache, 1, [512, 1024])
    assert cache.cache_desc is description
    assert cache.is_blocks_cache is False


def test_each_placement_has_its_pool(manager: CacheManager) -> None:
    manager.allocate_cache(desc(1, placement=HOST))
    blocks = manager.allocate_blocks_cache(desc(1, placement=HOST), BlocksCacheKey(9, 7))
    manager.allocate_blocks_cache(desc(1))
    assert prepared(manager) == [
        ("allocate", (1, 2048, 4, [], None, "host")),
        ("allocate", (1, 2048, 4, [], 7, "host")),
        ("allocate", (1, 2048, 4, [], None)),
    ]
    assert blocks.is_blocks_cache is True


@pytest.mark.parametrize("name", ["allocate_cache", "allocate_blocks_cache"])
def test_allocation_without_a_pool(name: str) -> None:
    match = "you should config memory pool firstly"
    refused(match + ".*llm.MemPoolConfig", getattr(make_manager(device_pool=0), name), desc(1, [1] * 32))
    refused(match + ".*llm.HostMemPoolConfig", getattr(make_manager(host_pool=0), name), desc(1, placement=HOST))
    refused("num_tensors should be bigger than zero", getattr(make_manager(device_pool=0), name), desc(0))


@pytest.mark.parametrize("name", ["allocate_cache", "allocate_blocks_cache"])
def test_descriptions_that_cannot_be_allocated(manager: CacheManager, name: str) -> None:
    allocate = getattr(manager, name)
    for other in (None, 1):
        with pytest.raises(TypeError, match="cache_desc only support CacheDesc"):
            allocate(other, "no key")
    with pytest.raises(TypeError, match="only support"):
        allocate(desc(0), "no key")
    refused("32 dimensions", allocate, desc(1, [1] * 32))
    for shape in ([0, 4], [4, 0], [-1, 4], [2**62, 2]):
        refused("shape", allocate, desc(1, shape))


def test_keys_that_cannot_be_bound(manager: CacheManager) -> None:
    refused("5 cache_keys for 4 slots", manager.allocate_cache, desc(), [CacheKey(0, index) for index in range(5)])
    twice = [CacheKey(0, 1), CacheKey(5, 1)]
    refused(r"cache_keys\[1\] .* is given twice", manager.allocate_cache, desc(), twice)
    refused("is given twice", manager.register_cache, desc(1), [512], twice)
    manager.allocate_cache(desc(), [CacheKey(0, 1), CacheKey(0, 1, 2), CacheKey(0, 3, 0, 1)])
    for key in (BlocksCacheKey(0, -1), BlocksCacheKey(2**64)):
        for call in (
            lambda key=key: manager.allocate_blocks_cache(desc(), key),
            lambda key=key: manager.register_blocks_cache(desc(1), [512], key),
        ):
            with pytest.raises(ValueError, match="out of range") as caught:
                call()
            assert not isinstance(caught.value, LLMException)


# ---- giving up


def test_each_kind_has_its_call(manager: CacheManager) -> None:
    plain, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    refused("can not be blocks cache", manager.deallocate_cache, blocks)
    refused("should be blocks cache", manager.deallocate_blocks_cache, plain)
    assert asked(manager) == []
    for _ in range(2):
        manager.deallocate_cache(plain)
        manager.deallocate_blocks_cache(blocks)
    assert asked(manager) == [("deallocate", (1,)), ("deallocate", (2,))]
    assert plain.tensor_addrs == blocks.tensor_addrs == []
    assert repr(plain) == "Cache(cache_id = 1, device_tensor_addrs = 0, is_blocks_cache = False)"


@pytest.mark.parametrize("name", ["deallocate_cache", "deallocate_blocks_cache"])
def test_what_cannot_be_deallocated(manager: CacheManager, name: str) -> None:
    with pytest.raises(AttributeError, match="cache only support Cache"):
        getattr(manager, name)(None)
    for other in (1, KvCache(1, desc(), [], None)):
        with pytest.raises(TypeError, match="cache only support Cache"):
            getattr(manager, name)(other)


def test_caches_that_are_not_of_this_instance(manager: CacheManager) -> None:
    foreign, host = make_manager().allocate_cache(desc()), cpu_cache()
    manager.deallocate_cache(foreign)
    manager.deallocate_blocks_cache(host)
    assert asked(manager) == [("deallocate", (-1,)), ("deallocate", (-1,))]
    assert foreign.tensor_addrs == host.tensor_addrs == []


def test_a_registered_cache_that_is_deallocated_is_unregistered(manager: CacheManager) -> None:
    plain = manager.register_cache(desc(1), [512])
    manager.deallocate_cache(plain)
    manager.deallocate_cache(plain)
    assert asked(manager) == [("unregister", (1,))]
    assert plain.tensor_addrs == []


# ---- registration


def test_registration_asks_for_addresses_and_names(manager: CacheManager) -> None:
    description, addrs = desc(2, [4, 256]), [4096, 512]
    cache = manager.register_cache(description, addrs, [CacheKey(9, 10), CacheKey(9, INVALID_ID)])
    blocks = manager.register_blocks_cache(desc(1, [3, 2]), [7], BlocksCacheKey(9, 5))
    names = [(KeyKind.ORDINARY, 10, 0), None]
    assert prepared(manager) == [
        ("register", (2, 2048, 4, [4096, 512], names, None, True)),
        ("register", (1, 12, 3, [7], [], 5, True)),
    ]
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache) == (1, [4096, 512], False)
    assert cache.cache_desc is description
    assert (blocks.cache_id, blocks.tensor_addrs, blocks.is_blocks_cache) == (2, [7], True)
    addrs.append(1)
    assert cache.tensor_addrs == [4096, 512], "the list is the caller's"


@pytest.mark.parametrize("name", ["register_cache", "register_blocks_cache"])
def test_who_may_reach_registered_memory(manager: CacheManager, name: str) -> None:
    register, engine = getattr(manager, name), manager._engine

    def is_accessible(**keywords: Any) -> bool:
        placement = keywords.pop("placement", None)
        register(desc(1) if placement is None else desc(1, placement=placement), [512], **keywords)
        return prepared(manager)[-1][1][-1]

    assert is_accessible() is True
    assert is_accessible(placement=HOST) is False
    assert is_accessible(placement=HOST, remote_accessible=True) is True
    assert is_accessible(remote_accessible=False) is False
    engine.has_members = True  # type: ignore[misc]
    refused("after link", register, desc(1), [], remote_accessible=True)
    assert is_accessible() is False
    assert is_accessible(placement=HOST) is False
    assert is_accessible(remote_accessible=False) is False


def test_the_first_wrong_argument_of_a_registration_counts(manager: CacheManager) -> None:
    manager._engine.has_members = True  # type: ignore[misc]
    for name, key_name in (("register_cache", "cache_keys"), ("register_blocks_cache", "blocks_cache_key")):
        register = getattr(manager, name)
        args: list[Any] = [None, (1, 2), "no key", 1]
        for position, match, repairs in (
            (0, "cache_desc only support CacheDesc", [desc(2, [0, 1])]),
            (1, "addrs only support list", [["a"]]),
            (1, "addrs inner type only support int", [[[1]]]),
            (1, "addrs inner type only support int", [[]]),
            (2, f"{key_name} only support", [CacheKeyByIdAndIndex(0, 1)]),
            (2, f"{key_name} only support", [() if name == "register_cache" else None]),
            (3, "remote_accessible only support bool", [True]),
        ):
            with pytest.raises(TypeError, match=match):
                register(*args)
            args[position] = repairs[0]
        refused("after link", register, *args)
        args[3] = False
        refused("addrs is empty", register, *args)
        args[1] = [-1, 5]
        with pytest.raises(ValueError, match="out of range"):
            register(*args)
        if name == "register_cache":
            args[1] = [1, 2, 3]
            refused("addrs has 3 addresses for 2 tensors", register, *args)
            args[1] = [1, 0]
            refused(r"addrs\[1\] is 0", register, *args)
        args[1] = [1, 2]
        refused("shape", register, *args)
        args[0] = desc(2)
        register(*args)
    assert len(prepared(manager)) == 2


def test_a_tuple_of_one_key_is_as_good_as_a_list(manager: CacheManager) -> None:
    manager.register_cache(desc(1), [512], (CacheKey(0, 1),))
    with pytest.raises(TypeError, match="cache_keys inner type only support CacheKey"):
        manager.register_cache(desc(1), [512], [None])  # type: ignore[list-item]
    refused("5 cache_keys for 4 slots", manager.register_cache, desc(1), [512], [CacheKey(0, i) for i in range(5)])


def test_registration_needs_no_pool() -> None:
    manager = make_manager(device_pool=0, host_pool=0)
    manager.register_cache(desc(1), [512])
    manager.register_blocks_cache(desc(1, placement=HOST), [512])
    assert len(prepared(manager)) == 2


def test_a_registration_ends_by_its_id(manager: CacheManager) -> None:
    for wrong in (None, "1", 1.0, cpu_cache()):
        with pytest.raises(TypeError, match="cache_id only support int"):
            manager.unregister_cache(wrong)  # type: ignore[arg-type]
    for number in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="out of range"):
            manager.unregister_cache(number)
    manager.unregister_cache(5)
    manager.unregister_cache(-1)
    assert asked(manager) == [("unregister", (5,)), ("unregister", (-1,))]


@pytest.mark.parametrize(
    ("infos", "match"),
    [
        (None, r"mem_infos\[0\] only support MemInfo"),
        (5, r"mem_infos\[0\] only support MemInfo"),
        ((MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1),), r"mem_infos\[0\] only support MemInfo"),
        ([MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1), "x"], r"mem_infos\[1\] only support MemInfo"),
        (MemInfo(Memtype.MEM_TYPE_HOST, 1, 1), r"mem_infos\[0\].*MEM_TYPE_DEVICE"),
        ([MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 1)], r"mem_infos\[0\].*address should not be 0"),
        ([MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 0)], r"mem_infos\[0\].*size should be greater than 0"),
        (MemInfo(Memtype.MEM_TYPE_DEVICE, 1, -1), r"mem_infos\[0\].*size should be greater than 0"),
    ],
)
def test_memory_that_cannot_be_remapped(manager: CacheManager, infos: Any, match: str) -> None:
    refused(match, manager.remap_registered_memory, infos)


def test_remapping_does_nothing(manager: CacheManager) -> None:
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 512)
    manager.remap_registered_memory(info)
    manager.remap_registered_memory([info, info])
    manager.remap_registered_memory([])
    assert asked(manager) == []


# ---- keys


def test_a_key_is_removed_by_its_name(manager: CacheManager) -> None:
    manager.remove_cache_key(CacheKey(9, 5, 6))
    manager.remove_cache_key(CacheKey(9, 5, 6, 7))
    manager.remove_cache_key(CacheKey(9, INVALID_ID))
    assert asked(manager) == [("remove_key", ((KeyKind.ORDINARY, 5, 6),)), ("remove_key", ((KeyKind.PREFIX, 7, 6),))]


def test_what_cannot_be_removed(manager: CacheManager) -> None:
    without = make_manager(device_pool=0, host_pool=0)
    for key in (BlocksCacheKey(0), CacheKeyByIdAndIndex(0, 1), None, 1):
        for one in (manager, without):
            with pytest.raises(TypeError, match="cache_key only support CacheKey"):
                one.remove_cache_key(key)  # type: ignore[arg-type]
    with pytest.raises(LLMException, match="needs a memory pool") as caught:
        without.remove_cache_key(CacheKey(0, 1))
    assert caught.value.status_code is LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    make_manager(device_pool=0).remove_cache_key(CacheKey(0, 1))
