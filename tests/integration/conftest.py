"""What tests in here start with: a linked pair of processes, or an instance in the test's own process."""

from __future__ import annotations

from multiprocessing import forkserver

import pytest

from tests.own_instance import decoder, open_datadist, prompt
from tests.pair import pair

__all__ = ["decoder", "open_datadist", "pair", "prompt"]


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Have the process that forks others running before a test looks at what it leaves behind; it stays to the end."""
    forkserver.ensure_running()
