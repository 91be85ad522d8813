"""Members that may be met in both ways: what the rank table says about servers, and what turns out when they meet.

The servers are two addresses of the loopback interface, so all members are on one host.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.control.messages import MemberAccept, MemberHello
from llm_datadist.control.stream import send_message
from llm_datadist.engine.communicator import MemberStatus
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.membership import Membership
from llm_datadist.engine.network import TRANSPORT
from llm_datadist.engine.rank_table import read_rank_table
from llm_datadist.transports import rendezvous, tcp
from tests import peer_engine as peer
from tests.faults.test_member_death import receive
from tests.peer_engine import LINKED, assert_pulls, make_engine, own
from tests.processes import Member

OK, PREPARING, FAILED = MemberStatus.OK, MemberStatus.PREPARING, MemberStatus.FAILED
A, B, C = 11, 12, 13  # cluster ids
RANKS = {A: 0, B: 1}
SERVERS = "127.0.0.1", "127.0.0.2", "127.0.0.3"
PAIR = own("pair")
MAPPED = ("shared_memory", "same host and network name space")


def two_servers(*servers: str, **fields: Any) -> str:
    """A table with a device 0 on each server."""
    entries = [
        {"server_id": server, "device": [{"device_id": "0", "rank_id": str(rank)}], **fields}
        for rank, server in enumerate(servers)
    ]
    return json.dumps({"version": "1.0", "server_list": entries})


TABLE = two_servers(*SERVERS[:2])


@pytest.fixture
def pair(members: Callable[[str], Member]) -> dict[int, Member]:
    return start(members, {A: "auto", B: "auto"})


def start(members: Callable[[str], Member], transports: dict[int, str]) -> dict[int, Member]:
    """Start processes whose settings say different things about the transport."""
    found = {}
    for number, transport in transports.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TRANSPORT, transport)
            found[number] = members(f"member-{number}")
        found[number].call(peer.open_peer, number, link_total_time_s=10)
    return found


def join_all(processes: dict[int, Member], name: str, table: str) -> dict[int, int]:
    ranks = {number: rank for rank, number in enumerate(processes)}
    ids = {number: process.call(peer.join, name, ranks, table) for number, process in processes.items()}
    for number, process in processes.items():
        assert process.call(peer.wait_for_status, ids[number])[0] is OK
    return ids


def test_two_servers_that_are_one_host_share_memory(pair: dict[int, Member]) -> None:
    for _ in range(5):
        ids = join_all(pair, PAIR, TABLE)
        for process in pair.values():
            assert process.call(peer.ways) == {MAPPED}
        for number, process in pair.items():
            process.call(peer.leave, ids[number])


@pytest.mark.parametrize(("a", "b", "why"), [("tcp", "auto", "rank 0"), ("auto", "tcp", "rank 1")])
def test_settings_of_one_member_are_enough(members: Callable[[str], Member], a: str, b: str, why: str) -> None:
    pair = start(members, {A: a, B: b})
    join_all(pair, PAIR, TABLE)
    for process in pair.values():
        assert process.call(peer.ways) == {("tcp", f"the settings of {why} allow tcp alone")}
    assert_pulls(pair[A], pair[B], B, 1)
    assert_pulls(pair[B], pair[A], A, 2)


def test_three_members_in_both_ways(members: Callable[[str], Member]) -> None:
    three = start(members, {A: "auto", B: "auto", C: "tcp"})
    join_all(three, own("three"), two_servers(*SERVERS))
    over_tcp = ("tcp", "the settings of rank 2 allow tcp alone")
    assert three[A].call(peer.ways) == {MAPPED, over_tcp}
    assert three[C].call(peer.ways) == {over_tcp}
    assert_pulls(three[B], three[A], A, 1)
    assert_pulls(three[C], three[B], B, 2)


def test_further_data_connections_come_to_the_same_place(members: Callable[[str], Member]) -> None:
    """Transfers at the same time in both directions, long after the members have met."""
    pair = start(members, {A: "tcp", B: "tcp"})
    for process in pair.values():
        process.call(peer.close_peer)
    for number, process in pair.items():
        process.call(peer.open_peer, number, pool_bytes=peer.LONG_POOL_BYTES, link_total_time_s=10)
        process.call(peer.offer_long)
    join_all(pair, PAIR, TABLE)
    pulls = [pair[A].start(peer.pull_until_told, B), pair[B].start(peer.pull_until_told, A)]
    for process in pair.values():
        process.call(wait_for_descriptors)
        process.call(peer.stop_pulling)
    for pull in pulls:
        pull.result()


def wait_for_descriptors(state: peer.State) -> None:
    """Wait until the one link has several data connections for what this process asks."""
    deadline = time.monotonic() + 10
    (link,) = state["engine"]._links._links.values()
    while link[0].end.channels < 2:
        assert time.monotonic() < deadline


# ---- both ways, one side played by the test


@pytest.fixture
def listening() -> Iterator[Engine]:
    with contextlib.closing(make_engine(A)) as engine:
        engine.link_members(PAIR, RANKS, TABLE)
        yield engine


MEETING = Membership(1, PAIR, {0: A, 1: B}, 0, read_rank_table(TABLE).digest(), 0.0, 1)


def hello(*offers: str, reason: str = "") -> MemberHello:
    host = rendezvous.host_identity()
    return MemberHello(B, 1, b"i" * 16, MEETING.rank_table, host, list(offers), reason)


def answer_to(said: MemberHello, port: int) -> tuple[str, str]:
    """Come to rank 0 over TCP, as soon as it listens, and give the transport that it chooses, and why."""
    deadline = time.monotonic() + 5
    while True:
        try:
            connection = socket.create_connection((SERVERS[0], port), 5.0)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    with connection:
        connection.sendall(tcp.preamble(MEETING.digest(), tcp.MEMBER))
        send_message(connection, said)
        answer = receive(connection)
        if answer.transport == "shared_memory":
            assert connection.recv(1) == b""
    assert isinstance(answer, MemberAccept)
    return answer.transport, answer.reason


def test_who_comes_over_tcp_from_the_same_host_is_sent_to_the_unix_socket(
    listening: Engine, member_base_port: int
) -> None:
    assert answer_to(hello("shared_memory", "tcp"), member_base_port) == MAPPED
    assert MemberStatus(listening.member_status(1)) is PREPARING, "nothing is lost"
    assert answer_to(hello("tcp", reason="because"), member_base_port) == ("tcp", "because")


def test_who_is_sent_to_a_unix_socket_that_is_not_there_comes_again(member_base_port: int) -> None:
    """As a process of another user does."""
    with tcp.listen(SERVERS[0], (member_base_port,) * 2) as listener, contextlib.closing(make_engine(B)) as engine:
        listener.settimeout(5)
        engine.link_members(PAIR, RANKS, TABLE)
        offers = []
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                connection.recv(tcp.PREAMBLE_BYTES, socket.MSG_WAITALL)
                said = receive(connection)
                assert isinstance(said, MemberHello)
                offers.append((said.transports, said.reason))
                send_message(connection, MemberAccept(A, 0, b"i" * 16, b"t" * 16, said.transports[0], ""))
        assert offers[0] == (["shared_memory", "tcp"], "")
        assert offers[1] == (["tcp"], "the peer is on the same host, but not to be reached on its Unix socket")


def test_a_server_without_an_address_is_refused_at_once() -> None:
    with contextlib.closing(make_engine(A)) as engine:
        with pytest.raises(LLMException, match="server_id is 'node-b', should be an IP address") as caught:
            engine.link_members(PAIR, RANKS, two_servers("127.0.0.1", "node-b"))
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
        assert not engine.has_members
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HCCL_IF_BASE_PORT", "x")
            with pytest.raises(LLMException, match="HCCL_IF_BASE_PORT is 'x'"):
                engine.link_members(PAIR, RANKS, TABLE)


def test_names_of_servers_are_enough_where_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRANSPORT, "shared_memory")
    with contextlib.closing(make_engine(A)) as engine, contextlib.closing(make_engine(B)) as other:
        for one in (engine, other):
            one.link_members(PAIR, RANKS, two_servers("node-a", "node-b"))
        for one in (engine, other):  # which of them is ready first is open
            assert peer.wait_for_status({"engine": one}, 1)[0] is OK
        assert peer.links({"engine": other}) == [(A, LINKED)]


def test_what_was_tried_stands_in_the_log(caplog: pytest.LogCaptureFixture, member_base_port: int) -> None:
    with contextlib.closing(make_engine(B, link_total_time_s=1)) as engine:
        engine.link_members(PAIR, RANKS, TABLE)
        assert peer.wait_for_status({"engine": engine}, 1)[0] is FAILED
    where = f"127.0.0.1, port {member_base_port}"
    assert f"there is no link to cluster 11 (rank 0) at {where} (Connection refused)" in caplog.text


def test_the_port_is_free_again(member_base_port: int) -> None:
    """When nobody is waited for, and no link needs it."""
    address = SERVERS[0], (member_base_port,) * 2
    with contextlib.closing(make_engine(A)) as engine, contextlib.closing(make_engine(B)) as other:
        engine.link_members(PAIR, RANKS, TABLE)
        other.link_members(PAIR, RANKS, TABLE)
        assert peer.wait_for_status({"engine": engine}, 1)[0] is OK
        tcp.listen(*address).close()
        engine.link_members(own("another"), RANKS, TABLE)
        wait_until_taken(address)
        engine.unlink_members(2)
        tcp.listen(*address).close()


def wait_until_taken(address: tuple[str, tuple[int, int]]) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            tcp.listen(*address).close()
        except OSError:
            return
        assert time.monotonic() < deadline
