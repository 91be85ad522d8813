"""One instance with its real engine and no peer: its life, its options, its caches."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    KvCacheManager,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
)
from llm_datadist.introspection import pool_statistics

INVALID_ID = 2**64 - 1
POOL_BYTES = 1 << 20
PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX


def desc(num_tensors: int = 2, shape: Any = (4, 256), data_type: DataType = DataType.DT_FLOAT16) -> CacheDesc:
    return CacheDesc(num_tensors, shape, data_type)


def code_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        function(*args, **kwargs)
    return caught.value.status_code


@pytest.fixture
def options(free_port: Callable[[], int]) -> dict[str, str]:
    """Options that every role accepts."""
    return {
        "ge.exec.deviceId": "0",
        "llm.listenIpInfo": f"127.0.0.1:{free_port()}",
        "ge.flowGraphMemMaxSize": str(POOL_BYTES),
        "llm.MemoryUtilization": "1.0",
    }


@pytest.fixture
def start(options: dict[str, str]) -> Iterator[Callable[..., LLMDataDist]]:
    """Initialise instances, and finalise the last one after the test."""

    def start(role: LLMRole, **changes: str) -> LLMDataDist:
        instance = LLMDataDist(role, 0)
        instance.init({**options, **{key.replace("__", "."): value for key, value in changes.items()}})
        return instance

    yield start
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


@pytest.fixture
def prompt(start: Callable[..., LLMDataDist]) -> LLMDataDist:
    return start(PROMPT)


@pytest.fixture
def manager(prompt: LLMDataDist) -> KvCacheManager:
    return prompt.kv_cache_manager


def listens(address: str) -> bool:
    """Whether this process listens at ``ip:port``."""
    ip, port = address.split(":")
    assert ip == "127.0.0.1"
    with open("/proc/self/net/tcp", encoding="ascii") as table:
        return any(line.split()[1] == f"0100007F:{int(port):04X}" and line.split()[3] == "0A" for line in table)


# ---- life


@pytest.mark.parametrize("role", LLMRole)
def test_only_a_prompt_listens(start: Callable[..., LLMDataDist], options: dict[str, str], role: LLMRole) -> None:
    instance = start(role)
    assert listens(options["llm.listenIpInfo"]) is (role is PROMPT)
    instance.finalize()
    assert not listens(options["llm.listenIpInfo"])


def test_init_and_finalize_again_and_again(options: dict[str, str]) -> None:
    instance = LLMDataDist(PROMPT, 1)
    for _ in range(10):
        instance.init(options)
        assert instance.kv_cache_manager.allocate_cache(desc()).cache_id == 1
        instance.finalize()
        instance.finalize()
    assert LLMDataDist.llm_engine_instance is None


def test_one_dictionary_serves_one_role_after_the_other(options: dict[str, str]) -> None:
    for role in (PROMPT, DECODER, PROMPT):
        instance = LLMDataDist(role, 3)
        instance.init(options)
        assert listens(options["llm.listenIpInfo"]) is (role is PROMPT)
        assert json.loads(options["llm.ClusterInfo"])["logic_device_id"] == ["0:0:0:0"]
        assert options["llm.Role"] == role.name.capitalize()
        instance.finalize()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ge.exec.deviceId": "a"}, LLMException),
        ({"llm.listenIpInfo": "127.0.0.1"}, LLMException),
        ({"llm.listenIpInfo": "abc:1"}, RuntimeError),
        ({"llm.listenIpInfo": "127.0.0.1:x"}, ValueError),
        ({"ge.exec.deviceId": "0;1"}, LLMException),
        ({"ge.flowGraphMemMaxSize": 5}, TypeError),
        ({"ge.flowGraphMemMaxSize": "1.23"}, LLMException),
        ({"ge.flowGraphMemMaxSize": str(2**62)}, LLMException),
        ({"llm.SyncKvCacheWaitTime": "abc"}, LLMException),
        ({"llm.EnableSwitchRole": "2"}, LLMException),
        ({"llm.ClusterInfo": "{"}, LLMException),
        ({"llm.ClusterInfo": '{"cluster_id": 1}'}, LLMException),
        ({"llm.listenIpInfo": "192.0.2.1:26000"}, LLMException),  # an address that no host has
    ],
)
def test_a_failed_init_leaves_nothing_behind(
    options: dict[str, str], changes: dict[str, Any], error: type[Exception]
) -> None:
    instance = LLMDataDist(PROMPT, 1)
    wrong = {**options, **changes}
    with pytest.raises(error):
        instance.init(wrong)
    assert wrong == {**options, **changes}
    assert LLMDataDist.llm_engine_instance is None
    instance.init(options)
    instance.finalize()


def test_memory_that_the_host_does_not_have(options: dict[str, str]) -> None:
    options["ge.flowGraphMemMaxSize"] = str(2**62)
    assert code_of(LLMDataDist(DECODER, 1).init, options) is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY


def test_a_description_of_the_program_counts(options: dict[str, str], free_port: Callable[[], int]) -> None:
    port = free_port()
    description = {
        "cluster_id": 7,
        "logic_device_id": ["0:0:0:0"],
        "listen_ip_info": [{"ip": 16777343, "port": port}],
    }
    del options["llm.listenIpInfo"]
    options["llm.ClusterInfo"] = json.dumps(description)
    instance = LLMDataDist(PROMPT, 7)
    instance.init(options)
    assert listens(f"127.0.0.1:{port}")
    instance.finalize()


def test_an_address_that_is_taken(start: Callable[..., LLMDataDist], options: dict[str, str]) -> None:
    start(PROMPT)
    code = f"""
