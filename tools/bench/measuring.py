"""The measuring process: one transfer after the other, each timed."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from llm_datadist import BlocksCacheKey, Cache, CacheKeyByIdAndIndex, LLMException
from llm_datadist.cache_manager import CacheManager
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.tools.bench.case import Case
from llm_datadist.tools.bench.endpoint import Endpoint, has_arrived
from llm_datadist.tools.bench.latency import Latency
from llm_datadist.tools.bench.peer_process import MEASURING, PEER, Arrived, Failed, Ready, serve

PULL, PUSH = "pull", "push"

_THREADS = "LLM_DATADIST_COPY_THREADS"
_WARM_UP = 2  # runs that do not count: they take pages and fill caches of the processor
_LEAST_RUNS = 3
_ANSWER_S = 60.0
_STOP_S = 2.0
_MEMCPY_BYTES = 64 << 20
_MEMCPY_RUNS = 9


class BenchError(Exception):
    """The measurement could not be completed; the text says why."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    cases : sequence of Case
    direction : str
        ``"pull"`` or ``"push"``, seen from the measuring process.
    memory : str
        ``"pool"`` or ``"registered"``, in both processes.
    threads : int or None
        Threads that a copy may use; None leaves it to the library.
    seconds : float
        How long each case is repeated.
    runs : int or None
        How often instead.
    """

    cases: Sequence[Case]
    direction: str
    memory: str
    threads: int | None
    seconds: float
    runs: int | None


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes
    ----------
    latencies : list of Latency
        One a case.
    transport : str
        How the bytes moved.
    memcpy_gb_per_s : float
        What one thread of this host copies inside of a process, for comparison.
    """

    latencies: list[Latency]
    transport: str
    memcpy_gb_per_s: float


def measure(plan: Plan, begin_case: Callable[[Case], object]) -> Result:
    """Start the other process, link to it and run every case; `begin_case` is told of each.

    Raises
    ------
    BenchError
        There is not enough memory, a process failed, or bytes did not arrive.
    """
    largest = max(case.nbytes for case in plan.cases)
    tensors = max(case.tensors for case in plan.cases)
    with _environment(plan.threads), LocalGroup(stop_timeout_s=_STOP_S) as group, _free_port() as port:
        pushed_to = plan.direction == PUSH
        worker = group.start("peer", serve, plan.memory, largest, tensors, port, pushed_to)
        _answer(worker.connection)
        try:
            endpoint = Endpoint(MEASURING, plan.memory, largest, tensors)
            try:
                endpoint.link(PEER, port)
                latencies = []
                for case in plan.cases:
                    begin_case(case)
                    latencies.append(_run_case(plan, case, endpoint, worker.connection))
                transport = endpoint.transport
            finally:
                endpoint.close()
        except (LLMException, MemoryError) as error:
            raise BenchError(str(error)) from None
        worker.connection.send(None)
        worker.wait(_STOP_S)
    return Result(latencies, transport, _memcpy_gb_per_s())


def _run_case(plan: Plan, case: Case, endpoint: Endpoint, connection: Connection) -> Latency:
    connection.send(case)
    ready = _answer(connection)
    assert isinstance(ready, Ready)
    pushing = plan.direction == PUSH
    with endpoint.cache(case, filled=pushing) as (cache, arrays):
        transfer = _transfer(endpoint.manager, case, cache, ready.cache_id, pushing)
        taken = _time_us(transfer, plan.seconds, plan.runs)
        whole = pushing or has_arrived(arrays)
        del arrays
    connection.send("end")
    there = _answer(connection)
    assert isinstance(there, Arrived)
    if not (whole and there.whole):
        raise BenchError(f"{case} was moved, but its bytes are not those of the source")
    return Latency(case, sorted(taken))


def _transfer(manager: CacheManager, case: Case, cache: Cache, remote_id: int, pushing: bool) -> Callable[[], object]:
    """Give the call that moves the message once."""
    if case.block_bytes is None:
        move = manager.push_cache if pushing else manager.pull_cache
        return partial(move, CacheKeyByIdAndIndex(PEER, remote_id, 0), cache)
    move_blocks = manager.push_blocks if pushing else manager.pull_blocks
    return partial(move_blocks, BlocksCacheKey(PEER, 0), cache, *case.block_lists())


def _time_us(transfer: Callable[[], object], seconds: float, runs: int | None) -> list[float]:
    for _ in range(_WARM_UP):
        transfer()
    clock = time.perf_counter_ns
    taken: list[float] = []
    end = clock() + int(seconds * 1e9)
    while len(taken) < runs if runs is not None else len(taken) < _LEAST_RUNS or clock() < end:
        started = clock()
        transfer()
        taken.append((clock() - started) / 1e3)
    return taken


def _answer(connection: Connection) -> Any:
    try:
        if not connection.poll(_ANSWER_S):
            raise BenchError(f"the other process did not answer within {_ANSWER_S:.0f} s")
        answer = connection.recv()
    except (EOFError, ConnectionResetError):
        raise BenchError("the other process ended unexpectedly") from None
    if isinstance(answer, Failed):
        raise BenchError(answer.text)
    return answer


def _memcpy_gb_per_s() -> float:
    source = np.ones(_MEMCPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    taken = []
    for _ in range(_MEMCPY_RUNS):
        started = time.perf_counter_ns()
        np.copyto(target, source)
        taken.append(time.perf_counter_ns() - started)
    return _MEMCPY_BYTES / sorted(taken)[_MEMCPY_RUNS // 2]


@contextlib.contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    """Set how many threads copies of both processes may use, until the block ends."""
    before = os.environ.get(_THREADS)
    if threads is not None:
        os.environ[_THREADS] = str(threads)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_THREADS] = before
        elif threads is not None:
            del os.environ[_THREADS]


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """Hold a port, bound but not listening: nobody else gets it, while the other process can listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
