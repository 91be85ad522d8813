"""Rank tables: those of the documentation are taken, and every rule is refused when it is broken, with a reason."""

from __future__ import annotations

import copy
import ctypes
import json
import threading
from typing import Any

import pytest

from tests.ascend_simulator.rank_process import (
    E_OPEN_FILE,
    E_PARA,
    E_TIMEOUT,
    SUCCESS,
    Rank,
    buffer,
    config,
    contents,
    counter,
    create_from_table,
    destroy,
    disconnect,
    identity,
    on,
    post,
    synchronise,
    taken,
    text,
    together,
)

ONE_SERVER: dict[str, Any] = {
    "version": "1.0",
    "status": "completed",
    "server_count": "1",
    "server_list": [
        {
            "server_id": "192.0.2.17",
            "device": [
                {"device_id": "0", "device_ip": "198.51.100.20", "rank_id": "0"},
                {"device_id": "5", "device_ip": "198.51.100.25", "rank_id": "1"},
            ],
        }
    ],
}
TWO_SERVERS: dict[str, Any] = {
    "version": "1.0",
    "status": "completed",
    "server_count": "2",
    "server_list": [
        {
            "server_id": "192.0.2.17",
            "device": [{"device_id": "3", "device_ip": "127.0.0.1", "device_port": "16701", "rank_id": "0"}],
        },
        {
            "server_id": "192.0.2.18",
            "device": [{"device_id": "0", "device_ip": "127.0.0.2", "device_port": "16702", "rank_id": "1"}],
        },
    ],
}
SUPER_POD: dict[str, Any] = {
    "version": "1.2",
    "status": "completed",
    "server_count": "2",
    "server_list": [
        {
            "server_id": "node-a",
            "device": [{"device_id": "2", "super_device_id": "4718594", "device_ip": "127.0.0.1", "rank_id": "0"}],
        },
        {
            "server_id": "node-b",
            "device": [{"device_id": "2", "super_device_id": "5046274", "device_ip": "127.0.0.2", "rank_id": "1"}],
        },
    ],
    "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "node-a"}, {"server_id": "node-b"}]}],
}


def changed(table: dict[str, Any], *path: Any, to: Any = None) -> dict[str, Any]:
    """The table with one field set, or taken out."""
    result = copy.deepcopy(table)
    place: Any = result
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return result


DEVICE = ("server_list", 0, "device", 0)
OTHER = ("server_list", 0, "device", 1)

