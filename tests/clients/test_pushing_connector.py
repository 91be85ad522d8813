"""A prompt pushes the blocks of many requests at the same time into two decoders."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.clients.kv_tensors import Origin, mha
from tests.clients.pushing_connector import THREADS, PushedInto, PushingConnector, Request
from tests.processes import Member

LAYERS = 6
BLOCKS_OF_REQUEST, REQUESTS = 5, 3 * THREADS
REMOTE_BLOCKS = BLOCKS_OF_REQUEST * REQUESTS // 2
PROMPT, DECODERS = 1, (2, 3)

State = dict[str, Any]


def open_prompt(state: State) -> None:
    (cache,) = mha(LAYERS, BLOCKS_OF_REQUEST * REQUESTS)
    state["connector"] = PushingConnector(PROMPT, cache)


def open_decoder(state: State, cluster_id: int, port: int) -> None:
    (cache,) = mha(LAYERS, BLOCKS_OF_REQUEST * REQUESTS)
    state["connector"] = PushedInto(cluster_id, cache, port)


def serve(state: State, requests: list[Request], way: str) -> None:
    state["connector"].serve(requests, getattr(PushingConnector, way))


def wrong_blocks(state: State, expected: dict[int, Origin]) -> list[tuple[int, int]]:
    return state["connector"].cache.wrong_blocks(expected)


def close(state: State) -> None:
    state["connector"].close()


@pytest.mark.parametrize("way", ["push_each_layer", "transfer_all_layers"])
def test_a_prompt_pushes_into_decoders(crew: list[Member], free_port: Callable[[], int], way: str) -> None:
    choice = random.Random(way)
    prompt, decoders = crew[0], dict(zip(DECODERS, crew[1:]))
    ports = {number: free_port() for number in DECODERS}
    opened = [decoders[number].start(open_decoder, number, port) for number, port in ports.items()]
    prompt.call(open_prompt)
    for call in opened:
        call.result()
    local = choice.sample(range(BLOCKS_OF_REQUEST * REQUESTS), BLOCKS_OF_REQUEST * REQUESTS)
    remote = {number: choice.sample(range(BLOCKS_OF_REQUEST * REQUESTS), REMOTE_BLOCKS) for number in DECODERS}
    requests, expected = [], {number: {} for number in DECODERS}
    for index in range(REQUESTS):
        number = DECODERS[index % 2]
        mine = [local.pop() for _ in range(BLOCKS_OF_REQUEST)]
        theirs = [remote[number].pop() for _ in range(BLOCKS_OF_REQUEST)]
        requests.append(Request(100 + index, number, ports[number], theirs, mine))
        expected[number].update({to: (100 + index, block) for block, to in zip(mine, theirs)})
    prompt.call(serve, requests, way)
    for number, decoder in decoders.items():
        assert decoder.call(wrong_blocks, expected[number]) == []
    for process in (prompt, *decoders.values()):
        process.call(close)
