"""Cache-manager mode between two hosts: both pull from each other and push to each other, whoever opened the link."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.introspection import describe_links
from llm_datadist.transports import private_memory
from tests.conformance.backends import Backend
from tests.conformance.expectations import LINKED, OK
from tests.conformance.registering import RegisteringRemote, State, There
from tests.conformance.remote import SLOTS, payload_slot
from tests.hosts.instances import MIB, PORT, TCP, TIMEOUT_MS, answers_in_time, cluster_at
from tests.hosts.network import Host, Network, wait_until

ONE, OTHER = 1, 2  # cluster ids
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
LISTEN = {"llm.listenIpInfo": f"0.0.0.0:{PORT}"}
ALL = range(SLOTS)

# Tensors in the pool, and memory that the program has from elsewhere.
MEMORIES = {
    "pool": Backend("host", "tcp", TCP, options=LISTEN),
    "own": Backend("host", "tcp-private", TCP, private_memory.DATA_SERVER, options=LISTEN),
}


class Side(NamedTuple):
    """An instance and the host it is on."""

    instance: RegisteringRemote
    host: Host

    def push_in_layers(self, mine: There, config: Any, *blocks: Any) -> LLMStatusCode:
        code = self.instance.call(push_in_layers, mine.cache_id, config, *blocks)
        assert isinstance(code, LLMStatusCode)
        return code

    def link(self, other: Side, timeout_ms: int = 20_000) -> Any:
        return self.instance.call(link, other.instance.cluster_id, other.host.ipv4, timeout_ms)


def link(state: State, cluster_id: int, address: str, timeout_ms: int) -> Any:
    return state["datadist"].link_clusters([cluster_at(cluster_id, address)], timeout_ms)


def links(state: State) -> list[tuple[int, str, str]]:
    return [(one.cluster_id, one.state, one.transport) for one in describe_links(state["datadist"])]


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def push_in_layers(state: State, cache_id: int, config: Any, *blocks: Any) -> LLMStatusCode:
    cache = state["registered"][cache_id].cache
    task = state["datadist"].cache_manager.transfer_cache_async(cache, Ready(), [config], *blocks)
    return task.synchronize(20_000)


def addresses_of(state: State, cache_id: int) -> list[int]:
    return list(state["registered"][cache_id].cache.tensor_addrs)


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> Backend:
    return MEMORIES[request.param]


def start(network: Network, memory: Backend, **options: Any) -> tuple[Side, Side]:
    """Start an instance on each of two hosts and link them."""
    sides = []
    for cluster_id, role in ((ONE, LLMRole.MIX), (OTHER, LLMRole.DECODER)):
        host = network.add_host(f"host{cluster_id}")
        member = host.start(f"instance {cluster_id}")
        sides.append(Side(RegisteringRemote(member, memory, role, cluster_id, PORT, **options), host))
    one, other = sides
    assert one.link(other) == LINKED
    return one, other


@pytest.fixture
def sides(network: Network, memory: Backend) -> tuple[Side, Side]:
    return start(network, memory, remote_access=True)


@pytest.fixture(params=["opener", "other"])
def directed(request: pytest.FixtureRequest, sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """Who acts, and on whom: once the one that has opened the link, once the other."""
    return sides if request.param == "opener" else (sides[1], sides[0])


def assert_slots(side: Side, there: There, wanted: dict[int, bytes], tensor: int) -> None:
    """Expect these slots of a tensor, and sentinels in the others."""
    assert {index: side.instance.slot(there, tensor, index) for index in wanted} == wanted
    rest = [index for index in ALL if index not in wanted]
    assert not rest or side.instance.untouched(there, tensor, *rest)


def by_id(side: Side, there: There, slot: int = 0) -> CacheKeyByIdAndIndex:
    return CacheKeyByIdAndIndex(side.instance.cluster_id, there.cache_id, slot)


def test_the_transport_is_tcp_on_both_sides(sides: tuple[Side, Side]) -> None:
    one, other = sides
    assert one.instance.call(links) == [(OTHER, "LINKED", TCP)]
    assert other.instance.call(links) == [(ONE, "LINKED", TCP)]


def test_pull_cache(directed: tuple[Side, Side]) -> None:
    one, other = directed
    theirs, mine = other.instance.register(seed=1), one.instance.register()
    assert one.instance.outcome("pull_cache", by_id(other, theirs, 3), mine, 1) is OK
    for tensor in range(4):
        assert_slots(one, mine, {1: payload_slot(1, tensor, 3)}, tensor)


def test_pull_blocks(directed: tuple[Side, Side]) -> None:
    one, other = directed
    key = BlocksCacheKey(other.instance.cluster_id, 3)
    other.instance.register(seed=1, blocks_key=key)
    mine = one.instance.register(blocks=True)
    assert one.instance.outcome("pull_blocks", key, mine, [3, 0], [1, 2]) is OK
    for tensor in range(4):
        assert_slots(one, mine, {1: payload_slot(1, tensor, 3), 2: payload_slot(1, tensor, 0)}, tensor)


def test_push_cache(directed: tuple[Side, Side]) -> None:
    one, other = directed
    theirs, mine = other.instance.register(), one.instance.register(seed=1)
    assert one.instance.outcome("push_cache", by_id(other, theirs, 3), mine, 1) is OK
    for tensor in range(4):
        assert_slots(other, theirs, {3: payload_slot(1, tensor, 1)}, tensor)


def test_push_blocks(directed: tuple[Side, Side]) -> None:
    one, other = directed
    key = BlocksCacheKey(other.instance.cluster_id, 3)
    theirs, mine = other.instance.register(blocks_key=key), one.instance.register(seed=1, blocks=True)
    assert one.instance.outcome("push_blocks", key, mine, [3, 0], [1, 2]) is OK
    for tensor in range(4):
        assert_slots(other, theirs, {1: payload_slot(1, tensor, 3), 2: payload_slot(1, tensor, 0)}, tensor)


def test_layers_to_a_key(directed: tuple[Side, Side]) -> None:
    one, other = directed
    theirs, mine = other.instance.register(12), one.instance.register(8, seed=1)
    config = TransferWithCacheKeyConfig(by_id(other, theirs, 3), range(2), range(4, 6), src_batch_index=1)
    assert one.push_in_layers(mine, config) is OK
    for tensor in range(12):
        assert_slots(other, theirs, {3: payload_slot(1, tensor - 8, 1)} if tensor >= 8 else {}, tensor)


def test_layers_of_blocks_to_a_key(directed: tuple[Side, Side]) -> None:
    one, other = directed
    key = BlocksCacheKey(other.instance.cluster_id, 3)
    theirs, mine = other.instance.register(4, blocks_key=key), one.instance.register(4, seed=1, blocks=True)
    assert one.push_in_layers(mine, TransferWithCacheKeyConfig(key, range(2), range(2)), [0, 3], [2, 1]) is OK
    for tensor in range(4):
        assert_slots(other, theirs, {2: payload_slot(1, tensor, 0), 1: payload_slot(1, tensor, 3)}, tensor)


def test_layers_to_addresses(network: Network, memory: Backend) -> None:
    """Without remote access by key, as the interface has it."""
    one, other = start(network, memory)
    for actor, target in ((one, other), (other, one)):
        theirs, mine = target.instance.register(), actor.instance.register(seed=1)
        at = [address + 2 * 256 for address in target.instance.call(addresses_of, theirs.cache_id)]
        config = TransferConfig(target.instance.cluster_id, at, src_batch_index=1)
        assert actor.push_in_layers(mine, config) is OK
        for tensor in range(4):
            assert_slots(target, theirs, {2: payload_slot(1, tensor, 1)}, tensor)
        beyond = TransferConfig(target.instance.cluster_id, [address + 2 * 256 for address in at])
        assert actor.push_in_layers(mine, beyond) is LLMStatusCode.LLM_PARAM_INVALID
        for tensor in range(4):
            assert_slots(target, theirs, {2: payload_slot(1, tensor, 1)}, tensor)


def pull_and_push(state: State, pulled: int, pushed: int, theirs: Sequence[Any], times: int) -> list[LLMStatusCode]:
    """Pull one cache and push another one, many times; gives the codes of what failed."""
    manager, registered = state["datadist"].cache_manager, state["registered"]
    failed = []
    for _ in range(times):
        for call, key, cache_id in (("pull_cache", theirs[0], pulled), ("push_cache", theirs[1], pushed)):
            try:
                getattr(manager, call)(key, registered[cache_id].cache)
            except Exception as error:
                failed.append(getattr(error, "status_code", error))
    return failed


def test_both_directions_at_the_same_time(network: Network, memory: Backend) -> None:
    sides = start(network, memory, remote_access=True, device_pool=8 * MIB)
    shape = (1, MIB)
    calls, checks = [], []
    held = {side: [side.instance.register(2, shape, seed=seed) for seed in (1, 2)] for side in sides}
    empty = {side: [side.instance.register(2, shape) for _ in range(2)] for side in sides}
    for side, peer in (sides, sides[::-1]):
        theirs = [by_id(peer, held[peer][0]), by_id(peer, empty[peer][1])]
        ids = empty[side][0].cache_id, held[side][1].cache_id
        calls.append(side.instance.member.start(pull_and_push, *ids, theirs, 20))
        checks += [(side, empty[side][0], 1), (side, empty[side][1], 2)]
    assert [call.result(60) for call in calls] == [[], []]
    for side, cache, seed in checks:
        for tensor in range(2):
            assert side.instance.slot(cache, tensor, 0) == payload_slot(seed, tensor, 0, shape)


def test_both_link_at_the_same_moment(network: Network) -> None:
    one, other = start(network, MEMORIES["own"], remote_access=True)
    for _ in range(5):
        assert one.instance.call(unlink, OTHER, other.host.ipv4) == LINKED
        wait_until(lambda: other.instance.call(links) == [], "other side without links")
        calls = [
            side.instance.member.start(link, peer.instance.cluster_id, peer.host.ipv4, 20_000)
            for side, peer in ((one, other), (other, one))
        ]
        for call in calls:
            assert call.result() in (LINKED, (LLMStatusCode.LLM_ALREADY_LINK, [LLMStatusCode.LLM_ALREADY_LINK]))
        assert one.instance.call(links) == [(OTHER, "LINKED", TCP)]
        assert other.instance.call(links) == [(ONE, "LINKED", TCP)]
    theirs, mine = other.instance.register(seed=1), one.instance.register()
    assert one.instance.outcome("pull_cache", by_id(other, theirs), mine) is OK


def unlink(state: State, cluster_id: int, address: str) -> Any:
    return state["datadist"].unlink_clusters([cluster_at(cluster_id, address)], 20_000)


@pytest.mark.parametrize("call", ["pull_cache", "push_cache"])
def test_a_cut_and_its_end(network: Network, memory: Backend, call: str) -> None:
    one, other = start(network, memory, remote_access=True, sync_kv_timeout=TIMEOUT_MS)
    theirs, mine = other.instance.register(seed=1), one.instance.register(seed=2)
    network.part(one.host, other.host)
    answer = answers_in_time(TIMEOUT_MS, one.instance.outcome, call, by_id(other, theirs), mine)
    assert answer is TIMEOUT
    network.heal()

    def works() -> bool:
        if one.instance.outcome(call, by_id(other, theirs), mine) is OK:
            return True
        one.link(other, TIMEOUT_MS)
        return False

    wait_until(works, "link that works", 60)
    seed = 1 if call == "pull_cache" else 2
    for side, cache in ((one, mine), (other, theirs)):
        assert side.instance.slot(cache, 3, 0) == payload_slot(seed, 3, 0)


def test_a_host_that_vanished_is_replaced(network: Network, memory: Backend) -> None:
    one, other = start(network, memory, remote_access=True, sync_kv_timeout=TIMEOUT_MS)
    mine = one.instance.register()
    other.host.vanish()
    key = CacheKeyByIdAndIndex(OTHER, 1, 0)
    assert answers_in_time(TIMEOUT_MS, one.instance.outcome, "pull_cache", key, mine) is TIMEOUT
    other.host.come_back()
    member = other.host.start("instance again")
    instance = RegisteringRemote(member, memory, LLMRole.MIX, OTHER, PORT, remote_access=True)
    again = Side(instance, other.host)
    good = (LINKED, (LLMStatusCode.LLM_ALREADY_LINK, [LLMStatusCode.LLM_ALREADY_LINK]))
    wait_until(lambda: again.link(one, TIMEOUT_MS) in good, "link of the successor", 60)
    theirs = instance.register(seed=5)
    assert one.instance.outcome("pull_cache", by_id(again, theirs), mine) is OK
    assert one.instance.slot(mine, 2, 0) == payload_slot(5, 2, 0)
