"""Fixtures of the unit tests."""

from __future__ import annotations

from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Have the process that forks others running before a test looks at what it leaves behind; it stays to the end."""
    forkserver.ensure_running()
