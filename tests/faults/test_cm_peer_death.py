"""In cache-manager mode: a process is killed or stopped while it is linked or while links are made."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import pytest

from llm_datadist import LLMException, LLMStatusCode
from tests import peer_engine as peer
from tests.many_engines import HOST, address_of
from tests.peer_engine import BROKEN, LINKED, assert_pulls, make_engine, wait_for_links
from tests.processes import Member

Members = Callable[[str], Member]
FreePort = Callable[[], int]
Code = LLMStatusCode

OK = Code.LLM_SUCCESS
GOOD = (OK, [OK])
A, B = 1, 2  # cluster ids
LITTLE = 1.0  # seconds that a call may take beyond its deadline on a busy machine


def answer(code: Code) -> tuple[Code, list[Code]]:
    return code, [code]


class Linked:
    """Two processes that listen; the first one has linked to the second."""

    def __init__(self, members: Members, free_port: FreePort) -> None:
        self._members = members
        self.ports = {A: free_port(), B: free_port()}
        self.processes = {number: self.start(number) for number in (A, B)}
        assert self.link(A) == GOOD

    def start(self, number: int) -> Member:
        process = self._members(f"process {number} of {time.monotonic_ns()}")
        process.call(peer.open_peer, number, self.ports[number])
        return process

    def restart(self, number: int) -> None:
        self.processes[number] = self.start(number)

    def link(self, number: int, **options: int) -> object:
        return self.processes[number].call(peer.link, self.target_of(number), **options)

    def unlink(self, number: int, **options: int) -> object:
        return self.processes[number].call(peer.unlink, self.target_of(number), **options)

    def target_of(self, number: int) -> tuple[int, int]:
        return A + B - number, self.ports[A + B - number]

    def wait_for(self, number: int, state: str) -> None:
        wait_for_links(self.processes[number], [(A + B - number, state)])

    def assert_whole(self) -> None:
        a, b = self.processes[A], self.processes[B]
        assert a.call(peer.links) == [(B, LINKED)]
        assert b.call(peer.links) == [(A, LINKED)]
        assert_pulls(a, b, B, 1)
        assert_pulls(b, a, A, 2)


@pytest.fixture
def linked(members: Members, free_port: FreePort) -> Linked:
    return Linked(members, free_port)


BOTH = pytest.mark.parametrize("victim", [A, B])


@BOTH
def test_a_killed_process_breaks_the_link(victim: int, linked: Linked) -> None:
    survivor = A + B - victim
    linked.processes[victim].kill()
    linked.wait_for(survivor, BROKEN)
    started = time.monotonic()
    with pytest.raises(LLMException):
        linked.processes[survivor].call(peer.pull, victim, 1)
    assert linked.unlink(survivor) == answer(Code.LLM_UNLINK_FAILED)
    assert time.monotonic() - started < LITTLE, "the kernel has told, nobody is asked"
    assert linked.processes[survivor].call(peer.links) == []
    assert linked.unlink(survivor) == GOOD


@BOTH
@pytest.mark.parametrize("linking", [A, B])
def test_a_process_that_comes_back_replaces_the_link(victim: int, linking: int, linked: Linked) -> None:
    """Whoever links: the one that came back, or the one that still has the broken link."""
    linked.processes[victim].kill()
    linked.restart(victim)
    linked.wait_for(A + B - victim, BROKEN)
    assert linked.link(linking) == GOOD
    linked.assert_whole()


@BOTH
def test_a_stopped_process_costs_others_their_timeout(victim: int, linked: Linked) -> None:
    survivor = A + B - victim
    linked.processes[victim].stop()
    started = time.monotonic()
    assert linked.unlink(survivor, timeout_ms=300) == answer(Code.LLM_TIMEOUT)
    assert linked.processes[survivor].call(peer.links) == []
    assert linked.link(survivor, timeout_ms=300) == answer(Code.LLM_TIMEOUT)
    assert 0.5 < time.monotonic() - started < 0.6 + 2 * LITTLE
    linked.processes[victim].cont()
    assert linked.link(survivor) == GOOD
    linked.assert_whole()


@BOTH
def test_a_forced_unlink_does_not_wait_for_a_stopped_process(victim: int, linked: Linked) -> None:
    survivor = A + B - victim
    linked.processes[victim].stop()
    started = time.monotonic()
    assert linked.unlink(survivor, force=True) == GOOD
    assert time.monotonic() - started < LITTLE
    linked.processes[victim].cont()
    linked.wait_for(victim, BROKEN)
    assert linked.link(victim) == GOOD
    linked.assert_whole()


@BOTH
def test_pulls_do_not_need_the_other_process(victim: int, linked: Linked) -> None:
    linked.processes[victim].call(peer.offer, 1, 7)
    linked.processes[victim].stop()
    assert linked.processes[A + B - victim].call(peer.pull, victim, 1) == bytes([7]) * peer.TENSOR_BYTES
    linked.processes[victim].cont()


def test_a_process_is_killed_while_both_link_each_other(linked: Linked) -> None:
    for turn in range(6):
        assert linked.unlink(A) in (GOOD, answer(Code.LLM_UNLINK_FAILED))
        victim = A if turn % 2 else B
        survivor = A + B - victim
        started = time.monotonic()
        calls = {
            number: linked.processes[number].start(peer.link, linked.target_of(number), timeout_ms=1000)
            for number in (A, B)
        }
        if turn >= 3:
            calls[survivor].done()  # a round trip later
        linked.processes[victim].kill()
        overall, _ = calls[survivor].result()
        assert time.monotonic() - started < 1 + LITTLE + 1
        assert overall in (OK, Code.LLM_ALREADY_LINK, Code.LLM_LINK_FAILED, Code.LLM_TIMEOUT)
        linked.restart(victim)
        deadline = time.monotonic() + 5
        while (again := linked.link(survivor)) != GOOD:  # until the kernel has told of the death
            assert again == answer(Code.LLM_ALREADY_LINK)
            assert time.monotonic() < deadline
        linked.assert_whole()


def test_finalize_ends_a_link_call() -> None:
    with socket.create_server((HOST, 0)) as silent, contextlib.closing(make_engine(A, link_retry_count=5)) as engine:
        results: list[object] = []
        cluster = address_of(B, silent.getsockname()[1])
        thread = threading.Thread(target=lambda: results.append(engine.link([cluster], 60_000)))
        thread.start()
        silent.accept()[0].close()  # the call is on its way
        engine.close()
        thread.join(5)
        assert not thread.is_alive()
        assert results == [answer(Code.LLM_LINK_FAILED)]


def test_finalize_ends_an_unlink_call(members: Members, free_port: FreePort) -> None:
    """The peer is stopped, so that the call waits for its answer."""
    other, port = members("other"), free_port()
    other.call(peer.open_peer, B, port)
    with contextlib.closing(make_engine(A)) as engine:
        assert engine.link([address_of(B, port)], 5000) == GOOD
        other.stop()
        endings: list[object] = []

        def unlink() -> None:
            try:
                endings.append(engine.unlink([address_of(B, port)], 60_000, False))
            except LLMException as error:
                endings.append(error.status_code)

        thread = threading.Thread(target=unlink)
        thread.start()
        deadline = time.monotonic() + 5
        while [link.state for link in engine.describe_links()] != ["UNLINKING"]:
            assert time.monotonic() < deadline
        engine.close()
        thread.join(10)
        assert not thread.is_alive()
        assert endings in ([answer(Code.LLM_UNLINK_FAILED)], [Code.LLM_FAILED])
        other.cont()
        wait_for_links(other, [])
