"""What tests let processes do as members of a cluster: functions for `Member.call`, each with its state first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.cluster import Change, ClusterMember, MemberInfo, SwitchPhase
from llm_datadist.introspection import describe_links
from llm_datadist.views import tensor_view
from tests.processes import Member

State = dict
LEASE_S = 1.0
PREFIX = 7
LONG_PREFIX = 8
NBYTES = 1 << 16


def join(
    state: State,
    role: LLMRole,
    cluster_id: int,
    port: int,
    registry: str,
    *,
    follow: bool = True,
    link: bool = True,
    lease_s: float = LEASE_S,
    state_name: str = "ready",
    options: dict[str, str] | None = None,
    roles: Any = None,
) -> None:
    """Make an instance that may switch its role, announce it and follow the cluster."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_switch_role = True
    config.sync_kv_timeout = 5000
    config.mem_utilization = 1.0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(256 << 20)}
    listen = f"127.0.0.1:{port}"
    if role is LLMRole.PROMPT or options:
        config.listen_ip_info = listen
    datadist = LLMDataDist(role, cluster_id)
    datadist.init({**config.generate_options(), **(options or {})})
    state["datadist"] = datadist
    state["changes"] = []
    member = ClusterMember(datadist, registry, cluster_id, listen, {"name": f"m{cluster_id}"}, lease_s=lease_s)
    state["member"] = member
    member.announce(state_name)
    if follow:
        member.follow(lambda change: note(state, change), link=link, roles=roles)


def note(state: State, change: Change) -> None:
    state["changes"].append((change.kind.name, change.member.cluster_id, change.member.role.name, change.member.state))


def changes(state: State) -> list[tuple[str, int, str, str]]:
    return list(state["changes"])


def leave(state: State) -> None:
    state["member"].close()
    state["member"].close()
    state["datadist"].finalize()


def announce(state: State, name: str) -> None:
    state["member"].announce(name)


def wait_for(state: State, role: LLMRole | None, count: int, timeout_s: float = 10.0) -> list[int]:
    return [peer.cluster_id for peer in state["member"].wait_for(role=role, count=count, timeout_s=timeout_s)]


def link(state: State, role: LLMRole, count: int) -> None:
    state["member"].link(state["member"].wait_for(role=role, count=count, timeout_s=10))


def links(state: State) -> list[tuple[int, str]]:
    return sorted((link.cluster_id, link.state) for link in describe_links(state["datadist"]))


def linked(state: State) -> list[int]:
    return state["member"].linked()


def wait_for_links(member: Member, *cluster_ids: int, seconds: float = 10.0) -> None:
    """Wait until a member has links, all whole, to these clusters and no others."""
    deadline = time.monotonic() + seconds
    wanted = [(cluster_id, "LINKED") for cluster_id in cluster_ids]
    while (found := member.call(links)) != wanted:
        assert time.monotonic() < deadline, f"{member.name} has {found}, expected {wanted}"
        time.sleep(0.01)


def role_of(state: State) -> str:
    return state["member"].role.name


def members(state: State) -> list[MemberInfo]:
    return state["member"].members()


# ---- caches


def prefix_key(cluster_id: int, prefix: int) -> CacheKey:
    return CacheKey(cluster_id, req_id=2**64 - 1, prefix_id=prefix)


def offer_long(state: State, nbytes: int, value: int) -> None:
    offer(state, nbytes, value, LONG_PREFIX)


def offer(state: State, nbytes: int, value: int, prefix: int = PREFIX) -> None:
    """Offer a prefix, which stays however often it is pulled."""
    desc = CacheDesc(2, (1, nbytes), DataType.DT_UINT8)
    datadist = state["datadist"]
    cache = datadist.kv_cache_manager.allocate_cache(desc, [prefix_key(datadist.cluster_id, prefix)])
    for tensor in range(2):
        tensor_view(cache, tensor)[:] = value
    state.setdefault("kept", []).append(cache)


class Tally(NamedTuple):
    """What came of pulls that went on and on."""

    pulls: int
    by_cluster: dict[int, int]
    failures: list[str]
    wrong: int
    not_linked: int