BROKEN: list[tuple[str, Any, str]] = [
    ("not json", "{", "string expected"),
    ("comment", "{} // why", "something follows"),
    ("trailing comma", '{"version": "1.0",}', "string expected"),
    ("twice", '{"version": "1.0", "version": "1.0"}', "twice"),
    ("array", "[]", "must be an object"),
    ("too long", " " * 65537, "at most 65536"),
    ("number", changed(ONE_SERVER, *DEVICE, "rank_id", to=0), '"rank_id" of a device must be a string'),
    ("count as number", changed(ONE_SERVER, "server_count", to=1), "must be a string"),
    ("no version", changed(ONE_SERVER, "version"), 'lacks "version"'),
    ("version", changed(ONE_SERVER, "version", to="1.1"), '"1.0" or "1.2"'),
    ("1.2 on A2", changed(ONE_SERVER, "version", to="1.2"), "super pods"),
    ("no status", changed(ONE_SERVER, "status"), 'lacks "status"'),
    ("status", changed(ONE_SERVER, "status", to="initializing"), "completed"),
    ("no count", changed(ONE_SERVER, "server_count"), 'lacks "server_count"'),
    ("count", changed(ONE_SERVER, "server_count", to="2"), "there are 1 servers"),
    ("no servers", changed(ONE_SERVER, "server_list", to=[]), "1 to 64 servers"),
    ("no server id", changed(ONE_SERVER, "server_list", 0, "server_id"), 'lacks "server_id"'),
    ("long server id", changed(ONE_SERVER, "server_list", 0, "server_id", to="s" * 65), "1 to 64 characters"),
    ("empty server id", changed(ONE_SERVER, "server_list", 0, "server_id", to=""), "1 to 64 characters"),
    ("same server id", changed(TWO_SERVERS, "server_list", 1, "server_id", to="192.0.2.17"), "occurs twice"),
    ("host ip", changed(ONE_SERVER, "server_list", 0, "host_ip", to="host"), "no address"),
    ("no devices", changed(ONE_SERVER, "server_list", 0, "device", to=[]), "has no device"),
    ("no device id", changed(ONE_SERVER, *DEVICE, "device_id"), 'lacks "device_id"'),
    ("device id", changed(ONE_SERVER, *DEVICE, "device_id", to="zero"), "must be a number"),
    ("leading zero", changed(ONE_SERVER, *DEVICE, "device_id", to="00"), "must be a number"),
    ("same device", changed(ONE_SERVER, *OTHER, "device_id", to="0"), "occurs twice"),
    ("no rank", changed(ONE_SERVER, *DEVICE, "rank_id"), 'lacks "rank_id"'),
    ("same rank", changed(ONE_SERVER, *OTHER, "rank_id", to="0"), "occurs twice"),
    ("gap", changed(ONE_SERVER, *OTHER, "rank_id", to="2"), "not in a row"),
    ("gap between servers", changed(TWO_SERVERS, "server_list", 1, "device", 0, "rank_id", to="2"), "without gaps"),
    ("address", changed(ONE_SERVER, *DEVICE, "device_ip", to="198.51.100"), "no address"),
    ("same address", changed(ONE_SERVER, *OTHER, "device_ip", to="198.51.100.20"), "occurs twice"),
    ("in a list", changed(ONE_SERVER, *OTHER, "device_ip", to="198.51.100.9,198.51.100.20"), "occurs twice"),
    ("low port", changed(ONE_SERVER, *DEVICE, "device_port", to="1023"), "from 1024 to 65535"),
    ("high port", changed(ONE_SERVER, *DEVICE, "device_port", to="65536"), "from 1024 to 65535"),
    ("unknown field", changed(ONE_SERVER, *DEVICE, "devise_ip", to="198.51.100.1"), "unknown field"),
    ("field of 1.2", changed(ONE_SERVER, *DEVICE, "super_device_id", to="1"), "belongs to version 1.2"),
    ("pods in 1.0", changed(ONE_SERVER, "super_pod_list", to=[]), "belongs to version 1.2"),
    ("no address for RoCE", changed(TWO_SERVERS, "server_list", 0, "device", 0, "device_ip"), "needs a device_ip"),
    (
        "no address for RoCE there",
        changed(TWO_SERVERS, "server_list", 1, "device", 0, "device_ip"),
        "needs a device_ip",
    ),
]
BROKEN_PODS: list[tuple[str, Any, str]] = [
    ("unknown server", changed(SUPER_POD, "super_pod_list", 0, "server_list", 0, "server_id", to="node-c"), "has not"),
    ("twice", changed(SUPER_POD, "super_pod_list", 0, "server_list", 0, "server_id", to="node-b"), "twice"),
    ("missing", changed(SUPER_POD, "super_pod_list", 0, "server_list", 0), "in no super pod"),
    ("number", changed(SUPER_POD, "super_pod_list", 0, "super_pod_id", to=0), "must be a string"),
    ("super device", changed(SUPER_POD, *DEVICE, "super_device_id", to="x"), "must be a number"),
]


@pytest.fixture
def rank(program):
    """Starts processes with a device."""
    return lambda device=0, **knobs: Rank(program(HBM_MIB=64, **knobs), device)


def try_all(state, tables, rank=0):
    """Code and reason for each table."""
    return [(create_from_table(state, table, rank, name="table"), state["text"]) for table in tables]


def as_text(table: Any) -> str:
    """Tables that are objects as JSON."""
    return table if isinstance(table, str) else json.dumps(table)


@pytest.mark.parametrize(("knobs", "cases", "device"), [({}, BROKEN, 0), ({"SOC": "Ascend910_9391"}, BROKEN_PODS, 2)])
def test_each_broken_rule_is_refused_with_its_reason(rank, knobs, cases, device):
    process = rank(device, **knobs)
    answers = process.call(try_all, [as_text(table) for _, table, _ in cases])
    wrong = [
        (name, answer)
        for (name, _, reason), answer in zip(cases, answers)
        if answer[0] != E_PARA or reason not in answer[1]
    ]
    assert not wrong
    process.finish()


