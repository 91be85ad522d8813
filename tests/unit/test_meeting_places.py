"""Where members of a communicator meet: what follows from a rank table, the settings and the environment."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from llm_datadist.engine.meeting_places import BASE_PORT, PORT_RANGE, UNIX_ALONE, MeetingPlaces, meeting_places
from llm_datadist.engine.rank_table import BadRankTable, read_rank_table

AUTO = ("shared_memory", "tcp")
TCP = ("tcp",)
SHARED_MEMORY = ("shared_memory",)
HERE, ALSO_HERE = "127.0.0.1", "127.0.0.2"
ELSEWHERE = "192.0.2.17"  # of nobody (RFC 5737)
ELSEWHERE_V6 = "2001:db8::17"


def server(server_id: str, *devices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"server_id": server_id, "device": list(devices), **fields}


def device(rank: int, device_id: int = 0, **fields: Any) -> dict[str, Any]:
    return {"rank_id": str(rank), "device_id": str(device_id), **fields}


def places(
    *servers: dict[str, Any], own: int = 0, transports: tuple[str, ...] = AUTO, ranks: int = 0, **environment: str
) -> MeetingPlaces:
    table = read_rank_table(json.dumps({"version": "1.0", "server_list": list(servers)}))
    return meeting_places(table, range(ranks or len(table.devices)), own, transports, environment)


def refused(text: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(BadRankTable, match=text):
        places(*args, **kwargs)


# ---- who is met over TCP


@pytest.mark.parametrize("name", ["here", "a machine's id: 5", "1", "127.1", HERE, "::1", "no-such-host.invalid"])
def test_one_server_of_whatever_name(name: str) -> None:
    assert places(server(name, device(0), device(1, 1))) == UNIX_ALONE


@pytest.mark.parametrize("fields", [{}, {"host_ip": HERE}])
def test_one_server_whose_address_is_of_this_host(fields: dict[str, str]) -> None:
    assert places(server(HERE if not fields else "machine", device(0), device(1, 1), **fields)) == UNIX_ALONE


@pytest.mark.parametrize(("address", "every"), [(ELSEWHERE, "0.0.0.0"), (ELSEWHERE_V6, "::")], ids=["ipv4", "ipv6"])
def test_one_server_whose_address_is_not_to_be_seen(address: str, every: str) -> None:
    """This process is in a container, and another member may be in another one."""
    expected = MeetingPlaces(True, (every, 60000), {1: (address, 60001)})
    assert places(server(address, device(0), device(1, 1))) == expected
    assert places(server("machine", device(0), device(1, 1), host_ip=address)) == expected


def test_another_server() -> None:
    servers = server(HERE, device(0, 3)), server(ELSEWHERE, device(1, 5))
    assert places(*servers) == MeetingPlaces(True, (HERE, 60003), {1: (ELSEWHERE, 60005)})
    assert places(*servers, own=1) == MeetingPlaces(True, ("0.0.0.0", 60005), {0: (HERE, 60003)})


def test_some_on_the_same_server() -> None:
    servers = server(HERE, device(0), device(1, 1)), server(ELSEWHERE, device(2), device(3, 1))
    assert places(*servers) == MeetingPlaces(True, (HERE, 60000), {2: (ELSEWHERE, 60000), 3: (ELSEWHERE, 60001)})


def test_only_members_count() -> None:
    """A table may have ranks that are no members, of servers with any name."""
    servers = server(HERE, device(0), device(1, 1)), server("no-such-host.invalid", device(2))
    assert places(*servers, ranks=2) == UNIX_ALONE
    refused("no-such-host", *servers)


def test_all_of_them_if_nothing_else_is_allowed() -> None:
    one = server(HERE, device(0), device(1, 1))
    assert places(one, transports=TCP) == MeetingPlaces(False, (HERE, 60000), {1: (HERE, 60001)})


def test_nobody_if_it_is_not_allowed() -> None:
    servers = server("node-a", device(0)), server("node-b", device(1))
    assert places(*servers, transports=SHARED_MEMORY) == UNIX_ALONE


# ---- addresses


def test_names_are_looked_up() -> None:
    servers = server(HERE, device(0)), server("localhost", device(1))
    assert places(*servers) == MeetingPlaces(True, (HERE, 60000), {1: (HERE, 60000)})


def test_a_name_that_the_host_takes_for_its_loopback() -> None:
    """Others take it for another address."""
    servers = server("localhost", device(0)), server(ALSO_HERE, device(1))
    assert places(*servers) == MeetingPlaces(True, ("0.0.0.0", 60000), {1: (ALSO_HERE, 60000)})


@pytest.mark.parametrize("name", ["no-such-host.invalid", "no name at all", "1", "127.1", "256.1.1.1", "a:b", ""])
@pytest.mark.parametrize("own", [0, 1])
def test_servers_that_are_nowhere(name: str, own: int) -> None:
    good, bad = server(HERE, device(0)), server(name or "a", device(1), host_ip=name)
    message = r"should be an IP address, or the name of a host.*or set llm.Transport to shared_memory"
    if name:
        refused(f"host_ip is '{name}', {message}", good, bad, own=own)
        refused(f"server_id is '{name}', {message}", good, server(name, device(1)), own=own)
    else:
        refused(f"server_id is 'a', {message}", good, bad, own=own)


def test_the_address_of_the_host_comes_before_the_name_of_the_server() -> None:
    servers = server("machine 1", device(0), host_ip=HERE), server(HERE, device(1), host_ip=ELSEWHERE)
    assert places(*servers) == MeetingPlaces(True, (HERE, 60000), {1: (ELSEWHERE, 60000)})


# ---- ports


TWO = server(HERE, device(0)), server(ALSO_HERE, device(1, 7))


def ports(*args: Any, **kwargs: Any) -> list[int]:
    found = places(*args, **{"transports": TCP, **kwargs})
    assert found.own is not None
    return [found.own[1], *(port for _, port in found.others.values())]


def test_the_base_port_comes_from_the_environment() -> None:
    assert ports(*TWO, **{BASE_PORT: " 50000 "}) == [50000, 50007]
    assert ports(*TWO, **{BASE_PORT: ""}) == [60000, 60007]


@pytest.mark.parametrize("base", ["1023", "65521", "-1", "x", "6e4", "99999999999", "\u0665\u0660\u0660\u0660\u0660"])
def test_base_ports_that_cannot_be(base: str) -> None:
    refused(f"HCCL_IF_BASE_PORT is '{base}', should be 1024 to 65520", *TWO, **{BASE_PORT: base})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50000-50010", [50000, 50007]),
        ("1000, 50000-50010", [1000, 50006]),
        ("1,2,3,4,5,6,7,80", [1, 80]),
        ("9-16", [9, 16]),
        ("auto", [50000, 50007]),
    ],
)
def test_ports_in_a_range(text: str, expected: list[int]) -> None:
    assert ports(*TWO, **{PORT_RANGE: text, BASE_PORT: "50000"}) == expected


def test_a_range_that_is_too_short() -> None:
    refused("device_id is 7, HCCL_HOST_SOCKET_PORT_RANGE .* has 7 ports", *TWO, **{PORT_RANGE: "1-7"})


@pytest.mark.parametrize("text", ["0", "1-65536", "9-8", "x", "1,,2", "1-2-3", "-"])
def test_ranges_that_cannot_be(text: str) -> None:
    refused(f"HCCL_HOST_SOCKET_PORT_RANGE is '{text}', should be ports and ranges", *TWO, **{PORT_RANGE: text})


def test_device_ids_that_are_too_large() -> None:
    one = server(HERE, device(0, 5535), device(1, 5536))
    refused("device_id is 5536, .* above 65535", one, transports=TCP)


def test_ports_of_the_table() -> None:
    one = server(HERE, device(0, 0, device_port="16700"), device(1, 0, device_port="16701"))
    assert ports(one) == [16700, 16701]
    one = server(HERE, *(device(rank, rank, device_port="16700", host_port=f"1670{rank}") for rank in (0, 1)))
    assert ports(one) == [16700, 16701]
    assert ports(server(HERE, device(0, device_port="9")), server(ALSO_HERE, device(1, device_port="9"))) == [9, 9]


def test_ports_of_the_table_that_are_not_enough() -> None:
    """The same one for two devices, or none for one of them: they are counted then."""
    assert ports(server(HERE, *(device(rank, rank, device_port="16700") for rank in (0, 1)))) == [60000, 60001]
    assert ports(server(HERE, device(0, device_port="60001"), device(1, 1))) == [60000, 60001]


def test_ranks_that_share_a_device_without_ports_of_their_own() -> None:
    one = server(HERE, device(0, 0, device_port="1"), device(1, 0, device_port="2"), device(2, 1, device_port="1"))
    refused("device_id is '0' for several ranks of server '127.0.0.1'", one, transports=TCP)


def test_ipv6_of_this_host_if_it_has_it() -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6")
    one = server("::1", device(0), device(1, 1))
    assert places(one, transports=TCP) == MeetingPlaces(False, ("::1", 60000), {1: ("::1", 60001)})
