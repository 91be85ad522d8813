"""An engine in cache-manager mode in a member. Functions for `Member.call`, each with the member's state first."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm_datadist.engine.engine import Engine
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link_calls import LinkResult
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from llm_datadist.roles import LLMRole
from tests.many_engines import HOST, POOL_BYTES, address_of
from tests.processes import Member

State = dict
Target = tuple[int, int]  # cluster id and port

TENSOR_BYTES = 4096
LINKED = "LINKED"
BROKEN = "BROKEN"


def make_engine(cluster_id: int, port: int | None = None, role: LLMRole = LLMRole.MIX, **options: Any) -> Engine:
    sizes = {"device_pool_bytes": POOL_BYTES, **options}
    return Engine(
        EngineOptions(
            role,
            cluster_id,
            listen=((HOST, port),) if port is not None else (),
            pool_bytes=POOL_BYTES,
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
