"""The linked pair of processes that most tests in here start with, over each transport."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import forkserver

import pytest

from tests.pair import Pair, start_pair
from tests.processes import Member


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Have the process that forks others running before a test looks at what it leaves behind; it stays to the end."""
    forkserver.ensure_running()


@pytest.fixture(params=["shared_memory", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What links use, in all processes that the test starts."""
    monkeypatch.setenv("LLM_DATADIST_TRANSPORT", request.param)
    return str(request.param)


@pytest.fixture
def pair(transport: str, members: Callable[[str], Member], free_port: Callable[[], int]) -> Pair:
    """A prompt (cluster 1) and a decoder (cluster 2) that is linked to it, with the default timeout."""
    return start_pair(members, free_port(), transport)
