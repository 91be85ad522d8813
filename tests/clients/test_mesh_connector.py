"""Processes of role MIX: everybody listens, links to everybody and pulls from everybody, at the same time.

Four of them hold tensors. So that a call sets up as many links as it may, each of these links to a crowd besides:
engines that share a process, because what counts here is an engine.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

from llm_datadist import LLMRole
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from tests.clients.kv_tensors import Origin, one_for_each_layer
from tests.clients.mesh_connector import WINDOW, MeshConnector, Peer, Table
from tests.datadist_member import payload
from tests.many_engines import HOST
from tests.processes import Member

LAYERS, BLOCKS = 6, 64
OWN = range(BLOCKS // 2)  # blocks with contents; those of others go behind them
BLOCK_BYTES = 8 * 2 * 24
NODES = (1, 2, 3, 4)  # cluster ids, and the seeds of what is in their blocks
CROWD = range(10, 10 + WINDOW - len(NODES) + 1)
ROUNDS = 4

State = dict[str, Any]


def open_node(state: State, cluster_id: int, port: int) -> None:
    cache = one_for_each_layer(LAYERS, BLOCKS)
    for tensor in range(LAYERS):
        cache.fill_blocks(cluster_id, tensor, list(OWN))
    state["connector"] = MeshConnector(cluster_id, port, cache)


def connector_call(state: State, call: str, *args: Any) -> Any:
    return getattr(state["connector"], call)(*args)


def wrong_blocks(state: State, expected: dict[int, Origin]) -> list[tuple[int, int]]:
    return state["connector"].cache.wrong_blocks(expected)


def open_crowd(state: State, ports: dict[int, int]) -> None:
    """Open an engine for each cluster id, with a blocks cache like those of the nodes."""
    nbytes = BLOCKS * BLOCK_BYTES
    options = CacheManagerOptions(device_pool_bytes=1 << 19)
    state["crowd"] = crowd = contextlib.ExitStack()
    for cluster_id, port in ports.items():
        engine = Engine(EngineOptions(LLMRole.MIX, cluster_id, listen=((HOST, port),), cache_manager=options))
        crowd.callback(engine.close)
        cache_id, _ = engine.allocate(LAYERS, nbytes, BLOCKS, blocks_model=0)
        for tensor in range(LAYERS):
            engine.tensor_memory(cache_id, tensor)[0][:] = payload(cluster_id, tensor, nbytes).tobytes()


def close_crowd(state: State) -> None:
    state["crowd"].close()


class Mesh:
    """All processes, and what each of them is asked for at the same time."""

    def __init__(self, members: Callable[[str], Member], free_port: Callable[[], int]) -> None:
        self.ports = {cluster_id: free_port() for cluster_id in (*NODES, *CROWD)}
        self.nodes = {cluster_id: members(f"node {cluster_id}") for cluster_id in NODES}
        self.crowd = members("crowd")
        opening = [node.start(open_node, cluster_id, self.ports[cluster_id]) for cluster_id, node in self.nodes.items()]
        self.crowd.call(open_crowd, {cluster_id: self.ports[cluster_id] for cluster_id in CROWD})
        for call in opening:
            call.result()

    def others(self, cluster_id: int) -> list[Peer]:
        return [peer for peer in self.ports.items() if peer[0] != cluster_id]

    def all_at_once(self, call: str, arguments: dict[int, Any]) -> None:
        calls = [node.start(connector_call, call, arguments[cluster_id]) for cluster_id, node in self.nodes.items()]
        for started in calls:
            started.result()

    def close(self) -> None:
        for node in self.nodes.values():
            node.call(connector_call, "close")
        self.crowd.call(close_crowd)


def test_everybody_links_to_everybody_and_pulls(members: Callable[[str], Member], free_port: Callable[[], int]) -> None:
    choice = random.Random(16)
    mesh = Mesh(members, free_port)
    peers = {cluster_id: mesh.others(cluster_id) for cluster_id in NODES}
    assert {len(others) for others in peers.values()} == {WINDOW}
    for _ in range(ROUNDS):
        for others in peers.values():
            choice.shuffle(others)
        mesh.all_at_once("link", peers)
        tables: dict[int, list[Table]] = {}
        expected: dict[int, dict[int, Origin]] = {}
        for cluster_id, others in peers.items():
            free = [block for block in range(BLOCKS) if block not in OWN]
            choice.shuffle(free)
            tables[cluster_id] = [(number, choice.sample(OWN, 2), [free.pop(), free.pop()]) for number, _ in others]
            expected[cluster_id] = {block: (cluster_id, block) for block in OWN}
            for number, remote, local in tables[cluster_id]:
                expected[cluster_id].update({to: (number, block) for block, to in zip(remote, local)})
        mesh.all_at_once("pull", tables)
        for cluster_id, node in mesh.nodes.items():
            assert node.call(wrong_blocks, expected[cluster_id]) == []
        mesh.all_at_once("unlink", peers)
    mesh.close()
