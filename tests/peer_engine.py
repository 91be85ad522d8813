"""An engine in cache-manager mode in a member. Functions for `Member.call`, each with the member's state first."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm_datadist.engine.communicator import MemberStatus
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link_calls import LinkResult
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException
from tests.many_engines import HOST, POOL_BYTES, address_of
from tests.processes import Member

State = dict
Target = tuple[int, int]  # cluster id and port

TENSOR_BYTES = 4096
LINKED = "LINKED"
BROKEN = "BROKEN"


def make_engine(
    cluster_id: int,
    port: int | None = None,
    role: LLMRole = LLMRole.MIX,
    pool_bytes: int = POOL_BYTES,
    **options: Any,
) -> Engine:
    sizes = {"device_pool_bytes": pool_bytes, **options}
    return Engine(
        EngineOptions(
            role,
            cluster_id,
            listen=((HOST, port),) if port is not None else (),
            pool_bytes=pool_bytes,
            cache_manager=CacheManagerOptions(**sizes),
        )
    )


def open_peer(state: State, *args: Any, **kwargs: Any) -> None:
    state["engine"] = make_engine(*args, **kwargs)


def close_peer(state: State) -> None:
    state["engine"].close()


def link(state: State, *targets: Target, timeout_ms: int = 10_000) -> LinkResult:
    return state["engine"].link([address_of(*target) for target in targets], timeout_ms)


def link_from_threads(state: State, *targets: Target, timeout_ms: int = 10_000) -> list[LinkResult]:
    """Link to each target in a thread of its own, all at the same moment."""
    ready = threading.Barrier(len(targets))

    def link_to(target: Target) -> LinkResult:
        ready.wait(5)
        return link(state, target, timeout_ms=timeout_ms)

    with ThreadPoolExecutor(len(targets)) as threads:
        return list(threads.map(link_to, targets))


def unlink(state: State, *targets: Target, timeout_ms: int = 10_000, force: bool = False) -> LinkResult:
    return state["engine"].unlink([address_of(*target) for target in targets], timeout_ms, force)


def switch(state: State, role: LLMRole, port: int | None) -> None:
    state["engine"].switch_role(role, None if port is None else (HOST, port))


def role_of(state: State) -> LLMRole:
    return state["engine"].role


def links(state: State) -> list[tuple[int, str]]:
    return sorted((link.cluster_id, link.state) for link in state["engine"].describe_links())


def wait_for_links(member: Member, expected: Sequence[tuple[int, str]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while (found := member.call(links)) != list(expected):
        assert time.monotonic() < deadline, f"{member.name} has {found}, expected {expected}"


def offer(state: State, req_id: int, fill: int) -> None:
    """Allocate a cache of one tensor under a key and fill it with one byte."""
    engine = state["engine"]
    key: KeyName = (int(KeyKind.ORDINARY), req_id, 0)
    cache_id, _ = engine.allocate(1, TENSOR_BYTES, 1, [key])
    engine.tensor_memory(cache_id, 0)[0][:] = bytes([fill]) * TENSOR_BYTES


def pull(state: State, cluster_id: int, req_id: int) -> bytes:
    """Pull a cache of a peer; gives its bytes."""
    engine = state["engine"]
    cache_id, _ = engine.allocate(1, TENSOR_BYTES, 1)
    try:
        engine.pull_cache(cluster_id, (int(KeyKind.ORDINARY), req_id, 0), cache_id, 0, -1, None, None, 0, 0, True)
        return bytes(engine.tensor_memory(cache_id, 0)[0])
    finally:
        engine.deallocate(cache_id)


def assert_pulls(member: Member, owner: Member, cluster_id: int, req_id: int) -> None:
    fill = req_id % 251
    owner.call(offer, req_id, fill)
    assert member.call(pull, cluster_id, req_id) == bytes([fill]) * TENSOR_BYTES


# ---- transfers that go on and on

LONG_BYTES = 16 << 20
LONG_POOL_BYTES = 4 * LONG_BYTES
_LONG_KEY: KeyName = (int(KeyKind.PREFIX), 1, 0)


def offer_long(state: State) -> None:
    """Offer something that takes a while to pull."""
    state["engine"].allocate(1, LONG_BYTES, 1, [_LONG_KEY])


def pull_until_told(state: State, cluster_id: int) -> None:
    """Pull in three threads until `stop_pulling`, also while there is no link for a moment."""
    engine = state["engine"]
    stop = state["stop"] = threading.Event()

    def pull_on(_: int) -> None:
        cache_id, _ = engine.allocate(1, LONG_BYTES, 1)
        while not stop.is_set():
            with contextlib.suppress(LLMException):
                engine.pull_cache(cluster_id, _LONG_KEY, cache_id, 0, -1, None, None, 0, 0, False)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(pull_on, range(3)))


def stop_pulling(state: State) -> None:
    state["stop"].set()


def until_busy(take_down: Callable[[], Any], busy: Any, link_again: Callable[[], Any]) -> None:
    """Try to take a link down until a pull is in the way; a try between two pulls succeeds."""
    deadline = time.monotonic() + 20
    while (found := take_down()) != busy:
        assert time.monotonic() < deadline, f"never busy, the last answer is {found}"
        link_again()


# ---- communicators


def own(name: str) -> str:
    """Make a name of a communicator that no test in another process uses at the same time."""
    return f"{name} of {os.getpid()}"


def rank_table(ranks: int | dict[int, int], **fields: Any) -> str:
    """A table with a device of one server for each rank: the rank itself or, if that is given, the cluster id."""
    device_of = {rank: rank for rank in range(ranks)} if isinstance(ranks, int) else {r: c for c, r in ranks.items()}
    devices = [{"device_id": str(device), "rank_id": str(rank)} for rank, device in device_of.items()]
    return json.dumps(
        {
            "version": "1.0",
            "status": "completed",
            "server_count": "1",
            "server_list": [{"server_id": HOST, "device": devices}],
            **fields,
        }
    )


def join(state: State, name: str, members: dict[int, int], table: str | None = None) -> int:
    text = rank_table(members) if table is None else table
    return state["engine"].link_members(name, members, text)


def join_from_threads(state: State, communicators: Sequence[tuple[str, dict[int, int]]]) -> dict[str, int]:
    """Join many communicators, in the given order, from several threads; gives the id of each."""
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(lambda one: join(state, *one), communicators))
    return {name: communicator for (name, _), communicator in zip(communicators, ids)}


def status(state: State, communicator: int) -> MemberStatus:
    return MemberStatus(state["engine"].member_status(communicator))


def wait_for_status(state: State, communicator: int, seconds: float = 10.0) -> tuple[MemberStatus, float]:
    """Wait until a communicator is not preparing any more; gives its status and how long that took."""
    started = time.monotonic()
    while (found := status(state, communicator)) is MemberStatus.PREPARING:
        assert time.monotonic() - started < seconds, "still preparing"
        time.sleep(0.002)
    return found, time.monotonic() - started


def leave(state: State, communicator: int) -> None:
    state["engine"].unlink_members(communicator)


def member_links(state: State) -> list[tuple[int, str, int | None]]:
    found = [(link.cluster_id, link.state, link.communicator) for link in state["engine"].describe_links()]
    return sorted(found, key=str)


def ways(state: State) -> set[tuple[str, str]]:
    """Transport of every link, and why it has that."""
    return {(link.transport, link.reason) for link in state["engine"].describe_links()}


def joined(communicator: dict[int, Member], name: str) -> dict[int, int]:
    """Have every member join one communicator, rank by the order of the ids, and wait until it is complete."""
    ranks = {cluster_id: rank for rank, cluster_id in enumerate(communicator)}
    ids = {cluster_id: member.call(join, name, ranks) for cluster_id, member in communicator.items()}
    for cluster_id, member in communicator.items():
        assert member.call(wait_for_status, ids[cluster_id])[0] is MemberStatus.OK
    return ids