@pytest.mark.parametrize(
    ("table", "device", "number", "knobs"),
    [
        (ONE_SERVER, 0, 0, {}),
        (ONE_SERVER, 5, 1, {}),
        (changed(changed(ONE_SERVER, *DEVICE, "device_ip"), *OTHER, "device_ip", to=""), 0, 0, {}),
        (changed(ONE_SERVER, *DEVICE, "device_ip", to="198.51.100.20,2001:db8::20"), 0, 0, {}),
        (TWO_SERVERS, 3, 0, {}),
        (TWO_SERVERS, 0, 1, {}),
        (SUPER_POD, 2, 0, {"SOC": "Ascend910_9391"}),
        (changed(SUPER_POD, "super_pod_list"), 2, 1, {"SOC": "Ascend910_9391"}),
        (changed(SUPER_POD, "server_count"), 2, 1, {"SOC": "Ascend910_9391"}),
        (TWO_SERVERS, 3, 0, {"SOC": "Ascend910_9391"}),
    ],
)
def test_good_tables_are_taken_without_the_peer(rank, free_port, table, device, number, knobs):
    process = rank(device, **knobs)
    assert process.call(create_from_table, with_ports(free_port, table), number, name="table") == SUCCESS, process.call(
        text
    )
    assert process.call(identity) == (2, number, "table")
    disconnect(process)


def test_roce_inside_a_server_needs_addresses(rank):
    process = rank(0, HCCL_INTRA_ROCE_ENABLE=1)
    table = as_text(changed(ONE_SERVER, *OTHER, "device_ip"))
    assert process.call(create_from_table, table, 0, name="table") == E_PARA
    assert "device_ip" in process.call(text)


def test_the_rank_must_be_on_the_device(rank):
    process = rank(0, MISUSE="error")
    assert process.call(create_from_table, as_text(ONE_SERVER), 1, name="table") == E_PARA
    assert process.call(create_from_table, as_text(ONE_SERVER), 2, name="table") == E_PARA
    assert process.call(counter, "misuse.comm_thread") == 1


def test_the_physical_id_counts(rank):
    process = rank(1, ASCEND_RT_VISIBLE_DEVICES="3,5")
    assert process.call(create_from_table, as_text(ONE_SERVER), 1, name="table") == SUCCESS
    disconnect(process)


def test_a_name_is_needed_and_must_be_new(rank):
    process = rank(0, MISUSE="error")
    assert process.call(create_from_table, as_text(ONE_SERVER), 0) == E_PARA
    assert "needs a name" in process.call(text)
    assert process.call(create_from_table, as_text(ONE_SERVER), 0, name="n" * 127, key="first") == SUCCESS
    assert process.call(create_from_table, as_text(ONE_SERVER), 0, name="n" * 127) == E_PARA
    assert process.call(counter, "misuse.comm_duplicate_name") == 1
    disconnect(process, key="first")


def from_file(state, path):
    comm = ctypes.c_void_p()
    code = taken(state).call("HcclCommInitClusterInfoConfig", path.encode(), 0, config(name="file"), ctypes.byref(comm))
    state["comm"] = comm.value
    return code


def test_a_table_in_a_file(rank, tmp_path):
    process = rank(0)
    path = tmp_path / "ranks.json"
    path.write_text(as_text(ONE_SERVER))
    assert process.call(from_file, str(path)) == SUCCESS
    assert process.call(destroy) == SUCCESS
    assert process.call(from_file, str(tmp_path / "none")) == E_OPEN_FILE
    assert process.call(from_file, "/" * 4096) == E_PARA
    path.write_text(" " * 70000)
    assert process.call(from_file, str(path)) == E_PARA
    process.finish()


