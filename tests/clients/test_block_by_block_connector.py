"""Two stages of a decoder pull their layers from one prompt, one block of one tensor with each call."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("torch")

from llm_datadist import LLMRole
from llm_datadist.transports import private_memory
from tests.clients.block_by_block_connector import BlockByBlockConnector
from tests.clients.kv_tensors import Origin, one_for_each_layer
from tests.processes import Member

BLOCKS, TENSORS = 48, 12
STAGES = {11: range(5), 12: range(5, TENSORS)}  # tensors of the prompt, by cluster id
PROMPT, SEED = 10, 4

State = dict[str, Any]


def reach_memory(state: State, way: str) -> None:
    os.environ[private_memory.VARIABLE] = way


def open_connector(
    state: State, role: LLMRole, cluster_id: int, tensors: range, seed: int | None = None, port: int | None = None
) -> None:
    cache = one_for_each_layer(len(tensors), BLOCKS)
    if seed is not None:
        cache.fill(seed)
    state["connector"] = BlockByBlockConnector(role, cluster_id, cache, tensors.start, port)


def link_and_pull(state: State, port: int, tables: Sequence[tuple[list[int], list[int]]]) -> int:
    connector: BlockByBlockConnector = state["connector"]
    connector.link(PROMPT, port)
    return sum(connector.pull(PROMPT, *table) for table in tables)


def wrong_blocks(state: State, expected: dict[int, Origin]) -> list[tuple[int, int]]:
    connector: BlockByBlockConnector = state["connector"]
    return connector.cache.wrong_blocks(expected, connector.first)


def close(state: State) -> None:
    state["connector"].close()


@pytest.mark.parametrize("way", [private_memory.PROCESS_VM, private_memory.DATA_SERVER])
def test_stages_pull_their_layers(device: str, crew: list[Member], free_port: Callable[[], int], way: str) -> None:
    if device != "host" and way == private_memory.PROCESS_VM:
        pytest.skip("nothing of a device's memory goes that way")
    port, choice = free_port(), random.Random(way)
    prompt, stages = crew[0], dict(zip(STAGES, crew[1:]))
    for process in (prompt, *stages.values()):
        process.call(reach_memory, way)
    opened = [prompt.start(open_connector, LLMRole.PROMPT, PROMPT, range(TENSORS), SEED, port)]
    opened += [stages[number].start(open_connector, LLMRole.DECODER, number, held) for number, held in STAGES.items()]
    for call in opened:
        call.result()
    remote, local = choice.sample(range(BLOCKS), 40), choice.sample(range(BLOCKS), 40)
    tables = [(remote[at : at + 8], local[at : at + 8]) for at in range(0, 40, 8)]  # five requests
    calls = {number: stages[number].start(link_and_pull, port, tables) for number in STAGES}
    for number, call in calls.items():
        assert call.result() == 40 * len(STAGES[number])
        expected = {to: (SEED, block) for block, to in zip(remote, local)}
        assert stages[number].call(wrong_blocks, expected) == []
    for process in (*stages.values(), prompt):
        process.call(close)
