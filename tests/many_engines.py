"""Many engines in one process, for tests of limits: what a limit counts is an engine, not a process of the system.

Functions for `Member.call`, each with the member's state first.
"""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llm_datadist.engine.engine import Engine
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.options import EngineOptions
from llm_datadist.ip_address import trans_str_ip
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode

HOST = "127.0.0.1"
POOL_BYTES = 1 << 20
LINKING_THREADS = 8

State = dict
LinkResult = tuple[LLMStatusCode, list[LLMStatusCode]]


def allow_many_descriptors() -> None:
    """Raise the soft limit of open descriptors to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def address_of(cluster_id: int, port: int) -> ClusterAddress:
    ip = trans_str_ip(HOST)
    return ClusterAddress(cluster_id, ((ip, 0),), ((ip, port),))


def open_prompts(state: State, cluster_ids: Sequence[int]) -> list[int]:
    """Open a PROMPT for each id, on free ports; gives the ports."""
    allow_many_descriptors()
    state["engines"] = engines = {}
    state["holders"] = holders = contextlib.ExitStack()
    ports = []
    for cluster_id in cluster_ids:
        # Bound, but not listening: nobody else gets the port, and the engine can listen on it.
        holder = holders.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        ports.append(holder.getsockname()[1])
        engines[cluster_id] = Engine(
            EngineOptions(LLMRole.PROMPT, cluster_id, listen=((HOST, ports[-1]),), pool_bytes=POOL_BYTES)
        )
    return ports


def open_decoders(state: State, cluster_ids: Sequence[int]) -> None:
    """Open a DECODER for each id."""
    allow_many_descriptors()
    state["engines"] = {
        cluster_id: Engine(EngineOptions(LLMRole.DECODER, cluster_id, pool_bytes=POOL_BYTES))
        for cluster_id in cluster_ids
    }


def close_engines(state: State) -> None:
    for engine in state["engines"].values():
        engine.close()
    if "holders" in state:
        state["holders"].close()


def link_from_each(
    state: State, cluster_ids: Sequence[int], remote_id: int, port: int, timeout_ms: int = 20_000
) -> list[LinkResult]:
    """Link each of the engines to one PROMPT, several at the same time."""
    with ThreadPoolExecutor(LINKING_THREADS) as threads:
        return list(
            threads.map(
                lambda cluster_id: state["engines"][cluster_id].link([address_of(remote_id, port)], timeout_ms),
                cluster_ids,
            )
        )


def link_to_all(state: State, cluster_id: int, targets: Sequence[tuple[int, int]]) -> LinkResult:
    """Link one engine to PROMPTs, given by id and port, in one call."""
    return state["engines"][cluster_id].link([address_of(*target) for target in targets], 20_000)


def unlink_all(state: State, cluster_id: int, targets: Sequence[tuple[int, int]]) -> LinkResult:
    return state["engines"][cluster_id].unlink([address_of(*target) for target in targets], 20_000, False)


def states_of_links(state: State, cluster_id: int) -> list[str]:
    return [link.state for link in state["engines"][cluster_id].describe_links()]
