"""The registry with 1 to 2000 members: announcements a second, look-ups, memory, and how long all take to find all.

The members are simulated: light clients, a socket each, in two processes (`simulated_members`). The registry is the
real one, in a process of its own; look-ups go through `RegistryClient`. All run on this host, over loopback.

Run it alone with ``python -m benchmarks.registry``; that draws its curve too.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import click
from rich.console import Console

from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember, Registry, RegistryClient
from llm_datadist.cluster.local import LocalGroup, LocalWorker

from .instances import HOST
from .many_instances import RESIDENT_MEMORY, allow_many_descriptors, resident_bytes
from .measurement import Row, Target, time_us
from .simulated_members import ANNOUNCE, ANNOUNCE_ON_AND_ON, DISCOVER, HEAR, RENEW, WITHDRAW, simulate

TOPIC = "registry"
MEMBERS = (1, 10, 100, 250, 500, 1000, 2000)
PROCESSES = 2
WAIT_S = 180.0
THROUGHPUT_S = 2.0
THROUGHPUT_RUNS = 3
LOOK_UPS = 400
WHOLE_LISTS = 40
DISCOVERIES = 3
NEWS = 15
MOST_LOOK_UP_P99_MS = 50.0  # under it nobody who waits for a human's request notices
MOST_DISCOVERY_S = 30.0

ANNOUNCEMENTS_CURVE = "announcements a second over members"
LOOK_UP_CURVE = "look-up over members"
LOOK_UP_P99_CURVE = "look-up p99 over members"
LIST_CURVE = "whole list over members"
MEMORY_CURVE = "memory of the registry over members"
DISCOVERY_CURVE = "discovery over members"
NEWS_CURVE = "news over members"


def measure() -> Iterator[Row]:
    """Start a registry and simulated members, for each number of them anew."""
    allow_many_descriptors()
    for count in MEMBERS:
        with LocalGroup() as group:
            service = group.start("registry", serve_registry)
            address = f"tcp://{HOST}:{int(_answer(service))}"
            empty = _resident(service)
            processes = min(PROCESSES, count)
            crowds = [
                group.start(f"members-{number}", simulate, address, range(1 + number, 1 + count, processes))
                for number in range(processes)
            ]
            for crowd in crowds:
                _answer(crowd)
            yield from _measure_with(count, address, service, crowds, empty)
            for worker in (*crowds, service):
                worker.connection.send(None)
                worker.wait(WAIT_S)


def serve_registry(connection: Connection) -> None:
    """Body of the registry's process: sends its port, then its resident memory whenever asked."""
    allow_many_descriptors()
    with Registry(HOST) as service:
        serving = threading.Thread(target=service.serve)
        serving.start()
        connection.send(float(service.port))
        while connection.recv() is not None:
            connection.send(float(resident_bytes()))
        service.stop()
        serving.join()


def _measure_with(
    count: int, address: str, service: LocalWorker, crowds: list[LocalWorker], empty: float
) -> Iterator[Row]:
    _all(crowds, ANNOUNCE)
    total = (_resident(service) - empty) / 2**20
    each = f"{total * 1024 / count:.1f} KiB each"
    name = f"memory of the registry, {count:,} members more"
    yield Row(TOPIC, name, [total], unit="MiB", note=each, point=(MEMORY_CURVE, count))
    rates = [sum(_all(crowds, ANNOUNCE_ON_AND_ON, THROUGHPUT_S)) for _ in range(THROUGHPUT_RUNS)]
    yield Row(TOPIC, f"announcements, {count:,} members", rates, unit="1/s", point=(ANNOUNCEMENTS_CURVE, count))
    yield from _look_ups(count, address, crowds)
    yield from _news(count, address, crowds)
    yield from _discovery(count, crowds)


