"""Local worker processes: start, end, and never outlive their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from llm_datadist.cluster.local import LocalGroup

DEADLINE_S = 10.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def state_of(pid: int) -> str:
    """Letter of the process state in /proc, or "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def add(connection: Connection, amount: int) -> None:
    while True:
        connection.send(connection.recv() + amount)


def wait_for_word(connection: Connection) -> None:
    connection.recv()


def tell_interrupts(connection: Connection) -> None:
    connection.send((signal.getsignal(signal.SIGINT) is signal.SIG_IGN, signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def spin(connection: Connection) -> None:
    connection.send(os.getpid())
    while True:
        pass


def ignore_terminate(connection: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send("deaf")
    connection.recv()


def clean_up(connection: Connection, path: str) -> None:
    try:
        connection.send("ready")
        connection.recv()
    finally:
        Path(path).write_text("cleaned up")


def fail(connection: Connection) -> None:
    raise ValueError("on purpose")


def test_worker_gets_arguments_and_talks() -> None:
    with LocalGroup() as group:
        worker = group.start("adder", add, 3)
        worker.connection.send(4)
        assert worker.connection.recv() == 7
        assert (worker.name, worker.exitcode) == ("adder", None)
        assert not worker.wait(0.0)
        assert group.workers == (worker,)
    assert worker.exitcode == 128 + signal.SIGTERM
    assert state_of(worker.pid) == ""


def test_worker_that_returns() -> None:
    with LocalGroup() as group:
        worker = group.start("waiter", wait_for_word)
        worker.connection.send("go")
        assert worker.wait(DEADLINE_S)
        assert worker.exitcode == 0
        with pytest.raises(EOFError):
            worker.connection.recv()


def test_worker_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with LocalGroup() as group:
        worker = group.start("failer", fail)
        assert worker.wait(DEADLINE_S)
        assert worker.exitcode == 1
    assert "ValueError: on purpose" in capfd.readouterr().err


def test_leaving_the_group_lets_workers_clean_up(tmp_path: Path) -> None:
    with LocalGroup() as group:
        worker = group.start("cleaner", clean_up, str(tmp_path / "file"))
        assert worker.connection.recv() == "ready"
    assert (tmp_path / "file").read_text() == "cleaned up"


@pytest.mark.parametrize("paused", [False, True])
def test_deaf_and_paused_workers_are_killed_in_time(paused: bool) -> None:
    with LocalGroup(stop_timeout_s=0.2) as group:
        worker = group.start("deaf", ignore_terminate)
        assert worker.connection.recv() == "deaf"
        if paused:
            worker.pause()
        began = time.monotonic()
    assert worker.exitcode == -signal.SIGKILL
    assert time.monotonic() - began < 3.0


def test_kill() -> None:
    with LocalGroup() as group:
        worker = group.start("spinner", spin)
        assert worker.connection.recv() == worker.pid
        worker.kill()
        assert worker.wait(DEADLINE_S)
        assert worker.exitcode == -signal.SIGKILL
        worker.kill()  # of a process that is gone: nothing happens
        worker.pause()
        worker.resume()


def test_pause_and_resume() -> None:
    with LocalGroup() as group:
        worker = group.start("adder", add, 1)
        worker.connection.send(1)
        assert worker.connection.recv() == 2
        worker.pause()
        assert state_of(worker.pid) == "T"
        worker.connection.send(2)
        assert not worker.connection.poll(0.05)
        worker.resume()
        assert worker.connection.recv() == 3


def test_workers_do_not_see_ctrl_c() -> None:
    with LocalGroup() as group:
        worker = group.start("interrupted", tell_interrupts)
        assert worker.connection.recv() == (True, set())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_names_are_unique() -> None:
    with LocalGroup() as group:
        group.start("twin", wait_for_word)
        with pytest.raises(ValueError, match="'twin' already"):
            group.start("twin", wait_for_word)


def test_group_must_be_entered() -> None:
    group = LocalGroup()
    with pytest.raises(RuntimeError, match="inside the 'with' block"):
        group.start("early", wait_for_word)
    with group:
        pass
    with pytest.raises(RuntimeError, match="inside the 'with' block"):
        group.start("late", wait_for_word)


def test_arguments_that_cannot_be_pickled() -> None:
    with LocalGroup() as group:
        with pytest.raises(Exception, match="pickle"):
            group.start("unpicklable", add, lambda: None)
        assert group.workers == ()


def own_a_spinner() -> None:
    """Body of the program that the next test kills."""
    with LocalGroup() as group:
        print(group.start("spinner", spin).connection.recv(), flush=True)
        sys.stdin.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_a_killed_owner(number: signal.Signals) -> None:
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import own_a_spinner; own_a_spinner()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            pid = int(owner.stdout.readline())
            assert state_of(pid) in ("R", "S")
            owner.send_signal(number)
            assert owner.wait(DEADLINE_S) == -number
        finally:
            owner.kill()
    # "Z": dead, and adopted by an init process that does not look after its children
    wait_until(lambda: state_of(pid) in ("", "Z"), f"worker {pid} outlives its owner")
