"""Processes that link when they need each other and link anew after errors: peers are killed and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("torch")

from llm_datadist import LLMRole
from tests.clients.kv_tensors import Origin, mha
from tests.clients.on_demand_connector import OnDemandConnector
from tests.processes import Call, Member

# What becomes of a link between devices when a process dies is looked at in tests/faults: starting torch takes long.
ON_HOST = pytest.mark.parametrize("device", ["host"], indirect=True)

BLOCKS = 32
PROMPT, DECODER = 1, 2

State = dict[str, Any]
Pull = tuple[int, int, list[int], list[int]]  # cluster id, port, remote blocks, local blocks
Start = Callable[..., tuple[Member, Call]]


def open_connector(state: State, role: LLMRole, cluster_id: int, seed: int | None, port: int | None) -> None:
    (cache,) = mha(3, BLOCKS)
    if seed is not None:
        cache.fill(seed)
    state["connector"] = OnDemandConnector(role, cluster_id, cache, port)


def pull(state: State, pulls: Sequence[Pull]) -> list[str]:
    """Make all pulls at the same time; gives what failed on the way."""
    connector: OnDemandConnector = state["connector"]
    connector.events.clear()
    with ThreadPoolExecutor(len(pulls)) as threads:
        for done in [threads.submit(connector.pull, *one) for one in pulls]:
            done.result()
    return connector.events


def wrong_blocks(state: State, expected: dict[int, Origin]) -> list[tuple[int, int]]:
    return state["connector"].cache.wrong_blocks(expected)


def close(state: State) -> None:
    state["connector"].close()


@pytest.fixture
def start(members: Callable[[str], Member]) -> Start:
    """Start a process with a connector; gives it, and the call that opens the connector."""
    count = 0

    def start_one(cluster_id: int, seed: int | None, port: int | None = None) -> tuple[Member, Call]:
        nonlocal count
        count += 1
        member = members(f"process {count}, cluster {cluster_id}")
        role = LLMRole.PROMPT if cluster_id == PROMPT else LLMRole.DECODER
        return member, member.start(open_connector, role, cluster_id, seed, port)

    return start_one


def pulls_of(cluster_id: int, port: int, count: int, shift: int) -> tuple[list[Pull], dict[int, int]]:
    """Pulls of three blocks each, and which block comes from which."""
    pulls, origins = [], {}
    for index in range(count):
        local = [3 * index + number for number in range(3)]
        remote = [(block * 7 + shift) % BLOCKS for block in local]
        pulls.append((cluster_id, port, remote, local))
        origins.update(zip(local, remote))
    return pulls, origins


def assert_pulls(member: Member, pulls: list[Pull], origins: dict[int, int], seed: int) -> list[str]:
    found = member.call(pull, pulls)
    assert member.call(wrong_blocks, {block: (seed, origin) for block, origin in origins.items()}) == []
    return list(found)


def test_the_first_request_links(start: Start, free_port: Callable[[], int]) -> None:
    """Eight threads make the first request at the same moment."""
    port = free_port()
    (prompt, opened), (decoder, also_opened) = start(PROMPT, 1, port), start(DECODER, None)
    opened.result()
    also_opened.result()
    pulls, origins = pulls_of(PROMPT, port, 8, shift=5)
    found = assert_pulls(decoder, pulls, origins, seed=1)
    assert set(found) <= {"LLM_PROCESSING_LINK"}
    pulls, origins = pulls_of(PROMPT, port, 8, shift=9)
    assert assert_pulls(decoder, pulls, origins, seed=1) == []
    decoder.call(close)
    prompt.call(close)


@ON_HOST
def test_the_remote_is_killed_and_comes_back(start: Start, free_port: Callable[[], int]) -> None:
    """Requests that arrive while it is away wait for it; it has the same port, and other contents."""
    port = free_port()
    (prompt, opened), (decoder, also_opened) = start(PROMPT, 1, port), start(DECODER, None)
    opened.result()
    also_opened.result()
    pulls, origins = pulls_of(PROMPT, port, 4, shift=1)
    assert_pulls(decoder, pulls, origins, seed=1)
    for seed in (2, 3):
        prompt.kill()
        call = decoder.start(pull, pulls)
        prompt, opened = start(PROMPT, seed, port)
        opened.result()
        assert "unlink LLM_SUCCESS" in call.result()
        assert decoder.call(wrong_blocks, {block: (seed, origin) for block, origin in origins.items()}) == []
    decoder.call(close)
    prompt.call(close)


@ON_HOST
def test_the_one_that_pulls_is_killed_and_comes_back(start: Start, free_port: Callable[[], int]) -> None:
    """It has the same cluster id, while the prompt may still hold its old link; and the prompt pulls from it too."""
    ports = free_port(), free_port()
    (prompt, opened), (decoder, also_opened) = start(PROMPT, 1, ports[0]), start(DECODER, 5, ports[1])
    opened.result()
    also_opened.result()
    back, back_origins = pulls_of(DECODER, ports[1], 4, shift=2)
    prompt.call(pull, back)
    content = {block: (5, back_origins[block]) if block in back_origins else (1, block) for block in range(BLOCKS)}
    assert prompt.call(wrong_blocks, content) == []
    decoder.kill()
    decoder, opened = start(DECODER, None, ports[1])
    opened.result()
    pulls, origins = pulls_of(PROMPT, ports[0], 4, shift=8)
    decoder.call(pull, pulls)
    assert decoder.call(wrong_blocks, {block: content[origin] for block, origin in origins.items()}) == []
    decoder.call(close)
    prompt.call(close)
