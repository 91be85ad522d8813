"""Fixtures of the simulator's tests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import forkserver

import pytest

from tests.ascend_simulator import build
from tests.ascend_simulator.programs import SANITIZE, Program


@pytest.fixture(scope="session", autouse=True)
def ready() -> None:
    """The library is built and the server that forks programs runs, before a test counts what it leaves behind."""
    build.library("", SANITIZE)
    forkserver.ensure_running()


@pytest.fixture
def world() -> str:
    """A simulated server of this test alone."""
    return f"{os.getpid()}.{uuid.uuid4().hex[:12]}"


@pytest.fixture
def program(world: str) -> Iterator[Callable[..., Program]]:
    """Starts programs on the test's server; see `Program` for the arguments. They end with the test."""
    programs: list[Program] = []

    def start(**options: object) -> Program:
        programs.append(Program(world, **options))
        return programs[-1]

    yield start
    for each in programs:
        each.close()
