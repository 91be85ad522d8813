"""Rank tables: what is read out of them, what is refused, and when two say the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.engine.rank_table import BadRankTable, RankedDevice, RankTable, read_rank_table


def device(rank: Any, device_id: Any = None, **fields: Any) -> dict[str, Any]:
    return {"device_id": str(rank) if device_id is None else device_id, "rank_id": rank, **fields}


def two_servers() -> dict[str, Any]:
    return {
        "version": "1.0",
        "status": "completed",
        "server_count": "2",
        "server_list": [
            {"server_id": "192.0.2.17", "device": [device("0", "3", device_ip="198.51.100.23", device_port="16701")]},
            {"server_id": "192.0.2.18", "device": [device("1", "0", device_ip="198.51.100.40", device_port="16702")]},
        ],
    }


def one_server(*devices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"version": "1.0", "server_list": [{"server_id": "here", "device": list(devices)}], **fields}


def read(table: Any) -> RankTable:
    return read_rank_table(json.dumps(table))


def test_two_servers() -> None:
    assert read(two_servers()) == RankTable(
        "1.0",
        (
            RankedDevice(0, "192.0.2.17", "3", "198.51.100.23", "16701", ""),
            RankedDevice(1, "192.0.2.18", "0", "198.51.100.40", "16702", ""),
        ),
    )


def test_super_pods() -> None:
    table = {
        "version": "1.2",
        "status": "completed",
        "server_count": "2",
        "server_list": [
            {"server_id": "node-a", "device": [device("0", "2", super_device_id="4718594", device_ip="198.51.100.52")]},
            {"server_id": "node-b", "device": [device("1", "2", super_device_id="5046274", device_ip="198.51.100.82")]},
        ],
        "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "node-a"}, {"server_id": "node-b"}]}],
    }
    assert [entry.super_device_id for entry in read(table).devices] == ["4718594", "5046274"]


def test_what_is_not_needed_may_be_missing() -> None:
    assert [entry.rank for entry in read(one_server(device("1"), device("0"))).devices] == [0, 1]


def test_numbers_may_be_numbers() -> None:
    written = one_server(device("0", "4", device_port="2000"), device("1", "5"), server_count="1")
    numbers = one_server(device(0, 4, device_port=2000), device(1, 5), server_count=1)
    assert read(numbers) == read(written)
    assert read(numbers).digest() == read(written).digest()


def test_order_and_layout_do_not_matter_but_content_does() -> None:
    table, other = two_servers(), two_servers()
    other["server_list"].reverse()
    assert read_rank_table(json.dumps(other, indent=4)).digest() == read(table).digest()
    other["server_list"][0]["device"][0]["device_ip"] = "198.51.100.41"
    assert read(other).digest() != read(table).digest()


def test_where_the_host_is() -> None:
    table = two_servers()
    table["server_list"][0]["host_ip"] = " 192.0.2.99 "
    table["server_list"][0]["device"][0]["host_port"] = 60005
    first, second = read(table).devices
    assert (first.host_ip, first.host_port) == ("192.0.2.99", "60005")
    assert (second.host_ip, second.host_port) == ("", "")
    assert read(table).digest() != read(two_servers()).digest()


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: Any) -> None:
        for step in path[:-1]:
            table = table[step]
        del table[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: Any) -> None:
        for step in path[:-1]:
            table = table[step]
        table[path[-1]] = value

    return change


FIRST = ("server_list", 0, "device", 0)
SECOND = ("server_list", 1, "device", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("version"), "version is missing, should be one of '1.0', '1.2', '1.3'"),
        (put("2.0", "version"), "version is '2.0'"),
        (put(1.0, "version"), "version is 1.0"),
        (put("initializing", "status"), "status is 'initializing', should be 'completed'"),
        (put("3", "server_count"), "server_count is '3', should be 2"),
        (put("two", "server_count"), "server_count is 'two', should be a number"),
        (without("server_list"), "server_list is missing"),
        (put([], "server_list"), "server_list is a list of 0"),
        (put({}, "server_list"), "server_list is a dict of 0"),
        (put(5, "server_list", 1), r"server_list\[1\] is 5, should be an object"),
        (without("server_list", 0, "server_id"), r"server_list\[0\].server_id is missing"),
        (put(17, "server_list", 0, "host_ip"), r"server_list\[0\].host_ip is 17, should be text"),
        (put("0", *FIRST, "host_port"), r"device\[0\].host_port is '0', should be 1 to 65535"),
        (put("65536", *SECOND, "host_port"), "should be 1 to 65535"),
        (put("s" * 65, "server_list", 0, "server_id"), "text of 1 to 64 characters"),
        (put("192.0.2.18", "server_list", 0, "server_id"), "server_id is '192.0.2.18' for two servers"),
        (without("server_list", 0, "device"), r"server_list\[0\].device is missing"),
        (put([], "server_list", 1, "device"), r"server_list\[1\].device is a list of 0"),
        (put("x", *FIRST), r"device\[0\] is 'x', should be an object"),
        (without(*FIRST, "rank_id"), r"server_list\[0\].device\[0\].rank_id is missing"),
        (without(*SECOND, "device_id"), r"server_list\[1\].device\[0\].device_id is missing"),
        (put("-1", *FIRST, "rank_id"), "rank_id is '-1'"),
        (put(True, *FIRST, "rank_id"), "rank_id is True"),
        (put("²", *FIRST, "rank_id"), "rank_id is '²'"),
        (put("1", *FIRST, "rank_id"), "rank_id is 1 for two devices"),
        (put("2", *SECOND, "rank_id"), "rank_id is 2, should be 1: ranks count from 0 without gaps"),
        (put("5", *FIRST, "rank_id"), "rank_id is 1, should be 0"),
        (put("70000", *FIRST, "device_port"), "device_port is '70000', should be 1 to 65535"),
        (put("0", *FIRST, "device_port"), "device_port is '0'"),
        (put([1], *FIRST, "device_ip"), "device_ip is a list of 1, should be text"),
    ],
)
def test_tables_that_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    table = two_servers()
    change(table)
    with pytest.raises(BadRankTable, match=message):
        read(table)


def test_two_ranks_on_one_device() -> None:
    with pytest.raises(BadRankTable, match="device_id is '4': server 'here' has it for ranks 0 and 1"):
        read(one_server(device("0", "4"), device("1", "4")))
    read(one_server(device("0", "4", device_port="2000"), device("1", "4", device_port="2001")))
    with pytest.raises(BadRankTable, match="device_ip is '198.51.100.7': ranks 0 and 1"):
        read(one_server(device("0", device_ip="198.51.100.6,198.51.100.7"), device("1", device_ip="198.51.100.7")))


@pytest.mark.parametrize("text", ["", "{", "nothing", "[" * 100_000, '{"version": "1.0"', "\x00"])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(BadRankTable, match="rank_table is no JSON"):
        read_rank_table(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(json_values, st.sampled_from([(), ("version",), ("server_list",), ("server_list", 0), FIRST]), st.data())
def test_any_value_anywhere_is_read_or_refused(value: Any, path: tuple[Any, ...], data: st.DataObject) -> None:
    table = two_servers()
    if path == FIRST:
        path = (*FIRST, data.draw(st.sampled_from(["rank_id", "device_id", "device_ip", "device_port"])))
    if path:
        put(value, *path)(table)
    else:
        table = value
    with contextlib.suppress(BadRankTable):
        read(table)
