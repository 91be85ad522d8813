"""The processes of the tests themselves: calls, errors and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from llm_datadist import LLMException, LLMStatusCode
from tests.processes import Member, MemberDied, RemoteTraceback


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def store(state: dict, name: str, value: object) -> None:
    state[name] = value


def load(state: dict, name: str) -> object:
    return state[name]


def pid_of(state: dict) -> int:
    return os.getpid()


def fail(state: dict) -> None:
    raise LLMException("no such key", status_code=LLMStatusCode.LLM_KV_CACHE_NOT_EXIST)


def fail_unpicklably(state: dict) -> None:
    raise Unpicklable("first", "second")


def wait_for_event(state: dict) -> str:
    state["event"] = threading.Event()
    assert state["event"].wait(20)
    return "woken"


def set_event(state: dict) -> bool:
    if "event" in state:
        state["event"].set()
    return "event" in state


def exit_now(state: dict) -> None:
    os._exit(7)


def test_state_stays(members: Callable[[str], Member]) -> None:
    member = members("one")
    member.call(store, "x", value=[1, 2])
    assert member.call(load, "x") == [1, 2]
    assert member.call(pid_of) == member.pid != os.getpid()


def test_errors_come_back_whole(members: Callable[[str], Member]) -> None:
    member = members("one")
    with pytest.raises(LLMException, match="no such key") as raised:
        member.call(fail)
    assert raised.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert "in fail\n" in str(raised.value.__cause__)
    with pytest.raises(KeyError, match="absent"):
        member.call(load, "absent")
    with pytest.raises(RuntimeError, match="Unpicklable: first"):
        member.call(fail_unpicklably)


def test_calls_run_side_by_side(members: Callable[[str], Member]) -> None:
    member = members("one")
    waiting = member.start(wait_for_event)
    deadline = time.monotonic() + 10
    while not member.call(set_event):
        assert time.monotonic() < deadline
    assert waiting.result() == "woken"
    assert waiting.done()


def test_timeout(members: Callable[[str], Member]) -> None:
    member = members("one")
    with pytest.raises(TimeoutError, match="wait_for_event in one"):
        member.call(wait_for_event, timeout=0.05)


def test_member_that_dies(members: Callable[[str], Member]) -> None:
    member = members("one")
    with pytest.raises(MemberDied, match="one ended with exit status 7"):
        member.call(exit_now)


def test_kill(members: Callable[[str], Member]) -> None:
    member = members("one")
    call = member.start(wait_for_event)
    member.kill()
    assert member.exitcode == -signal.SIGKILL
    with pytest.raises(MemberDied):
        call.result()


def test_stop_and_cont(members: Callable[[str], Member]) -> None:
    member = members("one")
    assert member.call(pid_of) == member.pid
    member.stop()
    call = member.start(pid_of)
    with pytest.raises(TimeoutError):
        call.result(0.05)
    member.cont()
    assert call.result() == member.pid


def test_leave(members: Callable[[str], Member]) -> None:
    member = members("one")
    member.leave()
    assert member.exitcode == 0
