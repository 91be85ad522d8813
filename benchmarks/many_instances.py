"""A process with many engines, each linked once: the other ends of one instance with many links.

A process has one initialised `LLMDataDist`, and hundreds of processes do not fit on a small machine, so the engines are
made directly. To their peer each is a cluster of its own.
"""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from llm_datadist.engine.engine import Engine
from llm_datadist.engine.keys import KeyKind
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.options import EngineOptions
from llm_datadist.ip_address import trans_str_ip
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode

from .instances import HOST, TIMEOUT_MS
from .prompt_process import PREFIX

POOL_BYTES = 1 << 20
BLOCK_BYTES = 16 << 10
RESIDENT_MEMORY = "resident memory"
_THREADS = 8  # that open links at the same time

EngineCall = Callable[[Engine, ClusterAddress], bool]
ForEach = Callable[[EngineCall, ClusterAddress], int]  # gives how many succeeded


def allow_many_descriptors() -> None:
    """Raise the soft limit of open descriptors to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS line")


def serve_prompts(connection: Connection, cluster_ids: Sequence[int]) -> None:
    """Body of a process: one listening PROMPT an id, each with one cache. Sends the ports, then answers questions."""
    allow_many_descriptors()
    with contextlib.ExitStack() as opened:
        ports = []
        for cluster_id in cluster_ids:
            # Bound but not listening: nobody else gets the port, while the engine can listen on it.
            holder = opened.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((HOST, 0))
            ports.append(holder.getsockname()[1])
            options = EngineOptions(LLMRole.PROMPT, cluster_id, listen=((HOST, ports[-1]),), pool_bytes=POOL_BYTES)
            engine = opened.enter_context(contextlib.closing(Engine(options)))
            engine.allocate(2, BLOCK_BYTES, 1, keys=[(KeyKind.PREFIX, PREFIX, 0)])
        connection.send(ports)
        _answer(connection)


def serve_decoders(connection: Connection, cluster_ids: Sequence[int]) -> None:
    """Body of a process: one DECODER an id. Sends how many there are, then does what it is told."""
    allow_many_descriptors()
    with contextlib.ExitStack() as opened:
        engines = [
            opened.enter_context(
                contextlib.closing(Engine(EngineOptions(LLMRole.DECODER, cluster_id, pool_bytes=POOL_BYTES)))
            )
            for cluster_id in cluster_ids
        ]
        threads = opened.enter_context(ThreadPoolExecutor(_THREADS))
        connection.send(len(engines))
        _answer(connection, lambda call, address: sum(threads.map(lambda engine: call(engine, address), engines)))


def link(engine: Engine, address: ClusterAddress) -> bool:
    return engine.link([address], TIMEOUT_MS)[0] is LLMStatusCode.LLM_SUCCESS


def unlink(engine: Engine, address: ClusterAddress) -> bool:
    return engine.unlink([address], TIMEOUT_MS, False)[0] is LLMStatusCode.LLM_SUCCESS


def address_of(cluster_id: int, port: int) -> ClusterAddress:
    ip = trans_str_ip(HOST)
    return ClusterAddress(cluster_id, ((ip, 0),), ((ip, port),))


def _answer(connection: Connection, for_each: ForEach | None = None) -> None:
    """Do what the other end says, until that is None: a call for each engine, or tell the resident memory."""
    while (order := connection.recv()) is not None:
        if order == RESIDENT_MEMORY:
            connection.send(resident_bytes())
        else:
            assert for_each is not None
            connection.send(for_each(*order))
