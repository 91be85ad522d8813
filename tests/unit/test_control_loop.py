"""The control thread: calls, timers, sockets, and an end without leftovers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from llm_datadist.control.client import NoAnswer, Unreachable, request
from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import MessageError, Probe, ProbeAnswer, decode, encode

PROBE = Probe(1, b"t" * 16)


@pytest.fixture
def loop() -> Iterator[ControlLoop]:
    loop = ControlLoop()
    yield loop
    loop.stop()


def in_seconds(seconds: float) -> float:
    return time.monotonic() + seconds


def test_calls_run_in_one_thread_in_order(loop: ControlLoop) -> None:
    seen: list[tuple[int, str]] = []
    done = threading.Event()
    loop.start()
    for number in range(100):
        loop.call(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    loop.call(done.set)
    assert done.wait(5)
    assert seen == [(number, "llm_datadist-control") for number in range(100)]


def test_a_handler_that_raises_does_not_end_the_loop(loop: ControlLoop) -> None:
    done = threading.Event()
    loop.start()
    loop.call(lambda: 1 // 0)
    loop.call(done.set)
    assert done.wait(5)


def test_timers_run_in_the_order_of_their_times(loop: ControlLoop) -> None:
    order: list[int] = []
    done = threading.Event()
    start = time.monotonic()
    for delay in (3, 1, 2):
        loop.call(lambda delay=delay: loop.at(start + delay / 50, lambda: order.append(delay)))  # type: ignore[misc]
    loop.call(lambda: loop.at(start + 0.1, done.set))
    loop.start()
    assert done.wait(5)
    assert order == [1, 2, 3]
    assert time.monotonic() - start >= 0.1


def test_a_watched_socket_tells_of_its_end(loop: ControlLoop) -> None:
    mine, other = socket.socketpair()
    mine.setblocking(False)
    closed = threading.Event()

    def on_readable() -> None:
        if mine.recv(16) == b"":
            loop.unwatch(mine)
            closed.set()

    loop.start()
    loop.call(lambda: loop.watch(mine, on_readable))
    other.send(b"x")
    other.close()
    assert closed.wait(5)
    mine.close()


def test_questions_are_answered(loop: ControlLoop, free_port: object) -> None:
    port = free_port()  # type: ignore[operator]
    loop.listen("127.0.0.1", port, lambda peer, data: loop.reply(peer, encode(ProbeAnswer(decode(data) == PROBE))))
    for _ in range(3):
        assert request(loop.context, "127.0.0.1", port, PROBE, in_seconds(5)) == ProbeAnswer(True)


def test_a_question_ends_at_its_deadline(loop: ControlLoop, free_port: object) -> None:
    port = free_port()  # type: ignore[operator]
    loop.listen("127.0.0.1", port, lambda peer, data: None)
    started = time.monotonic()
    with pytest.raises(NoAnswer):
        request(loop.context, "127.0.0.1", port, PROBE, in_seconds(0.1))
    assert 0.1 <= time.monotonic() - started < 1
    with pytest.raises(NoAnswer):
        request(loop.context, "127.0.0.1", port, PROBE, in_seconds(-1))


def test_a_question_to_nobody_fails_at_once(loop: ControlLoop, free_port: object) -> None:
    started = time.monotonic()
    with pytest.raises(Unreachable, match="Connection refused"):
        request(loop.context, "127.0.0.1", free_port(), PROBE, in_seconds(30))  # type: ignore[operator]
    assert time.monotonic() - started < 5


def test_an_answer_that_is_no_message(loop: ControlLoop, free_port: object) -> None:
    port = free_port()  # type: ignore[operator]
    loop.listen("127.0.0.1", port, lambda peer, data: loop.reply(peer, b"noise"))
    with pytest.raises(MessageError):
        request(loop.context, "127.0.0.1", port, PROBE, in_seconds(5))


def test_the_port_is_free_after_stop(free_port: object) -> None:
    port = free_port()  # type: ignore[operator]
    for _ in range(10):
        loop = ControlLoop()
        loop.listen("127.0.0.1", port, lambda peer, data: None)
        other = ControlLoop()
        with pytest.raises(zmq.ZMQError):
            other.listen("127.0.0.1", port, lambda peer, data: None)
        other.stop()
        loop.stop()
        loop.stop()


def test_a_loop_that_never_ran_leaves_nothing() -> None:
    ControlLoop().stop()


def test_a_question_ends_when_its_process_finalizes(loop: ControlLoop, free_port: object) -> None:
    port = free_port()  # type: ignore[operator]
    asked = threading.Event()
    loop.listen("127.0.0.1", port, lambda peer, data: asked.set())
    endings: list[BaseException] = []

    def ask() -> None:
        try:
            request(loop.context, "127.0.0.1", port, PROBE, in_seconds(30))
        except Unreachable as error:
            endings.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(5)
    loop.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert "cannot ask" in str(endings[0])
