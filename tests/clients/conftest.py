"""Processes that serve several tests: torch takes longer to load than most tests take to run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist.engine.device_choice import VARIABLE
from tests.processes import Member
from tests.simulated_devices import HOST_VISIBLE, DeviceMembers
from tests.warm_group import process_group

State = dict[str, Any]


@pytest.fixture(params=["host", "simulator"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the processes of a test have their tensors."""
    return str(request.param)


@pytest.fixture(scope="module")
def all_hands() -> Iterator[list[Member]]:
    with process_group() as group:
        start = DeviceMembers(group, 0, HOST_VISIBLE)
        yield [start(f"process {number}") for number in range(4)]


@pytest.fixture
def crew(all_hands: list[Member], device: str) -> list[Member]:
    """Four processes that live as long as the tests of a module; a test ends what it has started in them."""
    for member in all_hands:
        member.call(use, device)
    return all_hands


def use(state: State, device: str) -> None:
    state.clear()
    os.environ[VARIABLE] = device


@pytest.fixture
def members(device: str) -> Iterator[DeviceMembers]:
    """Start processes by name; they end with the test."""
    with process_group() as group:
        yield DeviceMembers(group, 0, {VARIABLE: device, **HOST_VISIBLE})