from llm_datadist import *
try:
    LLMDataDist(LLMRole.PROMPT, 1).init({options!r})
except LLMException as error:
    assert {options["llm.listenIpInfo"]!r} in str(error), error
    assert error.status_code in (LLMStatusCode.LLM_FAILED, LLMStatusCode.LLM_LINK_FAILED), error
else:
    raise AssertionError("both listen")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_second_instance_does_not_disturb_the_first(prompt: LLMDataDist, options: dict[str, str]) -> None:
    second = LLMDataDist(DECODER, 2)
    with pytest.raises(LLMException, match="^Cannot init multiple") as caught:
        second.init(options)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    prompt.init("nonsense")  # type: ignore[arg-type]
    prompt.kv_cache_manager.allocate_cache(desc())
    prompt.finalize()
    second.init(options)
    second.finalize()


def test_a_finalized_instance_answers_with_failure(prompt: LLMDataDist) -> None:
    manager = prompt.kv_cache_manager
    cache = manager.allocate_cache(desc())
    prompt.finalize()
    assert manager.is_initialized() is False
    failed = LLMStatusCode.LLM_FAILED
    assert code_of(manager.allocate_cache, desc()) is failed
    assert code_of(manager.allocate_blocks_cache, desc()) is failed
    assert code_of(manager.remove_cache_key, CacheKey(0, 1)) is failed
    assert code_of(manager.get_cache_tensors, cache) is failed
    assert code_of(manager.deallocate_cache, cache) is failed
    with pytest.raises(RuntimeError, match="llm datadist is not initialized"):
        pool_statistics(prompt)


def test_a_finalized_decoder_pulls_nothing(start: Callable[..., LLMDataDist]) -> None:
    decoder = start(DECODER)
    manager = decoder.kv_cache_manager
    cache = manager.allocate_cache(desc())
    decoder.finalize()
    assert code_of(manager.pull_cache, CacheKey(0, 1), cache) is LLMStatusCode.LLM_FAILED
    assert code_of(manager.pull_blocks, BlocksCacheKey(0), cache, [0], [0]) is LLMStatusCode.LLM_FAILED


