"""Members of communicators on several hosts: the rank table says where they are, nobody listens for links."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llm_datadist import LLMException
from llm_datadist.engine.communicator import MemberStatus
from tests import peer_engine as peer
from tests.hosts.network import Host, Network, wait_until
from tests.peer_engine import BROKEN, LINKED, assert_pulls
from tests.processes import Member

OK, PREPARING, FAILED = MemberStatus.OK, MemberStatus.PREPARING, MemberStatus.FAILED
A, B, C, D = 11, 12, 13, 14  # cluster ids
MAPPED = ("shared_memory", "same host and network name space")
OVER_TCP = ("tcp", "the peer is on another host or in another network name space")
SECONDS = 30  # for a set-up that shall succeed
GONE_S = 20.0  # after which the kernel has given a host up that does not answer
NAME = "members"

Server = tuple[str, Sequence[int]]  # what the table calls it, and the devices of its ranks
Naming = Callable[[Host], dict[str, str]]


def table(*servers: Server | dict[str, Any]) -> str:
    """A table with ranks in the order of servers and devices."""
    entries, rank = [], 0
    for server in servers:
        fields, devices = server if isinstance(server, tuple) else (server, [0])
        entry = {"server_id": fields} if isinstance(fields, str) else dict(fields)
        entry["device"] = []
        for device in devices:
            entry["device"].append({"device_id": str(device), "rank_id": str(rank)})
            rank += 1
        entries.append(entry)
    return json.dumps({"version": "1.0", "server_list": entries})


def start(host: Host, cluster_id: int, seconds: int = SECONDS, name: str = "member") -> Member:
    member = host.start(f"{name} {cluster_id}")
    member.call(peer.open_peer, cluster_id, link_total_time_s=seconds)
    return member


def join_all(members: dict[int, Member], ranks: str) -> dict[int, int]:
    """Have all members join, in the order of their ranks, and wait until the communicator is complete."""
    by_id = {number: rank for rank, number in enumerate(members)}
    ids = {number: member.call(peer.join, NAME, by_id, ranks) for number, member in members.items()}
    for number, member in members.items():
        assert member.call(peer.wait_for_status, ids[number], SECONDS)[0] is OK
    return ids


def assert_linked(members: dict[int, Member]) -> None:
    """Expect that every member pulls from every other one."""
    for number, member in members.items():
        for other, owner in members.items():
            if other != number:
                assert_pulls(member, owner, other, 100 * number + other)


@pytest.fixture
def hosts(network: Network) -> tuple[Host, Host]:
    return network.add_host("left"), network.add_host("right")


NAMINGS: dict[str, Naming] = {
    "ipv4": lambda host: {"server_id": host.ipv4},
    "ipv6": lambda host: {"server_id": host.ipv6},
    "name": lambda host: {"server_id": host.name},
    "host-ip": lambda host: {"server_id": f"machine of {host.name}", "host_ip": host.ipv4},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_two_hosts(hosts: tuple[Host, Host], naming: str) -> None:
    pair = {number: start(host, number) for number, host in zip((A, B), hosts)}
    ids = join_all(pair, table(*(NAMINGS[naming](host) for host in hosts)))
    for member in pair.values():
        assert member.call(peer.ways) == {OVER_TCP}
    assert_linked(pair)
    pair[A].call(peer.leave, ids[A])
    peer.wait_for_links(pair[B], [])
    assert pair[B].call(peer.status, ids[B]) is FAILED


@pytest.mark.parametrize("first", [A, B])
def test_the_second_one_comes_later(hosts: tuple[Host, Host], first: int) -> None:
    """Its host answers before, or not even that."""
    ranks, by_host = {A: 0, B: 1}, dict(zip((A, B), hosts))
    second = A + B - first
    by_host[second].take_down()
    pair = {number: start(host, number) for number, host in by_host.items()}
    ids = {first: pair[first].call(peer.join, NAME, ranks, both(hosts))}
    with pytest.raises(TimeoutError):
        pair[first].start(peer.wait_for_status, ids[first], SECONDS).result(2)
    by_host[second].take_up()
    ids[second] = pair[second].call(peer.join, NAME, ranks, both(hosts))
    for number, member in pair.items():
        assert member.call(peer.wait_for_status, ids[number], SECONDS)[0] is OK
    assert_linked(pair)


def both(hosts: tuple[Host, Host]) -> str:
    return table(*({"server_id": host.ipv4} for host in hosts))


def test_four_members_on_three_hosts(network: Network) -> None:
    """Two of one host share memory, all others do not."""
    left, right, third = (network.add_host(name) for name in ("left", "right", "third"))
    on = {A: left, B: left, C: right, D: third}
    members = {number: start(host, number) for number, host in on.items()}
    join_all(members, table((left.ipv4, (0, 1)), (right.ipv4, (0,)), (third.ipv4, (5,))))
    assert members[A].call(peer.ways) == members[B].call(peer.ways) == {MAPPED, OVER_TCP}
    assert members[C].call(peer.ways) == members[D].call(peer.ways) == {OVER_TCP}
    assert_linked(members)


def test_a_firewall_that_lets_one_direction_through(hosts: tuple[Host, Host], member_base_port: int) -> None:
    """To the port of the lower rank, which is all that is needed."""
    left, right = hosts
    left.open_only(str(member_base_port + 3))
    right.open_only()
    pair = {A: start(left, A), B: start(right, B)}
    join_all(pair, table((left.ipv4, (3,)), (right.ipv4, (4,))))
    assert_linked(pair)


def test_containers_of_one_server_with_published_ports(network: Network, member_base_port: int) -> None:
    """All that the table knows is the address of the server, which none of the containers has."""
    server, one, two = (network.add_host(name) for name in ("server", "one", "two"))
    publish(server, {member_base_port: one, member_base_port + 1: two})
    pair = {A: start(one, A), B: start(two, B)}
    join_all(pair, table((server.ipv4, (0, 1))))
    for member in pair.values():
        assert member.call(peer.ways) == {OVER_TCP}
    assert_linked(pair)


def publish(server: Host, ports: dict[int, Host]) -> None:
    """Let a host pass connections to its ports on to others."""
    server.namespace.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    rules = "\n".join(f"tcp dport {port} dnat to {host.ipv4}" for port, host in ports.items())
    to = f"chain arriving {{\ntype nat hook prerouting priority -100\n{rules}\n}}\n"
    back = "chain leaving {\ntype nat hook postrouting priority 100\nmasquerade\n}\n"
    server.namespace.run("nft", "-f", "-", text=f"table ip published {{\n{to}{back}}}\n")


def test_a_partition_during_the_set_up(network: Network, hosts: tuple[Host, Host]) -> None:
    """Nothing gets through, and nothing says so; when the network is back they find each other."""
    network.part(*hosts)
    pair = {number: start(host, number) for number, host in zip((A, B), hosts)}
    ranks = {A: 0, B: 1}
    ids = {number: member.call(peer.join, NAME, ranks, both(hosts)) for number, member in pair.items()}
    with pytest.raises(TimeoutError):
        pair[A].start(peer.wait_for_status, ids[A], SECONDS).result(2)
    network.heal()
    for number, member in pair.items():
        assert member.call(peer.wait_for_status, ids[number], SECONDS)[0] is OK
    assert_linked(pair)


def test_a_host_that_does_not_answer(hosts: tuple[Host, Host], network: Network) -> None:
    network.part(*hosts)
    members = {number: start(host, number, seconds=2) for number, host in zip((A, B), hosts)}
    ranks = {A: 0, B: 1}
    ids = {number: member.call(peer.join, NAME, ranks, both(hosts)) for number, member in members.items()}
    for number, member in members.items():
        found, seconds = member.call(peer.wait_for_status, ids[number])
        assert found is FAILED
        assert seconds < 4


@pytest.mark.parametrize("lost", [A, B])
def test_a_host_vanishes_and_comes_back(hosts: tuple[Host, Host], lost: int) -> None:
    by_host = dict(zip((A, B), hosts))
    living = A + B - lost
    pair = {number: start(host, number) for number, host in by_host.items()}
    ids = join_all(pair, both(hosts))
    by_host[lost].vanish()
    started = time.monotonic()
    with pytest.raises(LLMException):
        pair[living].call(peer.pull, lost, 1)
    assert time.monotonic() - started < 3, "at its deadline, which is a second"
    wait_until(lambda: pair[living].call(peer.links) == [(lost, BROKEN)], "word of the loss", GONE_S)
    assert pair[living].call(peer.status, ids[living]) is FAILED
    pair[living].call(peer.leave, ids[living])
    by_host[lost].come_back()
    pair[lost] = start(by_host[lost], lost, name="successor")
    join_all(pair, both(hosts))
    assert pair[living].call(peer.links) == [(lost, LINKED)]
    assert_linked(pair)


@pytest.mark.parametrize("lost", [A, B])
def test_a_host_vanishes_while_members_wait_for_a_third(network: Network, lost: int) -> None:
    three = {number: network.add_host(f"host-{number}") for number in (A, B, C)}
    living = A + B - lost
    ranks = {A: 0, B: 1, C: 2}
    servers = table(*({"server_id": host.ipv4} for host in three.values()))
    members = {number: start(three[number], number) for number in (A, B)}
    ids = {number: member.call(peer.join, NAME, ranks, servers) for number, member in members.items()}
    peer.wait_for_links(members[living], [(lost, LINKED)])
    three[lost].vanish()
    found, seconds = members[living].call(peer.wait_for_status, ids[living], SECONDS, timeout=SECONDS)
    assert found is FAILED
    assert seconds < GONE_S
    peer.wait_for_links(members[living], [])
