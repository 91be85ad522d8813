"""Links over data connections: what is chosen, large and many transfers, checksums, ports."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.engine.link_table import LinkDescription
from llm_datadist.introspection import describe_links
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.expectations import LINKED
from tests.own_instance import Open
from tests.pair import DECODER, PROMPT, start_decoder, start_prompt
from tests.processes import Member

MIB = 1 << 20
OVER_TCP = {"llm.Transport": "tcp"}
SUMMED = {**OVER_TCP, "llm.DataChecksum": "crc32c"}

Members = Callable[[str], Member]
FreePort = Callable[[], int]
State = dict[str, Any]


def links_of(state: State) -> list[LinkDescription]:
    return describe_links(state["datadist"])


def start_pair(
    members: Members,
    free_port: FreePort,
    prompt_options: dict[str, str] = OVER_TCP,
    decoder_options: dict[str, str] = OVER_TCP,
) -> tuple[Member, Member, int]:
    port = free_port()
    prompt = start_prompt(members("prompt"), port, ge_options=prompt_options, sync_kv_timeout=10_000)
    decoder = start_decoder(members("decoder"), ge_options=decoder_options, sync_kv_timeout=10_000)
    return prompt, decoder, port


# ---- what is chosen


@pytest.mark.parametrize(
    ("prompt_options", "decoder_options", "transport", "reason"),
    [
        ({}, {}, "shared_memory", "same host"),
        ({}, OVER_TCP, "tcp", "settings of the client"),
        (OVER_TCP, {}, "tcp", "settings of the server"),
        ({"llm.Transport": "shared_memory"}, {}, "shared_memory", "same host"),
    ],
)
def test_which_transport_a_link_has(
    members: Members,
    free_port: FreePort,
    prompt_options: dict[str, str],
    decoder_options: dict[str, str],
    transport: str,
    reason: str,
) -> None:
    prompt, decoder, port = start_pair(members, free_port, prompt_options, decoder_options)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    for member in (prompt, decoder):
        (link,) = member.call(links_of)
        assert link.transport == transport
        assert reason in link.reason


def test_settings_that_exclude_each_other(members: Members, free_port: FreePort) -> None:
    _, decoder, port = start_pair(members, free_port, {"llm.Transport": "shared_memory"}, OVER_TCP)
    failed = LLMStatusCode.LLM_LINK_FAILED
    assert decoder.call(dd.link, PROMPT, port) == (failed, [failed])


def test_the_environment_says_what_the_options_do_not(
    open_datadist: Open, members: Members, free_port: FreePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    start_prompt(members("prompt"), port)
    monkeypatch.setenv("LLM_DATADIST_TRANSPORT", "tcp")
    decoder = open_datadist(LLMRole.DECODER, DECODER)
    assert decoder.link_clusters([dd.cluster_info(PROMPT, port)]) == LINKED
    assert describe_links(decoder)[0].transport == "tcp"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"llm.Transport": "udp"}, "llm.Transport is 'udp', should be one of auto, shared_memory, tcp"),
        ({"llm.DataChecksum": "md5"}, "llm.DataChecksum is 'md5', should be one of none, crc32c"),
        ({"llm.DataPorts": "0"}, "llm.DataPorts is '0', should be a port"),
        ({"llm.DataPorts": "7-6"}, "llm.DataPorts is '7-6'"),
        ({"llm.DataPorts": "7-x"}, "llm.DataPorts is '7-x'"),
        ({"llm.DataPorts": "1-70000"}, "llm.DataPorts is '1-70000'"),
    ],
)
def test_settings_that_cannot_be(open_datadist: Open, options: dict[str, str], text: str) -> None:
    with pytest.raises(LLMException, match=text) as raised:
        open_datadist(LLMRole.DECODER, ge_options=options)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


# ---- ports


def listening_ports() -> set[int]:
    """TCP ports that this process listens on."""
    with open("/proc/self/net/tcp", encoding="ascii") as table:
        lines = [line.split() for line in table.readlines()[1:]]
    own = own_sockets()
    return {int(fields[1].split(":")[1], 16) for fields in lines if fields[3] == "0A" and fields[9] in own}


def own_sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def test_a_range_of_data_ports(open_datadist: Open, free_port: FreePort) -> None:
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the fixture holds the port
    taken.bind(("127.0.0.1", free_port()))
    with taken:
        taken.listen()
        first = taken.getsockname()[1]
        prompt = open_datadist(LLMRole.PROMPT, ge_options={"llm.DataPorts": f"{first}-{min(first + 40, 65535)}"})
        assert any(first < port <= first + 40 for port in listening_ports())
    prompt.finalize()


def test_no_free_data_port(open_datadist: Open, free_port: FreePort) -> None:
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the fixture holds the port
    taken.bind(("127.0.0.1", free_port()))
    with taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LLMException, match=f"cannot accept data connections on 127.0.0.1, ports {port}") as raised:
            open_datadist(LLMRole.PROMPT, ge_options={"llm.DataPorts": str(port)})
        assert raised.value.status_code is LLMStatusCode.LLM_FAILED


@pytest.mark.parametrize(("transport", "ports"), [("shared_memory", 1), ("auto", 2), ("tcp", 2)])
def test_how_many_ports_are_open(open_datadist: Open, transport: str, ports: int) -> None:
    """That which links are accepted at, and that of data connections unless there can be none."""
    prompt = open_datadist(LLMRole.PROMPT, ge_options={"llm.Transport": transport})
    assert len(listening_ports()) == ports
    prompt.finalize()
    assert not listening_ports()


# ---- large and many transfers


@pytest.mark.parametrize("options", [OVER_TCP, SUMMED], ids=["plain", "summed"])
def test_large_transfers_in_both_directions(
    members: Members, open_datadist: Open, free_port: FreePort, options: dict[str, str]
) -> None:
    port = free_port()
    prompt = start_prompt(members("prompt"), port, ge_options=options, pool_bytes=300 * MIB, sync_kv_timeout=20_000)
    decoder = open_datadist(LLMRole.DECODER, DECODER, ge_options=options, pool_bytes=300 * MIB, sync_kv_timeout=20_000)
    assert decoder.link_clusters([dd.cluster_info(PROMPT, port)]) == LINKED
    manager = decoder.kv_cache_manager
    theirs = prompt.call(dd.allocate, 4, (2, 16 * MIB + 512), keys=[CacheKey(PROMPT, 1), CacheKey(PROMPT, 2)])
    prompt.call(dd.fill, theirs, 9)
    mine = manager.allocate_cache(CacheDesc(4, (2, 16 * MIB + 512), DataType.DT_UINT8))
    manager.pull_cache(CacheKey(PROMPT, 2), mine, 1)
    manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, theirs, 0), mine, 0, 5 * MIB + 3, src_cache_offset=7)
    for tensor in range(4):
        sent = dd.payload(9, tensor, 2 * (16 * MIB + 512)).reshape(2, -1)
        view = tensor_view(mine, tensor)
        assert np.array_equal(view[1], sent[1])
        assert np.array_equal(view[0][: 5 * MIB + 3], sent[0][7 : 5 * MIB + 10])
    with pytest.raises(LLMException):
        manager.pull_cache(CacheKey(PROMPT, 2), mine, 1)
    addresses = mine.per_device_tensor_addrs[0]
    prompt.call(push_layers, theirs, addresses)
    for tensor in range(4):
        sent = dd.payload(9, tensor, 2 * (16 * MIB + 512)).reshape(2, -1)
        assert np.array_equal(tensor_view(mine, tensor)[0], sent[0])


class NoWait(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def push_layers(state: State, cache_id: int, addresses: list[int]) -> None:
    """Push slot 0 of a cache layer by layer; a layer is two tensors."""
    cache = state["caches"][cache_id]
    manager = state["datadist"].kv_cache_manager
    task = manager.transfer_cache_async(cache, NoWait(), [TransferConfig(DECODER, addresses)])
    assert task.synchronize(20_000) is LLMStatusCode.LLM_SUCCESS


@pytest.mark.parametrize("options", [OVER_TCP, SUMMED], ids=["plain", "summed"])
@pytest.mark.parametrize("block", [512, 4096, 65_536, 300_000])
def test_blocks_in_any_order(members: Members, free_port: FreePort, options: dict[str, str], block: int) -> None:
    prompt, decoder, port = start_pair(members, free_port, options, options)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    blocks, key = 50 if block > 100_000 else 150, BlocksCacheKey(PROMPT, 3)
    theirs = prompt.call(dd.allocate_blocks, 3, (blocks, block), key=key)
    prompt.call(dd.fill, theirs, 4)
    mine = decoder.call(dd.allocate_blocks, 3, (blocks, block))
    expected = [np.zeros((blocks, block), np.uint8) for _ in range(3)]
    sent = [dd.payload(4, tensor, blocks * block).reshape(blocks, block) for tensor in range(3)]
    decoder.call(dd.clear, mine)
    choice = random.Random(block)
    for _ in range(12):
        count = choice.randint(1, blocks)
        source, target = choice.sample(range(blocks), count), choice.sample(range(blocks), count)
        if choice.random() < 0.5:  # long runs
            source.sort()
            target.sort()
        decoder.call(dd.pull_blocks, key, mine, source, target)
        for tensor in range(3):
            expected[tensor][target] = sent[tensor][source]
    for tensor in range(3):
        assert decoder.call(dd.read, mine, tensor) == expected[tensor].tobytes()


def pull_from_threads(state: State, key: BlocksCacheKey, cache_id: int, threads: int, rounds: int, blocks: int) -> None:
    """Each thread pulls its own block again and again; raises what any of them raised."""
    failures: list[BaseException] = []

    def pull(block: int) -> None:
        try:
            for _ in range(rounds):
                dd.pull_blocks(state, key, cache_id, [blocks - 1 - block], [block])
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=pull, args=(block,)) for block in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    if failures:
        raise failures[0]


def test_many_threads_pull_at_once(members: Members, free_port: FreePort) -> None:
    """More than there are connections: the others wait for their turn."""
    prompt, decoder, port = start_pair(members, free_port)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    blocks, key = 40, BlocksCacheKey(PROMPT, 3)
    theirs = prompt.call(dd.allocate_blocks, 2, (blocks, 8192), key=key)
    prompt.call(dd.fill, theirs, 4)
    mine = decoder.call(dd.allocate_blocks, 2, (blocks, 8192))
    decoder.call(pull_from_threads, key, mine, 20, 50, blocks)
    sent = dd.payload(4, 1, blocks * 8192).reshape(blocks, 8192)
    got = np.frombuffer(decoder.call(dd.read, mine, 1), np.uint8).reshape(blocks, 8192)
    assert np.array_equal(got[:20], sent[::-1][:20])


def test_why_is_in_the_log(
    open_datadist: Open, members: Members, free_port: FreePort, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    start_prompt(members("prompt"), port)
    decoder = open_datadist(LLMRole.DECODER, DECODER, ge_options=OVER_TCP)
    with caplog.at_level(logging.INFO, "llm_datadist"):
        assert decoder.link_clusters([dd.cluster_info(PROMPT, port)]) == LINKED
    assert "linked to cluster 1 over tcp: the settings of the client allow tcp alone" in caplog.text