def test_a_cache_of_an_earlier_life_is_not_one_of_the_next(start: Callable[..., LLMDataDist]) -> None:
    old = start(DECODER)
    stale = old.kv_cache_manager.allocate_cache(desc())
    old.finalize()
    manager = start(DECODER).kv_cache_manager
    fresh = manager.allocate_cache(desc())
    assert stale.cache_id == fresh.cache_id == 1
    unknown = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert code_of(manager.get_cache_tensors, stale) is unknown
    assert code_of(manager.pull_cache, CacheKey(0, 1), stale) is unknown
    assert code_of(manager.pull_blocks, BlocksCacheKey(0), stale, [0], [0]) is unknown
    manager.deallocate_cache(stale)
    assert stale.per_device_tensor_addrs == []
    del stale
    gc.collect()
    manager.get_cache_tensors(fresh)


def test_a_handle_dies_quietly_after_finalize(prompt: LLMDataDist, capfd: pytest.CaptureFixture[str]) -> None:
    cache = prompt.kv_cache_manager.allocate_cache(desc())
    prompt.finalize()
    del cache
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_process_may_end_without_finalize(options: dict[str, str]) -> None:
    code = f"""
from llm_datadist import *
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init({options!r})
cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(1, [1], DataType.DT_INT8), [CacheKey(1, 1)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not listens(options["llm.listenIpInfo"])


def test_a_forked_child_leaves_the_instance_alone(options: dict[str, str]) -> None:
    # In a process of its own, as the child runs its exit handlers.
    code = f"""
import os, sys
from llm_datadist import *
datadist = LLMDataDist(LLMRole.PROMPT, 1)
datadist.init({options!r})
manager = datadist.kv_cache_manager
cache = manager.allocate_cache(CacheDesc(1, [8], DataType.DT_INT8), [CacheKey(1, 1)])
child = os.fork()
if child == 0:
    try:
        datadist.kv_cache_manager
    except RuntimeError:
        del cache
        datadist.finalize()
        sys.exit(0)
    sys.exit(1)
_, status = os.waitpid(child, 0)
assert status == 0, status
manager.get_cache_tensors(cache)[0].numpy()[:] = 5
assert manager.allocate_cache(CacheDesc(1, [1], DataType.DT_INT8)).cache_id == 2
try:
    manager.allocate_cache(CacheDesc(1, [1], DataType.DT_INT8), [CacheKey(1, 1)])
except LLMException:
    pass
else:
    raise AssertionError("the key is gone")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- allocation


def test_tensors_of_a_cache(manager: KvCacheManager) -> None:
    description = desc(2, [4, 256])
    first = manager.allocate_cache(description)
    second = manager.allocate_cache(description)
    assert (first.cache_id, second.cache_id) == (1, 2)
    assert first.cache_desc is description
    addresses = [*first.per_device_tensor_addrs[0], *second.per_device_tensor_addrs[0]]
    assert len(first.per_device_tensor_addrs) == len(second.per_device_tensor_addrs) == 1
    assert [address % 512 for address in addresses] == [0] * 4
    addresses.sort()
    assert all(after - before >= description.size for before, after in zip(addresses, addresses[1:]))


def test_dimensions(manager: KvCacheManager) -> None:
    assert manager.allocate_cache(desc(1, [1] * 31)).cache_id == 1
    for shape in ([1] * 32, [0, 4], [4, -1]):
        assert code_of(manager.allocate_cache, desc(1, shape)) is LLMStatusCode.LLM_PARAM_INVALID