def move(sender: Rank, receiver: Rank, size: int) -> None:
    """One send, compared."""
    data = bytes(range(256)) * (size // 256)
    sender.call(buffer, "data", data)
    receiver.call(buffer, "data", size)
    calls = [on(sender, post, "Send", "data", size, 1), on(receiver, post, "Recv", "data", size, 0)]
    assert together(calls) == [SUCCESS] * 2
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2
    assert receiver.call(contents, "data", size) == data


def test_two_processes_meet_by_a_table(rank):
    one, other = rank(0), rank(5)
    table = as_text(ONE_SERVER)
    assert other.call(create_from_table, table, 1, name="link") == SUCCESS
    assert one.call(create_from_table, table, 0, name="link") == SUCCESS
    move(one, other, 1 << 20)


def with_ports(free_port, table: dict[str, Any] = TWO_SERVERS) -> str:
    """The table with ports on which nobody listens."""
    table = copy.deepcopy(table)
    for server in table["server_list"]:
        for device in server["device"]:
            device["device_port"] = str(free_port())
    return as_text(table)


def test_two_servers_meet_by_tcp(rank, free_port):
    one, other = rank(3), rank(0)
    table = with_ports(free_port)
    assert (
        together(
            [on(one, create_from_table, table, 0, name="link"), on(other, create_from_table, table, 1, name="link")]
        )
        == [SUCCESS] * 2
    )
    move(one, other, 3 << 20)


@pytest.mark.parametrize("servers", [1, 2])
def test_two_links_of_the_same_processes_at_once(rank, free_port, servers):
    one, other = (rank(0), rank(5)) if servers == 1 else (rank(3), rank(0))
    table = as_text(ONE_SERVER) if servers == 1 else with_ports(free_port)
    for name in ("first", "second"):
        assert other.call(create_from_table, table, 1, name=name, key=name) == SUCCESS
    one.call(buffer, "data", b"1" * 64)
    other.call(buffer, "data", 64)
    waiting = [other.begin(post, "Recv", "data", 64, 0, comm=name) for name in ("second",)]
    assert one.call(create_from_table, table, 0, name="first", key="first") == SUCCESS
    assert one.call(create_from_table, table, 0, name="second", key="second") == SUCCESS
    assert one.call(post, "Send", "data", 64, 1, comm="second") == SUCCESS
    assert [each.result() for each in waiting] == [SUCCESS]
    assert together([on(one, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    assert (
        together(
            [on(one, post, "Send", "data", 64, 1, comm="first"), on(other, post, "Recv", "data", 64, 0, comm="first")]
        )
        == [SUCCESS] * 2
    )
    assert together([on(one, synchronise), on(other, synchronise)]) == [SUCCESS] * 2


def test_different_tables_are_refused_at_both_ends(rank):
    one, other = rank(0, MISUSE="error"), rank(5, MISUSE="error")
    assert one.call(create_from_table, as_text(ONE_SERVER), 0, name="link") == SUCCESS
    assert other.call(create_from_table, as_text(ONE_SERVER) + " ", 1, name="link") == SUCCESS
    for process in (one, other):
        process.call(buffer, "data", 64)
    calls = [on(one, post, "Send", "data", 64, 1), on(other, post, "Recv", "data", 64, 0)]
    assert together(calls) == [E_PARA] * 2
    assert [process.call(counter, "misuse.comm_differs") for process in (one, other)] == [1, 1]
    assert "different rank tables" in one.call(text)


def test_different_names_are_noticed_when_the_time_is_over(rank):
    one, other = rank(0, MISUSE="error", TIME_SCALE="0.004"), rank(5, MISUSE="error")
    assert one.call(create_from_table, as_text(ONE_SERVER), 0, name="link") == SUCCESS
    assert other.call(create_from_table, as_text(ONE_SERVER), 1, name="lint") == SUCCESS
    for process in (one, other):
        process.call(buffer, "data", 64)
    calls = [on(one, post, "Send", "data", 64, 1), on(other, post, "Recv", "data", 64, 0)]
    assert together(calls) == [E_PARA] * 2
    assert [process.call(counter, "misuse.comm_differs") for process in (one, other)] == [1, 1]


def test_a_peer_that_was_never_made(rank):
    other = rank(5, TIME_SCALE="0.002")
    assert other.call(create_from_table, as_text(ONE_SERVER), 1, name="link") == SUCCESS
    other.call(buffer, "data", 64)
    assert other.call(post, "Recv", "data", 64, 0) == E_TIMEOUT
    assert other.call(destroy) == SUCCESS


def test_processes_that_share_a_device_need_a_port_each(rank):
    one, other = rank(0), rank(0)
    assert one.call(create_from_table, as_text(ONE_SERVER), 0, name="link") == SUCCESS
    assert other.call(create_from_table, as_text(ONE_SERVER), 0, name="link") != SUCCESS
    assert "device_port" in other.call(text)
    table = as_text(changed(ONE_SERVER, *DEVICE, "device_port", to="16777"))
    assert other.call(create_from_table, table, 0, name="link") == SUCCESS


def create_on_fresh_thread(state):
    codes = []
    library = state["device"].library
    thread = threading.Thread(target=lambda: codes.append(library.HcclCommInitClusterInfoMemConfig(b"", 0, None, None)))
    thread.start()
    thread.join()
    return codes[0]


def test_a_creation_without_device(rank):
    process = rank(0, MISUSE="error")
    assert process.call(create_on_fresh_thread) != SUCCESS
    assert process.call(counter, "misuse.comm_thread") == 1
