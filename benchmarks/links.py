"""Many links: how long their set-up takes, what an idle one costs, and whether others feel it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from llm_datadist import CacheKey, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup, LocalWorker
from llm_datadist.engine.link import ClusterAddress

from .instances import HOST, TIMEOUT_MS, WAIT_S, answer, free_port, new_datadist
from .many_instances import (
    BLOCK_BYTES,
    RESIDENT_MEMORY,
    EngineCall,
    address_of,
    allow_many_descriptors,
    link,
    resident_bytes,
    serve_decoders,
    serve_prompts,
    unlink,
)
from .measurement import Row, Target, time_us
from .prompt_process import ANY_REQUEST, PREFIX, bytes_desc

TOPIC = "links"
LINKS = 512
A_CALL = 16  # the most clusters that one call links to
PROCESSES = 4
FIRST_ID = 1000
LATENCY_AT = (1, 16, 64, 128, 256, 512)
MOST_S = 6.0
MOST_KIB = 64.0
MOST_SLOWER = 1.10
LATENCY_RUNS = 3000
RUNS = 7
SET_UP_CURVE = "set-up over links"
LATENCY_CURVE = "pull over links"


def measure() -> Iterator[Row]:
    """Link one decoder to many prompts, then many decoders to one prompt."""
    allow_many_descriptors()
    yield from _links_of_one_decoder()
    yield from _links_of_one_prompt()


# ---- one decoder, many prompts


def _links_of_one_decoder() -> Iterator[Row]:
    with LocalGroup() as group:
        workers = [group.start(f"prompts-{n}", serve_prompts, _ids(n)) for n in range(PROCESSES)]
        targets = []
        for number, worker in enumerate(workers):
            ports = answer(worker.connection)
            assert isinstance(ports, list)
            targets += [_cluster(cluster_id, port) for cluster_id, port in zip(_ids(number), ports)]
        datadist = new_datadist(LLMRole.DECODER, 1, 1 << 20)
        try:
            yield from _grow(datadist, targets, workers)
        finally:
            for worker in workers:
                worker.connection.send(None)
            datadist.finalize()


def _grow(datadist: LLMDataDist, targets: list[LLMClusterInfo], workers: list[LocalWorker]) -> Iterator[Row]:
    """Link in calls of 16, with a look at a pull from the first prompt now and then; then all of it some more times."""
    manager = datadist.kv_cache_manager
    cache = manager.allocate_cache(bytes_desc(2, 1, BLOCK_BYTES))
    key = CacheKey(FIRST_ID, ANY_REQUEST, 0, PREFIX)
    calls = [targets[first : first + A_CALL] for first in range(0, LINKS, A_CALL)]
    set_up: dict[int, list[float]] = {count: [] for count in LATENCY_AT[1:]}
    latency = {}

    def look(linked: int) -> None:
        latency[linked] = time_us(lambda: manager.pull_cache(key, cache), LATENCY_RUNS, warm_up=100)

    _link(datadist, targets[:1])
    look(1)
    ours, theirs = -resident_bytes(), -_resident(workers)
    _link_all(datadist, [targets[1:A_CALL], *calls[1:]], lambda linked, _: look(linked) if linked in set_up else None)
    ours, theirs = ours + resident_bytes(), theirs + _resident(workers)
    for _ in range(RUNS):
        for call in calls:
            datadist.unlink_clusters(call, TIMEOUT_MS)
        _link_all(datadist, calls, lambda linked, s: set_up[linked].append(s) if linked in set_up else None)

    yield _set_up_row(f"{LINKS} links of one decoder, {A_CALL} a call", set_up[LINKS])
    for count, seconds in set_up.items():
        yield Row(TOPIC, f"set-up of {count} links", seconds, unit="s", point=(SET_UP_CURVE, count))
    yield _memory_row("the decoder's end", ours)
    yield _memory_row("the prompts' ends", theirs)
    alone = statistics.median(latency[1])
    for count, taken in latency.items():
        times = Target("x alone", statistics.median(taken) / alone, MOST_SLOWER, at_least=False)
        wanted = (times,) if count == LINKS else ()
        name = f"pull_cache of 2 x 16 KiB with {count - 1} idle links"
        yield Row(TOPIC, name, taken, 2 * BLOCK_BYTES, targets=wanted, point=(LATENCY_CURVE, count))


def _link_all(datadist: LLMDataDist, calls: list[list[LLMClusterInfo]], look: Callable[[int, float], object]) -> None:
    """Link in some calls; `look` gets the number of links and the seconds that calls took so far, its own not."""
    spent = 0.0
    for number, clusters in enumerate(calls, 1):
        started = time.perf_counter()
        _link(datadist, clusters)
        spent += time.perf_counter() - started
        look(number * A_CALL, spent)


# ---- one prompt, many decoders


def _links_of_one_prompt() -> Iterator[Row]:
    """Link decoders to another prompt first, so that what an instance has once is there already."""
    port = free_port()
    datadist = new_datadist(LLMRole.PROMPT, 1, 1 << 20, port)
    try:
        with LocalGroup() as group:
            other = group.start("other prompt", serve_prompts, [2])
            ports = answer(other.connection)
            assert isinstance(ports, list)
            workers = [group.start(f"decoders-{n}", serve_decoders, _ids(n)) for n in range(PROCESSES)]
            for worker in workers:
                _number(worker)
            _for_each(workers, link, address_of(2, ports[0]))
            ours, theirs = -resident_bytes(), -_resident(workers)
            here = address_of(1, port)
            seconds = [_for_each(workers, link, here)]
            ours, theirs = ours + resident_bytes(), theirs + _resident(workers)
            for _ in range(RUNS - 1):
                _for_each(workers, unlink, here)
                seconds.append(_for_each(workers, link, here))
            for worker in [*workers, other]:
                worker.connection.send(None)
                worker.wait(WAIT_S)
        yield _set_up_row(f"{LINKS} links of one prompt, from {PROCESSES} processes", seconds)
        yield _memory_row("the prompt's end", ours)
        yield _memory_row("the decoders' ends", theirs)
    finally:
        datadist.finalize()


def _for_each(workers: list[LocalWorker], call: EngineCall, address: ClusterAddress) -> float:
    """Let all engines of the workers do something at the same time; gives the seconds."""
    started = time.perf_counter()
    for worker in workers:
        worker.connection.send((call, address))
    succeeded = sum(_number(worker) for worker in workers)
    seconds = time.perf_counter() - started
    if succeeded != LINKS:
        raise RuntimeError(f"{call.__name__} succeeded for {succeeded} of {LINKS} decoders")
    return seconds


# ---- parts of both


def _ids(process: int) -> range:
    each = LINKS // PROCESSES
    return range(FIRST_ID + process * each, FIRST_ID + (process + 1) * each)


def _cluster(cluster_id: int, port: int) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info(HOST, 0)
    info.append_remote_ip_info(HOST, port)
    return info


def _link(datadist: LLMDataDist, clusters: list[LLMClusterInfo]) -> None:
    overall, results = datadist.link_clusters(clusters, TIMEOUT_MS)
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"linking failed: {results}")


def _number(worker: LocalWorker) -> int:
    number = answer(worker.connection)
    assert isinstance(number, int)
    return number


def _resident(workers: list[LocalWorker]) -> int:
    total = 0
    for worker in workers:
        worker.connection.send(RESIDENT_MEMORY)
        total += _number(worker)
    return total


def _set_up_row(name: str, seconds: list[float]) -> Row:
    target = Target("s median", statistics.median(seconds), MOST_S, at_least=False)
    return Row(TOPIC, name, seconds, unit="s", targets=(target,))


def _memory_row(end: str, growth: int) -> Row:
    each = growth / LINKS / 1024
    name = f"resident memory of an idle link at {end}"
    return Row(TOPIC, name, [each], unit="KiB", targets=(Target("KiB", each, MOST_KIB, at_least=False),))
