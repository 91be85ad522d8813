"""Prefills and decoders that link through communicators and pull blocks, in processes of their own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("torch")

from llm_datadist import LLMRole
from llm_datadist.transports import private_memory
from tests.clients.kv_tensors import Origin, mha, mla
from tests.clients.two_sided_connector import TwoSidedConnector
from tests.processes import Call, Member

LAYERS, BLOCKS = 4, 24
# What becomes of a link between devices when a process dies is looked at in tests/faults: starting torch takes long.
ON_HOST = pytest.mark.parametrize("device", ["host"], indirect=True)

LAYOUTS = {"mha": mha, "mla": mla}
FIRST = 2**63  # cluster ids use all of their bits
DEADLINE_S = 20.0

State = dict[str, Any]
Pull = tuple[int, list[int], list[int]]  # port, remote blocks, local blocks


def start(
    state: State, role: LLMRole, number: int, layout: str, seed: int | None = None, port: int = 0, **options: Any
) -> None:
    """Start a process of the deployment; a prefill has the contents of a seed and serves at a port."""
    caches = LAYOUTS[layout](LAYERS, BLOCKS)
    if seed is not None:
        for cache in caches:
            cache.fill(seed)
    state["connector"] = connector = TwoSidedConnector(role, FIRST + number, number, caches, **options)
    if port:
        connector.serve(port)


def stop(state: State) -> None:
    state["connector"].close()


def pull(state: State, pulls: Sequence[Pull]) -> list[str]:
    """Make all pulls at the same time; gives what went wrong on the way."""
    connector: TwoSidedConnector = state["connector"]
    with ThreadPoolExecutor(len(pulls)) as threads:
        for done in [threads.submit(connector.pull, *one) for one in pulls]:
            done.result()
    return connector.events


def events(state: State) -> list[str]:
    return list(state["connector"].events)


def wrong_blocks(state: State, expected: dict[int, Origin]) -> list[tuple[int, int]]:
    return [block for cache in state["connector"].caches for block in cache.wrong_blocks(expected)]


def clear(state: State) -> None:
    for cache in state["connector"].caches:
        cache.clear()


class Deployment:
    """Prefills 0, 1, ... and decoders 100, 101, ... of one layout. The seed of a prefill is its number + 1."""

    def __init__(self, take: Callable[[str], Member], free_port: Callable[[], int], layout: str) -> None:
        self._take = take  # gives a process
        self._free_port = free_port
        self._layout = layout
        self.ports: dict[int, int] = {}
        self.prefills: dict[int, Member] = {}
        self.decoders: list[Member] = []

    def start(self, prefills: int, decoders: int, **options: Any) -> Deployment:
        starting = [self.start_prefill(number, number + 1, **options) for number in range(prefills)]
        for number in range(decoders):
            self.decoders.append(self._take(f"decoder {number}"))
            arguments = (LLMRole.DECODER, 100 + number, self._layout)
            starting.append(self.decoders[-1].start(start, *arguments, **options))
        for call in starting:
            call.result()
        return self

    def start_prefill(self, number: int, seed: int, **options: Any) -> Call:
        port = self.ports.setdefault(number, self._free_port())
        process = self.prefills[number] = self._take(f"prefill {number} with seed {seed}")
        return process.start(start, LLMRole.PROMPT, number, self._layout, seed, port, **options)

    def stop(self) -> None:
        for process in (*self.decoders, *self.prefills.values()):
            process.call(stop)


@pytest.fixture
def deploy(members: Callable[[str], Member], free_port: Callable[[], int]) -> Callable[..., Deployment]:
    def deploy_one(layout: str, prefills: int = 1, decoders: int = 1, **options: Any) -> Deployment:
        return Deployment(members, free_port, layout).start(prefills, decoders, **options)

    return deploy_one


Deploy = Callable[..., Deployment]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoders_pull_from_prefills(crew: list[Member], free_port: Callable[[], int], layout: str) -> None:
    """Two of each; every decoder links to both prefills at the same time, at its first pulls."""
    idle = iter(crew)
    deployment = Deployment(lambda name: next(idle), free_port, layout).start(2, 2)
    choice = random.Random(layout)
    for _ in range(3):
        calls, expected = [], []
        for decoder in deployment.decoders:
            local = choice.sample(range(BLOCKS), 18)
            pulls, wanted = [], {}
            for index in range(6):  # each pull brings three blocks
                number = index % 2
                remote, mine = choice.sample(range(BLOCKS), 3), local[3 * index : 3 * index + 3]
                pulls.append((deployment.ports[number], remote, mine))
                wanted.update({to: (number + 1, block) for block, to in zip(remote, mine)})
            decoder.call(clear)
            calls.append(decoder.start(pull, pulls))
            expected.append(wanted)
        for decoder, call, wanted in zip(deployment.decoders, calls, expected):
            assert set(call.result()) <= {"LLM_LINK_BUSY"}
            assert decoder.call(wrong_blocks, wanted) == []
    deployment.stop()


@ON_HOST
def test_a_prefill_restarts(deploy: Deploy) -> None:
    """It is killed, and comes back with other contents at the same port; the decoders link anew by themselves."""
    deployment = deploy("mla", 1, 2)
    port = deployment.ports[0]
    pulls = [(port, [3, 4, 9], [0, 7, 5]), (port, [1], [2]), (port, [9, 8], [10, 11])]  # at the same time
    arrived = {to: block for _, remote, local in pulls for block, to in zip(remote, local)}
    for decoder in deployment.decoders:
        assert decoder.call(pull, pulls) == []
        assert decoder.call(wrong_blocks, {to: (1, block) for to, block in arrived.items()}) == []
    deployment.prefills[0].kill()
    started = deployment.start_prefill(0, seed=7)
    calls = [decoder.start(pull, pulls) for decoder in deployment.decoders]
    started.result()
    for decoder, call in zip(deployment.decoders, calls):
        assert "link anew" in call.result()
        assert decoder.call(wrong_blocks, {to: (7, block) for to, block in arrived.items()}) == []
    deployment.stop()


def wait_for_event(decoder: Member, event: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while event not in decoder.call(events):
        assert time.monotonic() < deadline, f"no {event}"


@pytest.mark.parametrize("event", ["LLM_TIMEOUT", "link anew"])
def test_a_prefill_that_stands_still_for_a_while(deploy: Deploy, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel lets nobody reach its memory, pulls time out; they succeed as soon as it goes on."""
    monkeypatch.setenv(private_memory.VARIABLE, private_memory.DATA_SERVER)
    deployment = deploy("mha", sync_kv_timeout=200)
    (decoder,), prefill = deployment.decoders, deployment.prefills[0]
    decoder.call(pull, [(deployment.ports[0], [0], [0])])
    prefill.stop()
    call = decoder.start(pull, [(deployment.ports[0], [1, 2], [2, 1])])
    wait_for_event(decoder, event)
    prefill.cont()
    found = call.result()
    assert found.count("LLM_TIMEOUT") == (3 if event == "link anew" else found.count("LLM_TIMEOUT"))
    assert decoder.call(wrong_blocks, {0: (1, 0), 1: (1, 2), 2: (1, 1)}) == []
    deployment.stop()
