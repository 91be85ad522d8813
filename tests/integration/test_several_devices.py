"""One process with two devices on each side: every call works on both, and fails as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.introspection import describe_links, pool_statistics
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.pair import DECODER, PROMPT
from tests.processes import Member

Members = Callable[[str], Member]
OK = LLMStatusCode.LLM_SUCCESS
POOL = 1 << 20
SHAPE = (4, 256)


def init(state: dd.State, role: LLMRole, cluster_id: int, ports: list[int]) -> None:
    config = LLMConfig()
    config.device_id = [0, 1]
    config.mem_utilization = 1.0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(POOL)}
    config.enable_switch_role = True
    if role is LLMRole.PROMPT:
        config.listen_ip_info = ";".join(f"127.0.0.1:{port}" for port in ports)
    state["datadist"] = LLMDataDist(role, cluster_id)
    state["datadist"].init(config.generate_options())
    state["caches"] = {}


def info(cluster_id: int, ports: list[int]) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    for port in ports:
        cluster.append_local_ip_info("127.0.0.1", 0)
        cluster.append_remote_ip_info("127.0.0.1", port)
    return cluster


def link(state: dd.State, cluster_id: int, ports: list[int]) -> Any:
    return state["datadist"].link_clusters([info(cluster_id, ports)])


def unlink(state: dd.State, cluster_id: int, ports: list[int], force: bool = False) -> Any:
    return state["datadist"].unlink_clusters([info(cluster_id, ports)], force=force)


def links(state: dd.State) -> list[tuple[int, str]]:
    return [(link.cluster_id, link.state) for link in describe_links(state["datadist"])]


def fill(state: dd.State, cache_id: int, seed: int) -> None:
    cache = state["caches"][cache_id]
    for device in range(2):
        for tensor in range(2):
            tensor_view(cache, tensor, device)[:] = dd.payload(seed + device, tensor, 1024).reshape(SHAPE)


def read(state: dd.State, cache_id: int) -> list[list[bytes]]:
    cache = state["caches"][cache_id]
    return [[tensor_view(cache, tensor, device).tobytes() for tensor in range(2)] for device in range(2)]


def addresses(state: dd.State, cache_id: int) -> list[list[int]]:
    return list(state["caches"][cache_id].per_device_tensor_addrs)


def tensors(state: dd.State, cache_id: int) -> list[Any]:
    return [tensor.numpy(copy=True) for tensor in dd.manager(state).get_cache_tensors(state["caches"][cache_id], 1)]


def used(state: dd.State) -> int:
    return pool_statistics(state["datadist"]).used


def allocate_too_much(state: dd.State) -> None:
    """Take what only the first device has left."""
    engine = state["datadist"]._engine._engines[1]
    engine.allocate(1, POOL // 2, 1, cache_id=1000)
    dd.manager(state).allocate_cache(CacheDesc(1, (POOL,), DataType.DT_UINT8), [CacheKey(PROMPT, 77)])


def swap_out_and_in(state: dd.State, cache_id: int) -> None:
    from llm_datadist import KvCache, Placement

    cache, manager = state["caches"][cache_id], dd.manager(state)
    arrays = [[np.zeros(SHAPE, np.uint8) for _ in range(2)] for _ in range(2)]
    description = CacheDesc(2, SHAPE, DataType.DT_UINT8, Placement.HOST)
    host = KvCache.create_cpu_cache(description, [[array.ctypes.data for array in device] for device in arrays])
    before = read(state, cache_id)
    manager.swap_blocks(cache, host, {1: 2, 3: 0})
    for device in range(2):
        for tensor in range(2):
            was = np.frombuffer(before[device][tensor], np.uint8).reshape(SHAPE)
            np.testing.assert_array_equal(arrays[device][tensor][2], was[1])
            np.testing.assert_array_equal(arrays[device][tensor][0], was[3])
    manager.swap_blocks(host, cache, {2: 0})
    assert [row[tensor][:256] for row in read(state, cache_id) for tensor in range(2)] == [
        row[tensor][256:512] for row in before for tensor in range(2)
    ]
    manager.copy_blocks(cache, {2: [1]})
    manager.copy_cache(cache, cache, 3, 2)
    for row in read(state, cache_id):
        for data in row:
            assert data[256:512] == data[512:768] == data[768:]


Setting = tuple[Member, Member, list[int]]


@pytest.fixture
def both(members: Members, free_port: Callable[[], int]) -> Setting:
    """A prompt and a decoder with two devices each, not linked."""
    ports = [free_port(), free_port()]
    prompt, decoder = members("prompt"), members("decoder")
    prompt.call(init, LLMRole.PROMPT, PROMPT, ports)
    decoder.call(init, LLMRole.DECODER, DECODER, ports)
    return prompt, decoder, ports


def test_pulls_join_device_to_device(both: Setting) -> None:
    prompt, decoder, ports = both
    assert decoder.call(link, PROMPT, ports) == (OK, [OK])
    assert decoder.call(links) == [(PROMPT, "LINKED")] * 2
    assert decoder.call(link, PROMPT, ports) == (OK, [LLMStatusCode.LLM_ALREADY_LINK])
    decoder.call(dd.check_link, PROMPT)
    cache = prompt.call(dd.allocate, 2, SHAPE, keys=[CacheKey(PROMPT, 1)])
    assert [len(device) for device in prompt.call(addresses, cache)] == [2, 2]
    prompt.call(fill, cache, 40)
    mine = decoder.call(dd.allocate, 2, SHAPE)
    decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine, 2)
    for device, row in enumerate(decoder.call(read, mine)):
        for tensor, data in enumerate(row):
            assert data[512:768] == dd.payload(40 + device, tensor, 1024).tobytes()[:256]
    with pytest.raises(LLMException) as caught:
        decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    prompt.call(dd.deallocate, cache)
    assert prompt.call(used) == 0
    for device, tensor in enumerate(decoder.call(tensors, mine)):
        assert tensor[2].tobytes() == dd.payload(40 + device, 1, 1024).tobytes()[:256]
    assert decoder.call(unlink, PROMPT, ports) == (OK, [OK])
    assert prompt.call(links) == decoder.call(links) == []


def test_blocks(both: Setting) -> None:
    prompt, decoder, ports = both
    decoder.call(link, PROMPT, ports)
    key = BlocksCacheKey(PROMPT)
    cache = prompt.call(dd.allocate_blocks, 2, SHAPE, key=key)
    prompt.call(fill, cache, 50)
    mine = decoder.call(dd.allocate_blocks, 2, SHAPE)
    decoder.call(dd.pull_blocks, key, mine, [3, 0], [1, 2])
    for device, row in enumerate(decoder.call(read, mine)):
        for tensor, data in enumerate(row):
            source = dd.payload(50 + device, tensor, 1024).tobytes()
            assert data[256:768] == source[768:] + source[:256]


def test_copies_and_swaps(both: Setting) -> None:
    _, decoder, _ = both
    cache = decoder.call(dd.allocate, 2, SHAPE)
    decoder.call(fill, cache, 60)
    decoder.call(swap_out_and_in, cache)


def test_a_cluster_is_linked_on_all_devices_or_on_none(both: Setting, free_port: Callable[[], int]) -> None:
    prompt, decoder, ports = both
    overall, each = decoder.call(link, PROMPT, [ports[0], free_port()])
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    assert decoder.call(links) == prompt.call(links) == []
    assert decoder.call(link, PROMPT, ports) == (OK, [OK])


def test_addresses_must_be_as_many_as_devices(both: Setting) -> None:
    _, decoder, ports = both
    assert decoder.call(link, PROMPT, ports[:1]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert decoder.call(link, PROMPT, [*ports, 1]) == (LLMStatusCode.LLM_PARAM_INVALID, [])


def test_an_allocation_that_fails_on_one_device_leaves_nothing_on_the_other(both: Setting) -> None:
    prompt, _, _ = both
    with pytest.raises(LLMException) as caught:
        prompt.call(allocate_too_much)
    assert caught.value.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    assert prompt.call(used) == POOL // 2
    cache = prompt.call(dd.allocate, 2, SHAPE, keys=[CacheKey(PROMPT, 77)])  # the key is free
    assert [len(device) for device in prompt.call(addresses, cache)] == [2, 2]


def switch(state: dd.State) -> None:
    state["datadist"].switch_role(LLMRole.MIX)


def test_what_needs_a_process_with_one_device(both: Setting) -> None:
    _, decoder, _ = both
    with pytest.raises(LLMException) as caught:
        decoder.call(switch)
    assert caught.value.status_code is LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def test_a_dead_prompt_is_seen_on_all_devices(both: Setting) -> None:
    prompt, decoder, ports = both
    decoder.call(link, PROMPT, ports)
    mine = decoder.call(dd.allocate, 2, SHAPE)
    prompt.kill()
    with pytest.raises(LLMException) as caught:
        decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert caught.value.status_code in (
        LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
        LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    )
    assert decoder.call(unlink, PROMPT, ports, True) == (OK, [OK])
