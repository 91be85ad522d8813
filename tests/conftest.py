"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import pytest

from tests.free_ports import free_ports
from tests.leaks import resources
from tests.member_ports import reserved_ports
from tests.processes import Member
from tests.warm_group import process_group, process_server

pytest_plugins = ["tests.hang_guard"]

# A runner in the background may have been started with Ctrl-C or a hang-up ignored, and so would be the programs that
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests on a device say so. Else the simulator, once a test has loaded it, would be found by those of the host.
os.environ["LLM_DATADIST_DEVICE"] = "host"

LATE_CLOSE_S = 5.0  # for threads and peers that are on their way out when the test ends
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, thread, descriptor or shared memory behind."""
    resource_tracker.ensure_running()  # multiprocessing's own child; it stays until the end of the run
    process_server()  # and so does this one
    before = resources()
    yield
    if request.node.stash.get(FAILED, False):
        return  # its traceback keeps objects alive, and what matters is why it failed
    deadline = time.monotonic() + LATE_CLOSE_S
    while left := resources() - before:
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + ", ".join(sorted(left)))
        gc.collect()
        time.sleep(0.01)


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """Give ports of 127.0.0.1 on which nobody listens, until the test ends."""
    with free_ports() as take:
        yield take


@pytest.fixture(scope="session", autouse=True)
def member_base_port() -> Iterator[int]:
    """Let members of communicators that meet over TCP count their ports from one that no other run uses."""
    with reserved_ports() as base:
        yield base


@pytest.fixture
def members() -> Iterator[Callable[[str], Member]]:
    """Start processes by name; they end with the test."""
    with process_group() as group:
        yield lambda name: Member(group, name)