def _look_ups(count: int, address: str, crowds: list[LocalWorker]) -> Iterator[Row]:
    """Look one member up by its label, and list all, while all renew their leases."""
    with RegistryClient(address) as client:
        label = {"name": f"member-{count}"}
        assert [member.cluster_id for member in client.members(labels=label)] == [count]
        # How long that takes is known then: the leases are renewed for as long.
        started = time.perf_counter()
        client.members()
        whole_s = time.perf_counter() - started
        seconds = 2.0 + LOOK_UPS * 0.01 + 2 * WHOLE_LISTS * whole_s
        for crowd in crowds:
            crowd.connection.send((RENEW, seconds))
        one = time_us(lambda: client.members(labels=label), LOOK_UPS)
        whole = time_us(client.members, WHOLE_LISTS)
        for crowd in crowds:
            _answer(crowd)
    slowest_ms = statistics.quantiles(one, n=100)[98] / 1e3
    wanted = (Target("ms p99", slowest_ms, MOST_LOOK_UP_P99_MS, at_least=False),) if count == max(MEMBERS) else ()
    name = f"look-up of one of {count:,} members by its label"
    yield Row(TOPIC, name, one, targets=wanted, note=f"p99 {slowest_ms:.2f} ms", point=(LOOK_UP_CURVE, count))
    yield Row(TOPIC, f"{name}, p99", [slowest_ms * 1e3], point=(LOOK_UP_P99_CURVE, count))
    yield Row(TOPIC, f"list of {count:,} members", whole, point=(LIST_CURVE, count))


def _news(count: int, address: str, crowds: list[LocalWorker]) -> Iterator[Row]:
    """Announce another state; measure until the last of all members has heard of it."""
    taken = []
    with ClusterMember(None, address, 2**32, role=LLMRole.PROMPT, lease_s=300.0) as member:
        member.announce("0")
        for number in range(NEWS):
            for crowd in crowds:
                crowd.connection.send((HEAR,))
            for crowd in crowds:
                _answer(crowd)  # all wait
            began = time.monotonic()
            member.announce(str(number + 1))
            taken.append((max(_answer(crowd) for crowd in crowds) - began) * 1e3)
    yield Row(TOPIC, f"until {count:,} members have heard of a change", taken, unit="ms", point=(NEWS_CURVE, count))


def _discovery(count: int, crowds: list[LocalWorker]) -> Iterator[Row]:
    """Let all come at the same time; measure until each knows each."""
    seconds = []
    for _ in range(DISCOVERIES):
        _all(crowds, WITHDRAW)
        seconds.append(max(_all(crowds, DISCOVER, count)))
    target = Target("s median", statistics.median(seconds), MOST_DISCOVERY_S, at_least=False)
    wanted = (target,) if count == max(MEMBERS) else ()
    name = f"{count:,} members come at once, until each knows each"
    yield Row(TOPIC, name, seconds, unit="s", targets=wanted, point=(DISCOVERY_CURVE, count))


# ---- workers


def _answer(worker: LocalWorker) -> float:
    if not worker.connection.poll(WAIT_S):
        raise TimeoutError(f"{worker.name} does not answer")
    number = worker.connection.recv()
    assert isinstance(number, float)
    return number


def _all(crowds: list[LocalWorker], *order: object) -> list[float]:
    for crowd in crowds:
        crowd.connection.send(order)
    return [_answer(crowd) for crowd in crowds]


def _resident(service: LocalWorker) -> float:
    service.connection.send(RESIDENT_MEMORY)
    return _answer(service)


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
def main(path: Path | None) -> None:
    """Measure the registry and draw its curves into benchmarks/results."""
    from .plots import draw
    from .results import as_document, save
    from .table import as_table

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rows = []
    for row in measure():
        console.print(f"{row.name}: {row.median:.4g} {row.unit}")
        rows.append(row)
    console.print(as_table(rows))
    document = as_document(rows)
    if path is not None:
        save(document, path)
    for picture in draw(document):
        console.print(f"drawn in {picture}")


if __name__ == "__main__":
    main()
