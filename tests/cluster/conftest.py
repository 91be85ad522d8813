"""A registry for every test that wants one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember, RegistryClient
from tests.cluster.registry_process import RegistryProcess

Announce = Callable[..., ClusterMember]


@pytest.fixture
def registry(request: pytest.FixtureRequest) -> Iterator[RegistryProcess]:
    process = RegistryProcess(*getattr(request, "param", ()))
    try:
        process.start()
        yield process
    finally:
        process.close()


@pytest.fixture
def client(registry: RegistryProcess) -> Iterator[RegistryClient]:
    with RegistryClient(registry.address) as client:
        yield client


@pytest.fixture
def announce(registry: RegistryProcess) -> Iterator[Announce]:
    """Announce members without an instance, in this process; they leave with the test."""
    with ExitStack() as opened:

        def one(cluster_id: int, role: LLMRole = LLMRole.PROMPT, state: str = "ready", **options: Any) -> ClusterMember:
            member = opened.enter_context(ClusterMember(None, registry.address, cluster_id, role=role, **options))
            member.announce(state)
            return member

        yield one


@pytest.fixture
def driver(registry: RegistryProcess) -> Iterator[ClusterMember]:
    """A process that only looks: this one."""
    with ClusterMember(None, registry.address) as member:
        yield member