def test_memory_that_is_not_there(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    held = manager.allocate_cache(desc(1, [POOL_BYTES // 4]))
    key = CacheKey(0, 1)
    with pytest.raises(
        LLMException, match=f"wanted {POOL_BYTES} bytes, free {POOL_BYTES // 2} bytes, largest"
    ) as caught:
        manager.allocate_cache(desc(1, [POOL_BYTES // 2]), [key])
    assert caught.value.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    assert pool_statistics(prompt).used == held.cache_desc.size
    assert manager.allocate_cache(desc(1, [8]), [key]).cache_id > held.cache_id


def test_the_share_of_memory_is_kept_to(start: Callable[..., LLMDataDist]) -> None:
    instance = start(DECODER, llm__MemoryUtilization="0.5")
    assert pool_statistics(instance).capacity == POOL_BYTES // 2
    manager = instance.kv_cache_manager
    assert code_of(manager.allocate_cache, desc(1, [POOL_BYTES // 4 + 1])) is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    assert manager.allocate_cache(desc(1, [POOL_BYTES // 4])).cache_id > 0


def test_the_whole_memory_a_thousand_times(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    whole = desc(1, [POOL_BYTES // 2])
    for _ in range(1000):
        manager.deallocate_cache(manager.allocate_cache(whole))
    assert pool_statistics(prompt).used == 0


def test_a_dropped_handle_frees_its_memory(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    for _ in range(100):
        cache = manager.allocate_cache(desc(1, [POOL_BYTES // 4]))
        assert isinstance(cache, KvCache)
        del cache
    assert pool_statistics(prompt).used == 0


def test_a_bound_key(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    first = manager.allocate_cache(desc(), [CacheKey(0, 5)])
    used = pool_statistics(prompt).used
    assert code_of(manager.allocate_cache, desc(), [CacheKey(0, 6), CacheKey(9, 5)]) is LLMStatusCode.LLM_PARAM_INVALID
    assert pool_statistics(prompt).used == used
    caches = [
        manager.allocate_cache(desc(), [CacheKey(0, 6)]),
        manager.allocate_cache(desc(), [CacheKey(0, 5, 1)]),
        manager.allocate_cache(desc(), [CacheKey(0, INVALID_ID, 0, 5)]),
    ]
    assert code_of(manager.allocate_cache, desc(), [CacheKey(0, 7, 0, 5)]) is LLMStatusCode.LLM_PARAM_INVALID
    assert len({cache.cache_id for cache in [first, *caches]}) == 4
    manager.get_cache_tensors(first)


def test_placeholders_are_never_bound(manager: KvCacheManager) -> None:
    blocks = manager.allocate_blocks_cache(desc(), BlocksCacheKey(0))
    nobody = CacheKey(0, INVALID_ID)
    caches = [manager.allocate_cache(desc(), [nobody, nobody, nobody, CacheKey(0, number)]) for number in range(3)]
    assert [cache.cache_id for cache in [blocks, *caches]] == [1, 2, 3, 4]


def test_the_same_key_twice_in_a_call(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(), [CacheKey(0, 5), CacheKey(0, 5)])
    assert pool_statistics(prompt).keys == 1
    manager.remove_cache_key(CacheKey(0, 5))
    assert pool_statistics(prompt).keys == 0
    manager.get_cache_tensors(cache)


def test_more_keys_than_slots(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    keys = [CacheKey(0, number) for number in range(5)]
    assert code_of(manager.allocate_cache, desc(1, [4, 8]), keys) is LLMStatusCode.LLM_PARAM_INVALID
    assert (pool_statistics(prompt).used, pool_statistics(prompt).keys) == (0, 0)


@pytest.mark.parametrize("role", LLMRole)
def test_blocks_caches_by_role(start: Callable[..., LLMDataDist], role: LLMRole) -> None:
    manager = start(role).kv_cache_manager
    plain = manager.allocate_blocks_cache(desc(2, [10, 128]))
    assert plain.cache_id == 1
    if role is DECODER:
        with pytest.raises(LLMException, match="blocks_cache_key is not supported by DECODER"):
            manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(0))
    else:
        assert manager.allocate_blocks_cache(desc(2, [10, 128]), BlocksCacheKey(0)).cache_id == 2


def test_a_model_has_one_blocks_cache(manager: KvCacheManager) -> None:
    first = manager.allocate_blocks_cache(desc(), BlocksCacheKey(0, 3))
    assert code_of(manager.allocate_blocks_cache, desc(), BlocksCacheKey(1, 3)) is LLMStatusCode.LLM_PARAM_INVALID
    other = manager.allocate_blocks_cache(desc(), BlocksCacheKey(0, 4))
    manager.deallocate_cache(first)
    again = manager.allocate_blocks_cache(desc(), BlocksCacheKey(0, 3))
    assert again.cache_id > other.cache_id


# ---- deallocation, removal


def test_a_deallocated_cache_is_unknown(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc())
    manager.deallocate_cache(cache)
    assert cache.per_device_tensor_addrs == []
    assert code_of(manager.get_cache_tensors, cache) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    manager.deallocate_cache(cache)
    assert pool_statistics(prompt).used == 0


def test_nothing_is_pulled_into_a_deallocated_cache(start: Callable[..., LLMDataDist]) -> None:
    manager = start(DECODER).kv_cache_manager
    cache = manager.allocate_cache(desc())
    manager.deallocate_cache(cache)
    unknown = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert code_of(manager.pull_cache, CacheKey(0, 1), cache) is unknown
    assert code_of(manager.pull_cache, CacheKeyByIdAndIndex(0, 1), cache, 99) is unknown
    assert code_of(manager.pull_blocks, BlocksCacheKey(0), cache, [0], [99]) is unknown


def test_a_key_holds_memory_until_it_is_removed(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    ordinary, prefix = CacheKey(0, 5), CacheKey(0, INVALID_ID, 0, 6)
    cache = manager.allocate_cache(desc(), [ordinary, prefix])
    manager.deallocate_cache(cache)
    manager.remove_cache_key(ordinary)
    manager.remove_cache_key(ordinary)
    manager.remove_cache_key(CacheKey(0, 77))
    assert pool_statistics(prompt).caches == 1
    assert code_of(manager.get_cache_tensors, cache) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    manager.remove_cache_key(prefix)
    assert (pool_statistics(prompt).used, pool_statistics(prompt).caches) == (0, 0)


def test_a_pull_without_a_link_looks_at_the_local_side_first(start: Callable[..., LLMDataDist]) -> None:
    manager = start(DECODER).kv_cache_manager
    cache = manager.allocate_cache(desc(4, [4, 256]))
    key, blocks = CacheKey(1, 1), BlocksCacheKey(1)
    invalid, unlinked = LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_NOT_YET_LINK
    assert code_of(manager.pull_cache, key, cache) is unlinked
    assert code_of(manager.pull_cache, CacheKeyByIdAndIndex(1, -1), cache) is unlinked
    assert code_of(manager.pull_cache, key, cache, 4) is invalid
    assert code_of(manager.pull_cache, key, cache, size=513) is invalid
    assert code_of(manager.pull_cache, key, cache, size=512) is unlinked
    assert code_of(manager.pull_cache, key, cache, dst_cache_offset=512) is invalid
    assert code_of(manager.pull_cache, key, cache, dst_cache_offset=500, size=13) is invalid
    assert code_of(manager.pull_cache, key, cache, dst_cache_offset=500, size=12) is unlinked
    assert code_of(manager.pull_cache, key, cache, dst_layer_range=range(1, 3)) is invalid
    assert code_of(manager.pull_cache, key, cache, dst_layer_range=range(1, 2)) is unlinked
    assert code_of(manager.pull_cache, key, cache, dst_cache_offset=2**63 - 1, size=2**63 - 1) is invalid
    assert code_of(manager.pull_cache, key, cache, src_cache_offset=2**63 - 1, size=64) is unlinked
    assert code_of(manager.pull_blocks, blocks, cache, [0], [4]) is invalid
    assert code_of(manager.pull_blocks, blocks, cache, [4], [0]) is unlinked
    for wrong in ([-1], [2**64]):
        with pytest.raises(ValueError, match="out of range"):
            manager.pull_blocks(blocks, cache, wrong, [0])
    for other in (["0"], [None], [1.0]):
        with pytest.raises(TypeError, match="inner type only support"):
            manager.pull_blocks(blocks, cache, [0], other)  # type: ignore[arg-type]


# ---- reading


@pytest.mark.parametrize("data_type", [member for member in DataType if member is not DataType.DT_STRING])
def test_tensors_show_the_memory_of_their_cache(manager: KvCacheManager, data_type: DataType) -> None:
    cache = manager.allocate_cache(desc(2, [3, 4], data_type))
    raw = np.arange(cache.cache_desc.size, dtype=np.uint8) % 2
    for index in range(2):
        ctypes.memmove(cache.per_device_tensor_addrs[0][index], raw.ctypes.data, raw.nbytes)
        tensors = manager.get_cache_tensors(cache, index)
        assert len(tensors) == 1
        array = tensors[0].numpy()
        assert array.shape == (3, 4)
        if data_type is DataType.DT_BF16:
            wanted: Any = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(3, 4)
        else:
            wanted = raw.view(array.dtype).reshape(3, 4)
            assert array.ctypes.data == cache.per_device_tensor_addrs[0][index]
        assert np.array_equal(array, wanted, equal_nan=data_type is not DataType.DT_BOOL)


def test_a_view_stays_with_the_cache(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(2, [4, 8]))
    array = manager.get_cache_tensors(cache, 1)[0].numpy()
    array[:] = 7
    assert ctypes.string_at(cache.per_device_tensor_addrs[0][1], 2) == np.float16(7).tobytes()
    ctypes.memset(cache.per_device_tensor_addrs[0][1], 0, cache.cache_desc.size)
    assert not array.any()
    assert not manager.get_cache_tensors(cache, 1)[0].numpy(copy=True).any()


def test_tensors_of_text(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(1, [2, 3], DataType.DT_STRING))
    tensor = manager.get_cache_tensors(cache)[0]
    with pytest.raises(RuntimeError, match="copy=True"):
        tensor.numpy()
    assert tensor.numpy(copy=True).shape == (2, 3)


def test_a_tensor_keeps_its_cache(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc())
    tensor = manager.get_cache_tensors(cache)[0]
    del cache
    gc.collect()
    assert pool_statistics(prompt).caches == 1
    del tensor
    gc.collect()
    assert pool_statistics(prompt).caches == 0


def test_a_host_cache_has_no_tensors_here(manager: KvCacheManager) -> None:
    host = KvCache.create_cpu_cache(CacheDesc(1, [4], DataType.DT_INT8, Placement.HOST), [512])
    assert code_of(manager.get_cache_tensors, host) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_a_view_outlives_finalize_without_harm(prompt: LLMDataDist, manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(1, [4, 8]))
    array = manager.get_cache_tensors(cache)[0].numpy()
    array[:] = 3
    prompt.finalize()
    assert array.sum() == 96
    del array, cache
    gc.collect()


# ---- links without a peer


def test_links_of_those_who_have_none(start: Callable[..., LLMDataDist]) -> None:
    for role in (PROMPT, MIX):
        instance = start(role)
        assert instance.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
        assert code_of(instance.check_link_status, 1) is LLMStatusCode.LLM_PARAM_INVALID
        instance.finalize()
    decoder = start(DECODER)
    assert decoder.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert decoder.unlink_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert code_of(decoder.check_link_status, 1) is LLMStatusCode.LLM_NOT_YET_LINK


# ---- many threads


def test_init_is_safe_when_two_threads_try(options: dict[str, str]) -> None:
    code = f"""
import threading
from llm_datadist import *
options = {options!r}
instances = [LLMDataDist(LLMRole.DECODER, number) for number in range(4)]
codes = []
def init(instance):
    try:
        instance.init(dict(options))
        codes.append(None)
    except LLMException as error:
        codes.append(error.status_code)
threads = [threading.Thread(target=init, args=(instance,)) for instance in instances]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sorted(codes, key=str) == [LLMStatusCode.LLM_FAILED] * 3 + [None], codes
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
