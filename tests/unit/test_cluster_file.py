"""Cluster files: what is read, what is refused and on which line, and that what is written reads the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import (
    Cluster,
    ClusterFile,
    ClusterFileError,
    Device,
    Server,
    parse_cluster_file,
    read_cluster_file,
    split_address,
)

EXAMPLE = """\
# two servers
version: 1
clusters:
  - cluster_id: 1
    role: PROMPT
    server_id: node-a
    listen_ip_info: 192.0.2.17:26000;192.0.2.17:26001
    devices:
      - {device_id: 3, device_ip: 198.51.100.23, device_port: 16701, super_device_id: 4718594}
      - 4
  - cluster_id: 0x10
    role: decoder
    listen_ip_info: ["[2001:db8::1]:26000"]
  - cluster_id: 18446744073709551615
    role: Mix
servers:
  node-a: {host_ip: 192.0.2.17, super_pod_id: "0"}
"""

CLUSTERS = ClusterFile(
    (
        Cluster(
            1,
            LLMRole.PROMPT,
            (Device(3, "198.51.100.23", 16701, super_device_id=4718594), Device(4)),
            ("192.0.2.17:26000", "192.0.2.17:26001"),
            "node-a",
        ),
        Cluster(16, LLMRole.DECODER, listen_ip_info=("[2001:db8::1]:26000",)),
        Cluster(2**64 - 1, LLMRole.MIX),
    ),
    {"node-a": Server("192.0.2.17", "0")},
)


def test_an_example(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(EXAMPLE)
    assert read_cluster_file(path) == CLUSTERS
    assert CLUSTERS.with_id(16).role is LLMRole.DECODER
    assert [cluster.cluster_id for cluster in CLUSTERS.with_role(LLMRole.PROMPT)] == [1]
    with pytest.raises(ValueError, match="cluster_id is 2, should be one of 1, 16, 18446744073709551615"):
        CLUSTERS.with_id(2)


def test_what_is_written_reads_the_same() -> None:
    assert parse_cluster_file(CLUSTERS.to_yaml()) == CLUSTERS
    assert parse_cluster_file(CLUSTERS.to_json()) == CLUSTERS
    assert "\n" not in CLUSTERS.to_json()
    assert json.loads(CLUSTERS.to_json())["clusters"][2] == {"cluster_id": 2**64 - 1, "role": "MIX", "devices": [0]}


ports = st.integers(1, 65535)
names = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=64)
ips = st.ip_addresses().map(str)
devices = st.builds(
    Device,
    st.integers(0, 2**31 - 1),
    st.one_of(st.just(""), ips),
    st.none() | ports,
    st.none() | ports,
    st.none() | st.integers(0, 2**64 - 1),
    st.one_of(st.just(""), ips),
    st.none() | ports,
)


@st.composite
def cluster_files(draw: st.DrawFn) -> ClusterFile:
    clusters = []
    for index in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(LLMRole))
        own = tuple(draw(st.lists(devices, min_size=1, max_size=3)))
        listens = role is LLMRole.PROMPT or draw(st.booleans())
        listen = tuple(f"10.0.{index}.{number}:{draw(ports)}" for number in range(len(own))) if listens else ()
        clusters.append(Cluster(draw(st.integers(0, 2**60)) * 4 + index, role, own, listen, draw(names | st.just(""))))
    server_ids = {cluster.server_id for cluster in clusters} - {""}
    about = {server_id: Server(draw(ips), draw(names | st.just(""))) for server_id in sorted(server_ids)}
    return ClusterFile(tuple(clusters), about)


@settings(deadline=None)
@given(cluster_files())
def test_any_file_that_is_written_reads_the_same(clusters: ClusterFile) -> None:
    assert parse_cluster_file(clusters.to_yaml()) == clusters
    assert parse_cluster_file(clusters.to_json()) == clusters


def one(**fields: Any) -> str:
    return json.dumps({"clusters": [{"cluster_id": 1, "role": "DECODER", **fields}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^f: is empty, should be an object with version, clusters, servers$"),
        ("[1]", "^f:1: is a list of 1, should be an object"),
        ("version: 2\nclusters: [1]", "^f:1: version is 2, should be 1$"),
        ("clusters: [1]\nversion: true", "^f:2: version is True, should be 1$"),
        ("a: 1\nb: 2", "^f:1: a is no field, should be one of version, clusters, servers$"),
        ("clusters:\n  1: 2", "^f:2: clusters has the field 1, should be text$"),
        ("clusters: []", "^f:1: clusters is a list of 0, should be a list with one entry at least$"),
        ("clusters:\n- x", r"^f:2: clusters\[0\] is 'x', should be an object with cluster_id, role, "),
        ("clusters:\n- role: MIX", r"^f:2: clusters\[0\].cluster_id is missing$"),
        ("clusters:\n- role: MIX\n  cluster_id: true", r"^f:3: clusters\[0\].cluster_id is True, should be a number"),
        ("clusters:\n- cluster_id: 1\n  role: READER", r"^f:3: clusters\[0\].role is 'READER', should be one of "),
        ("clusters:\n- cluster_id: 1\n  role: MIX\n  role: MIX", r"^f:4: clusters\[0\] has the field 'role' twice$"),
        ("clusters:\n- {cluster_id: 1, role: PROMPT}", r"^f:2: clusters\[0\].listen_ip_info is missing, a PROMPT"),
        (
            "clusters:\n- cluster_id: 1\n  role: MIX\n- cluster_id: 1\n  role: MIX",
            r"^f:4: clusters\[1\].cluster_id is 1, as in clusters\[0\]; should be different$",
        ),
        ("clusters: &all\n- *all", "^f:2: no YAML: aliases are not supported$"),
        ("clusters: [\n", "^f:2: no YAML: "),
        ("clusters: !!python/object:os.system {}", "^f:1: clusters is a dict of 0"),
        ("clusters: !!python/name:os.system", "^f:1: no YAML: could not determine a constructor"),
        ("a: \x00", "^f: no YAML: unacceptable character"),
        ("a: 2001-99-99", "^f: no YAML: "),
        ("[" * 100_000, "^f: no cluster file: it is nested too deeply$"),
        ('{"a":' * 100_000, "^f: no cluster file: it is nested too deeply$"),
        ('{"clusters":\n[}', "^f:2: no JSON: Expecting value, at column 2$"),
        ('{"clusters": [], "clusters": []}', "^f: field 'clusters' stands twice in one object$"),
        (one(cluster_id=2**64), r"^f: clusters\[0\].cluster_id is 18446744073709551616, should be a number from 0 "),
        (one(role=1), r"role is 1, should be one of"),
        (one(devices=[]), r"devices is a list of 0, should be"),
        (one(devices=[0, "x"]), r"devices\[1\].device_id is 'x', should be a number from 0 to 2147483647"),
        (one(devices=[{"device_id": 0, "device_ip": "x"}]), r"devices\[0\].device_ip is 'x', should be an IP address"),
        (one(devices=[{"device_id": 0, "device_port": 0}]), "device_port is 0, should be a number from 1 to 65535"),
        (one(devices=[{"device_ip": "::1"}]), r"devices\[0\].device_id is missing"),
        (one(server_id=7), "server_id is 7, should be text of 1 to 64 printable characters, in quotes"),
        (one(server_id="a" * 65), "server_id is 'aaa"),
        (one(server_id="a\n"), "server_id is 'a.n', should be text of 1 to 64 printable"),
        (one(listen_ip_info=26000), "listen_ip_info is 26000, should be host:port in quotes"),
        (one(listen_ip_info=["a:1", "b:x"], devices=[0, 1]), "with 'b:x': should be host:port"),
        (one(listen_ip_info="a:1;a:2"), "listen_ip_info has 2 addresses for 1 devices, should have one for each"),
        (one(listen_ip_info="a:1;a:1", devices=[0, 1]), "has 'a:1', as in clusters.0.; should be different"),
        (json.dumps({**json.loads(one()), "servers": {"b": {}}}), r"^f: servers.b is no server_id of any cluster$"),
        (json.dumps({**json.loads(one()), "servers": {"b": {"x": 1}}}), r"^f: servers.b.x is no field, should be "),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(ClusterFileError, match=message):
        parse_cluster_file(text, "f")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"clusters: \xff")
    with pytest.raises(ClusterFileError, match="cluster.yaml: no cluster file: byte 10 is not UTF-8"):
        read_cluster_file(path)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:26000", ("127.0.0.1", 26000)),
        ("[::1]:1", ("::1", 1)),
        ("node-a.example.org:65535", ("node-a.example.org", 65535)),
        ("prefill_1:80", ("prefill_1", 80)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", "node-a", ":1", "a:0", "a:65536", "a:x", "::1:26000", "[127.0.0.1]:1", "[::1]", "1.2.3.444:1",
     "1.2:1", "a b:1", "-a:1", "0.0.0.0:26000", "[::]:26000"],
)  # fmt: skip
def test_no_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="should be"):
        split_address(address)


def test_options_and_link_info() -> None:
    cluster = Cluster(7, LLMRole.PROMPT, (Device(0), Device(2)), ("127.0.0.1:26000", "127.0.0.1:26001"))
    assert cluster.options() == {"ge.exec.deviceId": "0;2", "llm.listenIpInfo": "127.0.0.1:26000;127.0.0.1:26001"}
    info = cluster.link_info()
    assert (info.remote_cluster_id, info.remote_role_type) == (7, LLMRole.PROMPT)
    assert [port for _, port in info.remote_ip_info_list] == [26000, 26001]
    assert len(info.local_ip_info_list) == 2
    assert Cluster(8, LLMRole.DECODER).options() == {"ge.exec.deviceId": "0"}
    with pytest.raises(ValueError, match="cluster 8 has no listen_ip_info, nobody can link to it"):
        Cluster(8, LLMRole.DECODER).link_info()