def pull_on_and_on(state: State, cluster_ids: list[int], nbytes: int, threads: int = 2, prefix: int = PREFIX) -> Tally:
    """Pull from the clusters in turn until `stop_pulling`, each pull inside of `ClusterMember.transfer`.

    A cluster's bytes are its id. Being told before a pull that a cluster is not linked is counted apart.
    """
    state["stop"] = stop = threading.Event()
    datadist, member = state["datadist"], state["member"]
    tallies: list[Tally] = []
    state["pulled"] = state["not_linked"] = 0

    def pull() -> None:
        cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (1, nbytes), DataType.DT_UINT8))
        view = tensor_view(cache, 1)
        by_cluster = dict.fromkeys(cluster_ids, 0)
        failures: list[str] = []
        wrong = not_linked = turn = 0
        while not stop.is_set():
            turn += 1
            cluster_id = cluster_ids[turn % len(cluster_ids)]
            started = False
            try:
                with member.transfer(cluster_id, timeout_s=10):
                    started = True
                    datadist.kv_cache_manager.pull_cache(prefix_key(cluster_id, prefix), cache)
            except LLMException as error:
                if not started and error.status_code is LLMStatusCode.LLM_NOT_YET_LINK:
                    not_linked += 1
                    state["not_linked"] += 1
                    stop.wait(0.001)
                else:
                    failures.append(f"{cluster_id}: {error}")
                continue
            by_cluster[cluster_id] += 1
            state["pulled"] += 1
            wrong += int((view != cluster_id).any())
        datadist.kv_cache_manager.deallocate_cache(cache)
        tallies.append(Tally(sum(by_cluster.values()), by_cluster, failures, wrong, not_linked))

    workers = [threading.Thread(target=pull) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Tally(
        sum(tally.pulls for tally in tallies),
        {one: sum(tally.by_cluster[one] for tally in tallies) for one in cluster_ids},
        [failure for tally in tallies for failure in tally.failures],
        sum(tally.wrong for tally in tallies),
        sum(tally.not_linked for tally in tallies),
    )


class Computed(LayerSynchronizer):
    """Every layer has been computed."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def receive_pushes(state: State, nbytes: int) -> list[int]:
    """Make room for pushes; gives the addresses of its tensors."""
    cache = state["datadist"].kv_cache_manager.allocate_cache(CacheDesc(2, (1, nbytes), DataType.DT_UINT8))
    state.setdefault("kept", []).append(cache)
    addresses: list[int] = cache.per_device_tensor_addrs[0]
    return addresses


def push_on_and_on(state: State, cluster_id: int, addresses: list[int], nbytes: int) -> Tally:
    """Push to a cluster until `stop_pulling`, each transfer inside of `ClusterMember.transfer`."""
    state["stop"] = stop = threading.Event()
    state["pulled"] = state["not_linked"] = 0
    manager, member = state["datadist"].kv_cache_manager, state["member"]
    cache = manager.allocate_cache(CacheDesc(2, (1, nbytes), DataType.DT_UINT8))
    failures: list[str] = []
    while not stop.is_set():
        started = False
        try:
            with member.transfer(cluster_id, timeout_s=10):
                started = True
                config = TransferConfig(cluster_id, addresses, src_batch_index=0)
                code = manager.transfer_cache_async(cache, Computed(), [config]).synchronize(10_000)
        except LLMException as error:
            if started or error.status_code is not LLMStatusCode.LLM_NOT_YET_LINK:
                failures.append(f"{cluster_id}: {error}")
            state["not_linked"] += 1
            stop.wait(0.001)
            continue
        if code is not LLMStatusCode.LLM_SUCCESS:
            failures.append(f"{cluster_id}: {code}")
        state["pulled"] += 1
    return Tally(state["pulled"], {cluster_id: state["pulled"]}, failures, 0, state["not_linked"])


def pulled(state: State) -> int:
    """Tell about how many pulls there were so far."""
    return state.get("pulled", 0)


def not_linked(state: State) -> int:
    return state.get("not_linked", 0)


def stop_pulling(state: State) -> None:
    state["stop"].set()


# ---- role switches


def switch(
    state: State, role: LLMRole, port: int | None = None, timeout_s: float = 20.0, stop_in: str = ""
) -> list[str]:
    """Switch; gives the phases. In the phase `stop_in` it stands still, until `go_on` or the end of the process."""
    phases: list[str] = []
    state["phases"] = phases
    state["go_on"] = go_on = threading.Event()

    def on_phase(phase: SwitchPhase) -> None:
        phases.append(phase.value)
        if phase is SwitchPhase.DRAINING:
            state["began"] = time.monotonic()
        if phase is SwitchPhase.RELINKING:
            state["ended"] = time.monotonic()
        if phase.value == stop_in:
            go_on.wait(60)

    listen = None if port is None else f"127.0.0.1:{port}"
    state["member"].switch_role(role, listen, timeout_s, on_phase)
    return phases


def span(state: State) -> tuple[float, float]:
    """Tell when the last switch had the lock, on the clock of this host."""
    return state["began"], state["ended"]


def phases(state: State) -> list[str]:
    return list(state.get("phases", []))


def go_on(state: State) -> None:
    state["go_on"].set()


def close_member(state: State) -> None:
    state["member"].close()


Members = Callable[[str], Member]
