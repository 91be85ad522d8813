"""Processes that serve several tests: torch takes longer to load than most tests take to run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm_datadist.cluster.local import LocalGroup
from tests.processes import Member


@pytest.fixture(scope="module")
def crew() -> Iterator[list[Member]]:
    """Four processes that live as long as the tests of a module; a test ends what it has started in them."""
    with LocalGroup() as group:
        yield [Member(group, f"process {number}") for number in range(4)]
