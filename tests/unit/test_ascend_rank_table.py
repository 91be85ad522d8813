"""The rank table of a link between two devices: both sides make the same one, or are told why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llm_datadist.devices.ascend.rank_table import (
    LinkRankTable,
    LocalPart,
    check_device,
    make_local_part,
    merge_parts,
    needs_addresses,
    read_local_part,
)
from llm_datadist.engine.rank_table import read_rank_table
from llm_datadist.rank_table_fields import BadRankTable

A2 = "Ascend910B3"
A3 = "Ascend910_9391"


def part(server: str = "192.0.2.17", device: Any = "3", version: str = "1.0", **fields: Any) -> dict[str, Any]:
    return {"version": version, "server_list": [{"server_id": server, "device": [{"device_id": device, **fields}]}]}


def part_of_pod(server: str, device: str, super_device: str, pod: str = "0", **fields: Any) -> dict[str, Any]:
    content = part(server, device, "1.2", super_device_id=super_device, **fields)
    return {**content, "super_pod_list": [{"super_pod_id": pod, "server_list": [{"server_id": server}]}]}


def read(content: dict[str, Any]) -> LocalPart:
    return read_local_part(json.dumps(content))


def merge(one: dict[str, Any], other: dict[str, Any], **environment: str) -> list[LinkRankTable]:
    """Give what each side makes of the two parts, of which it has read its own and been sent the other one."""
    parts = [read(one), read(other)]
    sent = [read_local_part(each.to_json()) for each in parts]
    return [
        merge_parts(parts[0], sent[1], environment),
        merge_parts(parts[1], sent[0], environment),
    ]


def merged(one: dict[str, Any], other: dict[str, Any], **environment: str) -> tuple[dict[str, Any], int]:
    """Give the table, and the rank of the first side, after a look at both sides."""
    tables = merge(one, other, **environment)
    assert tables[0].text == tables[1].text
    assert sorted(table.rank for table in tables) == [0, 1]
    assert [table.text for table in merge(other, one, **environment)] == [tables[0].text] * 2
    devices = read_rank_table(tables[0].text).devices
    for content, table in zip((one, other), tables):
        own = read(content)
        found = devices[table.rank]
        assert (found.server_id, found.device_id, found.device_port) == (own.server_id, own.device_id, own.device_port)
    return json.loads(tables[0].text), tables[0].rank


# ---- the tables of the vendor's documents


def test_two_servers() -> None:
    first = part("192.0.2.17", "3", device_ip="198.51.100.23", device_port="16701")
    second = part("192.0.2.18", "0", device_ip="198.51.100.40", device_port="16702")
    wanted = {
        "version": "1.0",
        "status": "completed",
        "server_count": "2",
        "server_list": [
            {
                "server_id": "192.0.2.17",
                "device": [
                    {"device_id": "3", "device_ip": "198.51.100.23", "device_port": "16701", "rank_id": "0"},
                ],
            },
            {
                "server_id": "192.0.2.18",
                "device": [
                    {"device_id": "0", "device_ip": "198.51.100.40", "device_port": "16702", "rank_id": "1"},
                ],
            },
        ],
    }
    assert merged(first, second) == (wanted, 0)
    assert merged(second, first) == (wanted, 1)


def test_two_devices_of_one_server() -> None:
    for addresses in (("198.51.100.20", "198.51.100.25"), ("", "")):
        given_ips = [{"device_ip": address} if address else {} for address in addresses]
        table, rank = merged(part(device="5", **given_ips[1]), part(device="0", **given_ips[0]))
        assert table == {
            "version": "1.0",
            "status": "completed",
            "server_count": "1",
            "server_list": [
                {
                    "server_id": "192.0.2.17",
                    "device": [
                        {"device_id": "0", **given_ips[0], "rank_id": "0"},
                        {"device_id": "5", **given_ips[1], "rank_id": "1"},
                    ],
                }
            ],
        }
        assert rank == 1


def test_a_super_pod() -> None:
    first = part_of_pod("node-a", "2", "4718594", device_ip="198.51.100.52")
    second = part_of_pod("node-b", "2", "5046274", device_ip="198.51.100.82")
    table, rank = merged(first, second)
    assert table == {
        "version": "1.2",
        "status": "completed",
        "server_count": "2",
        "server_list": [
            {
                "server_id": "node-a",
                "device": [
                    {
                        "device_id": "2",
                        "super_device_id": "4718594",
                        "device_ip": "198.51.100.52",
                        "rank_id": "0",
                    }
                ],
            },
            {
                "server_id": "node-b",
                "device": [
                    {
                        "device_id": "2",
                        "super_device_id": "5046274",
                        "device_ip": "198.51.100.82",
                        "rank_id": "1",
                    }
                ],
            },
        ],
        "super_pod_list": [
            {"super_pod_id": "0", "server_list": [{"server_id": "node-a"}, {"server_id": "node-b"}]},
        ],
    }
    assert rank == 0


# ---- what the merge decides


def test_servers_and_devices_are_ordered_as_text() -> None:
    table, rank = merged(part("10.0.0.9", device_ip="1.1.1.1"), part("10.0.0.10", device_ip="1.1.1.2"))
    assert [server["server_id"] for server in table["server_list"]] == ["10.0.0.10", "10.0.0.9"]
    assert rank == 1
    table, rank = merged(part(device="9"), part(device="10"))
    assert [device["device_id"] for device in table["server_list"][0]["device"]] == ["10", "9"]
    assert rank == 1


def test_the_older_version_counts_and_has_no_super_pods() -> None:
    older = part("node-b", "2", device_ip="198.51.100.82")
    newer = part_of_pod("node-a", "2", "4718594", device_ip="198.51.100.52", backup_device_ip="198.51.100.53")
    table, _ = merged(older, newer)
    assert table["version"] == "1.0"
    assert "super_pod_list" not in table
    assert table["server_list"][0]["device"] == [{"device_id": "2", "device_ip": "198.51.100.52", "rank_id": "0"}]


def test_two_super_pods() -> None:
    first = part_of_pod("node-a", "2", "1", pod="7", device_ip="198.51.100.52")
    second = part_of_pod("node-b", "2", "1", pod="12", device_ip="198.51.100.82")
    table, _ = merged(first, second)
    assert table["super_pod_list"] == [
        {"super_pod_id": "12", "server_list": [{"server_id": "node-b"}]},
        {"super_pod_id": "7", "server_list": [{"server_id": "node-a"}]},
    ]


def test_one_server_of_a_super_pod() -> None:
    table, _ = merged(part_of_pod("node-a", "2", "1"), part_of_pod("node-a", "3", "2"))
    assert table["super_pod_list"] == [{"super_pod_id": "0", "server_list": [{"server_id": "node-a"}]}]


def test_half_a_super_pod_is_none() -> None:
    whole = part_of_pod("node-a", "2", "4718594", device_ip="198.51.100.52", backup_device_ip="198.51.100.53")
    half = part("node-b", "2", "1.2", super_device_id="5046274", device_ip="198.51.100.82", backup_device_port=2000)
    table, _ = merged(whole, half)
    assert table["version"] == "1.2"
    assert "super_pod_list" not in table
    assert [server["device"] for server in table["server_list"]] == [
        [{"device_id": "2", "device_ip": "198.51.100.52", "backup_device_ip": "198.51.100.53", "rank_id": "0"}],
        [{"device_id": "2", "device_ip": "198.51.100.82", "backup_device_port": "2000", "rank_id": "1"}],
    ]


def test_what_is_known_of_the_host() -> None:
    one = part(device="1", host_port=60005)
    one["server_list"][0]["host_ip"] = "2001:DB8::1"
    table, _ = merged(one, part(device="2"))
    assert table["server_list"][0]["host_ip"] == "2001:db8::1"
    assert table["server_list"][0]["device"][0]["host_port"] == "60005"


def test_addresses_are_needed_where_the_network_is_taken() -> None:
    def needed(one: dict[str, Any], other: dict[str, Any], **environment: str) -> bool:
        parts = read(one), read(other)
        answer = needs_addresses(*parts, environment)
        assert answer is needs_addresses(*reversed(parts), environment)
        return answer

    here, there = part("a", "1"), part("b", "2")
    assert needed(here, there)
    assert not needed(here, part("a", "2"))
    assert needed(here, part("a", "2"), HCCL_INTRA_ROCE_ENABLE="1")
    assert not needed(here, part("a", "2"), HCCL_INTRA_ROCE_ENABLE="0", HCCL_INTER_HCCS_DISABLE="true")
    in_pod = part_of_pod("a", "1", "11"), part_of_pod("b", "2", "12")
    assert not needed(*in_pod)
    assert not needed(*in_pod, HCCL_INTER_HCCS_DISABLE="false")
    assert needed(*in_pod, HCCL_INTER_HCCS_DISABLE="TRUE")
    assert needed(in_pod[0], part_of_pod("b", "2", "12", pod="1"))
    assert needed(in_pod[0], there)
    assert needed(in_pod[0], part("b", "2", "1.2"))
    table, _ = merged(*in_pod)
    assert "device_ip" not in table["server_list"][0]["device"][0]


@pytest.mark.parametrize(
    ("one", "other", "environment", "message"),
    [
        (part(), part(), {}, "device_id is '3' on server '192.0.2.17' for both sides of the link"),
        (part(device="03", device_port=2000), part(device_port=2001), {}, "device_id is '3'.*, whatever their ports"),
        (part("a", "1"), part("b", "2", device_ip="1.1.1.1"), {}, "device_ip is missing for device 1 of server 'a'"),
        (part("a", "1", device_ip="1.1.1.1"), part("b", "2"), {}, r"device 2 of server 'b'.*mount /etc/hccn.conf"),
        (part("a", "1"), part("a", "2"), {"HCCL_INTRA_ROCE_ENABLE": "1"}, "device_ip is missing for device 1"),
        (
            part_of_pod("a", "1", "11"),
            part_of_pod("b", "2", "12"),
            {"HCCL_INTER_HCCS_DISABLE": "true"},
            "device_ip is missing",
        ),
        (
            part("a", "1", device_ip="1.1.1.1,1.1.1.2"),
            part("b", "2", device_ip="1.1.1.3, 1.1.1.2"),
            {},
            "device_ip is '1.1.1.2' for two ports of the link",
        ),
        (
            part("a", "1", device_ip="2001:DB8::1"),
            part("a", "2", device_ip="2001:db8:0::1"),
            {},
            "device_ip is '2001:db8::1' for two ports",
        ),
        (
            part("a", "1", "1.2", device_ip="1.1.1.1"),
            part("b", "2", "1.2", device_ip="1.1.1.2", backup_device_ip="1.1.1.1"),
            {},
            "device_ip is '1.1.1.1' for two ports",
        ),
        (
            part_of_pod("a", "1", "11", pod="0"),
            part_of_pod("a", "2", "12", pod="1"),
            {},
            "super_pod_id is '0' on one side of the link and '1' on the other",
        ),
    ],
)
def test_two_parts_that_do_not_go_together(
    one: dict[str, Any], other: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    for parts in ((one, other), (other, one)):
        with pytest.raises(BadRankTable, match=message):
            merge_parts(*map(read, parts), environment)


def test_two_addresses_of_one_server() -> None:
    one, other = part(device="1"), part(device="2")
    one["server_list"][0]["host_ip"], other["server_list"][0]["host_ip"] = "192.0.2.1", "192.0.2.2"
    with pytest.raises(BadRankTable, match="host_ip is '192.0.2.1' on one side of the link and '192.0.2.2'"):
        merge(one, other)


NUMBERS = st.one_of(st.integers(0, 12), st.integers(0, 12).map(str), st.integers(0, 12).map("0{}".format))
PORTS = st.one_of(st.sampled_from([1024, "65535", "01024"]), st.integers(2000, 2003))
ADDRESSES = st.sampled_from(["198.51.100.7", "198.51.100.10", "2001:DB8::1", "2001:db8::1", "10.0.0.9, 10.0.0.10"])


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        "device_ip": ADDRESSES,
        "device_port": PORTS,
        "super_device_id": NUMBERS,
        "backup_device_ip": ADDRESSES,
        "backup_device_port": PORTS,
        "host_port": PORTS,
        "rank_id": NUMBERS,
    }
    device = draw(st.fixed_dictionaries({"device_id": NUMBERS}, optional=optional))
    server_id = draw(st.sampled_from(["10.0.0.9", "10.0.0.10", "ü"]))
    server = {"server_id": server_id, "device": [device]}
    if draw(st.booleans()):
        server["host_ip"] = draw(st.sampled_from(["192.0.2.1", " 192.0.2.1 ", "2001:DB8::5"]))
    table: dict[str, Any] = {"version": draw(st.sampled_from(["1.0", "1.2"])), "server_list": [server]}
    if draw(st.booleans()):
        pod = {"super_pod_id": draw(st.sampled_from(["0", 0, "1"])), "server_list": [{"server_id": server_id}]}
        table["super_pod_list"] = [pod]
    return table


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is slow
@given(parts(), parts())
def test_both_sides_always_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    for content in (one, other):
        own = read(content)
        assert read_local_part(own.to_json()) == own, "what is handed on is all that counts"
    try:
        tables = merge(one, other)
    except BadRankTable:
        assume(False)
    table, _ = merged(one, other)
    assert len(tables) == 2
    texts = [value for server in table["server_list"] for device in server["device"] for value in device.values()]
    assert all(type(text) is str and text for text in texts)


# ---- a part that a program gives


def without(*path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


SERVER = ("server_list", 0)
DEVICE = (*SERVER, "device", 0)
POD = ("super_pod_list", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("version"), "version is missing, should be one of '1.0', '1.2'"),
        (put("1.3", "version"), "version is '1.3'"),
        (put("initializing", "status"), "status is 'initializing', should be 'completed'"),
        (without("server_list"), "server_list is missing"),
        (put([], "server_list"), "server_list is a list of 0"),
        (put([{}, {}], "server_list"), "server_list is a list of 2, should be one server"),
        (put(5, *SERVER), r"server_list\[0\] is 5, should be an object"),
        (without(*SERVER, "server_id"), r"server_list\[0\].server_id is missing, should be text of 1 to 64"),
        (put("s" * 65, *SERVER, "server_id"), "text of 1 to 64 characters"),
        (put(17, *SERVER, "server_id"), r"server_list\[0\].server_id is 17"),
        (put("host", *SERVER, "host_ip"), r"server_list\[0\].host_ip is 'host', should be an IPv4 or IPv6 address"),
        (put("1.1.1.1,1.1.1.2", *SERVER, "host_ip"), r"host_ip is '1.1.1.1,1.1.1.2', should be one address"),
        (without(*SERVER, "device"), r"server_list\[0\].device is missing"),
        (put([{}, {}], *SERVER, "device"), r"server_list\[0\].device is a list of 2, should be one device"),
        (put("x", *DEVICE), r"device\[0\] is 'x', should be an object"),
        (without(*DEVICE, "device_id"), r"server_list\[0\].device\[0\].device_id is missing"),
        (put("npu:0", *DEVICE, "device_id"), r"device\[0\].device_id is 'npu:0', should be a number"),
        (put(-1, *DEVICE, "device_id"), r"device_id is -1"),
        (put("198.51.100", *DEVICE, "device_ip"), r"device\[0\].device_ip is '198.51.100', should be an IPv4 or IPv6"),
        (put("1.1.1.1,", *DEVICE, "device_ip"), r"device_ip is '1.1.1.1,', should be"),
        (put([1], *DEVICE, "device_ip"), r"device_ip is a list of 1, should be text"),
        (put("1023", *DEVICE, "device_port"), r"device\[0\].device_port is '1023', should be 1024 to 65535"),
        (put(65536, *DEVICE, "device_port"), "device_port is 65536"),
        (put(0, *DEVICE, "host_port"), r"host_port is 0, should be 1 to 65535"),
        (put(1023, *DEVICE, "host_port"), r"host_port is 1023, should be 1024 to 65535"),
        (put("x", *DEVICE, "backup_device_ip"), "backup_device_ip is 'x'"),
        (put("80", *DEVICE, "backup_device_port"), "backup_device_port is '80'"),
        (put("0x12", *DEVICE, "super_device_id"), r"device\[0\].super_device_id is '0x12', should be a number"),
        (put({}, "super_pod_list"), "super_pod_list is a dict of 0"),
        (put([{}, {}], "super_pod_list"), "super_pod_list is a list of 2, should be a list of one super pod"),
        (put(0, *POD), r"super_pod_list\[0\] is 0, should be an object"),
        (without(*POD, "super_pod_id"), r"super_pod_list\[0\].super_pod_id is missing"),
        (without(*POD, "server_list"), r"super_pod_list\[0\].server_list is missing"),
        (
            put([5], *POD, "server_list"),
            r"super_pod_list\[0\].server_list is a list of 1, should be a list of one server",
        ),
        (put("node-x", *POD, "server_list", 0, "server_id"), "server_id is 'node-x', should be 'node-a'"),
    ],
)
def test_a_part_that_cannot_be_used(change: Callable[[Any], None], message: str) -> None:
    content = part_of_pod("node-a", "2", "4718594", device_ip="198.51.100.52", device_port="16701")
    read(content)
    change(content)
    with pytest.raises(BadRankTable, match=message):
        read(content)


def test_no_json() -> None:
    for text in ("", "{", "[" * 100_000):
        with pytest.raises(BadRankTable, match="^llm.LocalCommRes is no JSON"):
            read_local_part(text)
    with pytest.raises(BadRankTable, match="^the peer's part is a list of 0, should be a JSON object"):
        read_local_part("[]", "the peer's part")


def test_a_part_is_of_the_device_of_the_process() -> None:
    check_device(read(part(device="03")), 3)
    with pytest.raises(BadRankTable, match="device_id is '3', should be '5', the physical id of the device"):
        check_device(read(part(device="3")), 5)


# ---- a part that is made of the device


def test_a_part_of_the_second_generation() -> None:
    made = make_local_part(A2, 5, device_ip="198.51.100.25", super_device_id=7, super_pod_id=1, server_id="node-a")
    assert made == LocalPart("1.0", "node-a", "5", device_ip="198.51.100.25")
    assert json.loads(made.to_json()) == part("node-a", "5", device_ip="198.51.100.25")


def test_a_part_of_the_third_generation() -> None:
    made = make_local_part(A3, 2, super_device_id=4718594, super_pod_id=0, server_id="node-a")
    assert json.loads(made.to_json()) == part_of_pod("node-a", "2", "4718594")
    assert make_local_part(A3, 2, server_id="node-a") == LocalPart("1.2", "node-a", "2")


def test_processes_of_a_server_name_it_alike() -> None:
    first, second = make_local_part(A2, 0), make_local_part(A2, 1)
    assert first.server_id == second.server_id
    assert 0 < len(first.server_id) <= 64
    assert json.loads(merge_parts(first, second, {}).text)["server_count"] == "1"


@pytest.mark.parametrize("name", ["Ascend310P3", "Ascend910B", "910B3", "", "Ascend950"])
def test_a_device_of_another_kind(name: str) -> None:
    with pytest.raises(BadRankTable, match=r"should be one of Ascend910B1, .*: set llm.LocalCommRes for others"):
        make_local_part(name, 0)


def test_a_device_that_cannot_be() -> None:
    for match, arguments in (
        ("device_id is '-1'", {"physical_id": -1}),
        ("device_ip is 'eth0'", {"physical_id": 0, "device_ip": "eth0"}),
        ("super_pod_id is -1", {"physical_id": 0, "super_pod_id": -1, "super_device_id": 1}),
        ("super_device_id is '-1'", {"physical_id": 0, "super_pod_id": 1, "super_device_id": -1}),
        ("server_id", {"physical_id": 0, "server_id": "s" * 65}),
    ):
        with pytest.raises(BadRankTable, match=match):
            make_local_part(A3, **arguments)  # type: ignore[arg-type]
