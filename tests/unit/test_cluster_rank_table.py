"""Cluster files as rank tables, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import Cluster, ClusterFile, ClusterFileError, Device, Server
from llm_datadist.cluster.rank_table import cluster_rank_info, from_rank_table, to_rank_table
from llm_datadist.engine.rank_table import read_rank_table
from tests.unit.test_cluster_file import EXAMPLE

P, D = LLMRole.PROMPT, LLMRole.DECODER

TWO_SERVERS: dict[str, Any] = {
    "version": "1.0",
    "status": "completed",
    "server_count": "2",
    "server_list": [
        {
            "server_id": "192.0.2.17",
            "device": [{"device_id": "3", "device_ip": "198.51.100.23", "device_port": "16701", "rank_id": "0"}],
        },
        {
            "server_id": "192.0.2.18",
            "host_ip": "203.0.113.18",
            "device": [{"device_id": "0", "device_ip": "198.51.100.40", "host_port": "16702", "rank_id": "1"}],
        },
    ],
}

SUPER_PODS: dict[str, Any] = {
    "version": "1.2",
    "status": "completed",
    "server_count": "2",
    "server_list": [
        {
            "server_id": "node-a",
            "device": [
                {"device_id": "2", "device_ip": "198.51.100.52", "super_device_id": "4718594", "rank_id": "0"},
                {"device_id": "3", "device_ip": "198.51.100.53", "super_device_id": "4784131", "rank_id": "1"},
            ],
        },
        {
            "server_id": "node-b",
            "device": [
                {
                    "device_id": "2",
                    "device_ip": "198.51.100.82",
                    "super_device_id": "5046274",
                    "backup_device_ip": "2001:db8::82",
                    "backup_device_port": "16703",
                    "rank_id": "2",
                }
            ],
        },
    ],
    "super_pod_list": [{"super_pod_id": "0", "server_list": [{"server_id": "node-a"}, {"server_id": "node-b"}]}],
}


@pytest.mark.parametrize("table", [TWO_SERVERS, SUPER_PODS])
def test_a_table_there_and_back(table: dict[str, Any]) -> None:
    clusters = from_rank_table(json.dumps(table), "prompts=1", listen_port=26000)
    written = to_rank_table(clusters)
    assert json.loads(written) == table
    assert from_rank_table(written, "prompts=1", listen_port=26000) == clusters
    assert len(read_rank_table(written).devices) == len(clusters.clusters)  # the library takes it


def test_what_a_table_does_not_say() -> None:
    clusters = from_rank_table(json.dumps(TWO_SERVERS), "DECODER,PROMPT", first_cluster_id=7, listen_port=26000)
    first = Cluster(7, D, (Device(3, "198.51.100.23", 16701),), server_id="192.0.2.17")
    second = Cluster(8, P, (Device(0, "198.51.100.40", host_port=16702),), ("203.0.113.18:26000",), "192.0.2.18")
    assert clusters == ClusterFile((first, second), {"192.0.2.18": Server("203.0.113.18")})


def test_several_prompts_of_a_server_listen_at_ports_in_a_row() -> None:
    clusters = from_rank_table(json.dumps(SUPER_PODS), "prompts=3", listen_port=26000)
    assert [cluster.listen_ip_info for cluster in clusters.clusters] == [
        ("node-a:26000",),
        ("node-a:26001",),
        ("node-b:26000",),
    ]


def test_clusters_of_several_devices() -> None:
    table = {**SUPER_PODS, "server_count": "1", "server_list": SUPER_PODS["server_list"][:1]}
    del table["super_pod_list"]
    clusters = from_rank_table(json.dumps(table), "prompts=1", listen_port=26000, devices_per_cluster=2)
    assert clusters.clusters[0].options() == {
        "ge.exec.deviceId": "2;3",
        "llm.listenIpInfo": "node-a:26000;node-a:26001",
    }
    assert json.loads(to_rank_table(clusters)) == table
    with pytest.raises(ValueError, match="cluster 1 has 2 devices, should have one"):
        cluster_rank_info(clusters)
    with pytest.raises(ValueError, match="devices_per_cluster is 2, should divide the 3 devices"):
        from_rank_table(json.dumps(SUPER_PODS), "prompts=0", devices_per_cluster=2)
    with pytest.raises(ValueError, match="devices_per_cluster is 3: one cluster would have devices of two servers"):
        from_rank_table(json.dumps(SUPER_PODS), "prompts=0", devices_per_cluster=3)


def interleaved() -> ClusterFile:
    """Servers b and c are in one super pod, a is in another; the clusters name them in turns."""
    servers = ["b", "a", "c", "b"]
    clusters = [
        Cluster(10 + index, D, (Device(index, super_device_id=100 + index),), server_id=server)
        for index, server in enumerate(servers)
    ]
    return ClusterFile(tuple(clusters), {"b": Server("", "1"), "a": Server("", "0"), "c": Server("", "1")})


def test_ranks_of_a_server_and_servers_of_a_pod_are_in_a_row() -> None:
    table = json.loads(to_rank_table(interleaved()))
    assert [server["server_id"] for server in table["server_list"]] == ["b", "c", "a"]
    ranks = [(device["rank_id"], device["device_id"]) for server in table["server_list"] for device in server["device"]]
    assert ranks == [("0", "0"), ("1", "3"), ("2", "2"), ("3", "1")]
    assert cluster_rank_info(interleaved()) == {10: 0, 13: 1, 12: 2, 11: 3}
    assert table["super_pod_list"] == [
        {"super_pod_id": "1", "server_list": [{"server_id": "b"}, {"server_id": "c"}]},
        {"super_pod_id": "0", "server_list": [{"server_id": "a"}]},
    ]


def test_version_1_0_says_nothing_of_super_pods() -> None:
    table = json.loads(to_rank_table(interleaved(), version="1.0"))
    assert (table["version"], "super_pod_list" in table) == ("1.0", False)
    assert [server["server_id"] for server in table["server_list"]] == ["b", "a", "c"]
    assert table["server_list"][1]["device"] == [{"device_id": "1", "rank_id": "2"}]
    with pytest.raises(ValueError, match="version is '1.1', should be '1.0' or '1.2'"):
        to_rank_table(interleaved(), version="1.1")


def of_servers(*clusters: Cluster, **servers: Server) -> ClusterFile:
    return ClusterFile(clusters, servers)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (of_servers(Cluster(1, D)), "cluster 1 has no server_id, which a rank table needs"),
        (
            of_servers(Cluster(1, D, server_id="a"), Cluster(2, D, server_id="a")),
            "clusters 1 and 2 have device 0 of server 'a' with the same device_port",
        ),
        (
            of_servers(Cluster(1, D, server_id="a"), Cluster(2, D, server_id="b"), a=Server("", "0")),
            "cluster 1 is in super pod '0' with a device without super_device_id",
        ),
        (
            of_servers(
                Cluster(1, D, (Device(0, super_device_id=5),), server_id="a"),
                Cluster(2, D, (Device(0, super_device_id=6),), server_id="b"),
                a=Server("", "0"),
            ),
            "server 'b' has no super_pod_id, but others have one",
        ),
    ],
)
def test_clusters_without_a_table(clusters: ClusterFile, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_rank_table(clusters)


def test_ports_tell_ranks_on_one_device_apart() -> None:
    shared = [Cluster(number, D, (Device(0, device_port=16700 + number),), server_id="a") for number in (1, 2)]
    assert len(read_rank_table(to_rank_table(of_servers(*shared))).devices) == 2


def changed(**fields: Any) -> str:
    return json.dumps({**TWO_SERVERS, **fields})


def server(server_id: Any = "a", *ranks: Any, **fields: Any) -> dict[str, Any]:
    return {"server_id": server_id, "device": [{"device_id": str(rank), "rank_id": rank} for rank in ranks], **fields}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[]", "^rank table:1: is a list of 0, should be an object"),
        ("{", "^rank table:1: no JSON"),
        (changed(version="1.1"), "^rank table: version is '1.1', should be '1.0' or '1.2'$"),
        (changed(version=1.0), "version is 1.0, should be"),
        (changed(version=None), "version is missing"),
        (changed(status="initializing"), "status is 'initializing', should be 'completed'"),
        (changed(server_count="3"), "server_count is 3, should be 2, as server_list has"),
        (changed(server_list={}), "server_list is a dict of 0, should be a list"),
        (changed(server_list=[server("a")]), r"server_list\[0\].device is a list of 0, should be"),
        (
            changed(server_list=[server("a", 0), server("a", 1)]),
            r"server_list\[1\].server_id is 'a' for a second server",
        ),
        (changed(server_list=[server(4, 0)]), r"server_list\[0\].server_id is 4, should be text"),
        (changed(server_list=[server("a", "x")]), r"server_list\[0\].device\[0\].rank_id is 'x', should be a number"),
        (changed(server_list=[server("a", 0), server("b", 2)]), "server_list has rank_id 2, should have 1"),
        (changed(server_list=[server("a", 0), server("b", 0)]), "server_list has rank_id 0, should have 1"),
        (
            changed(server_list=[server("a", 0, 2), server("b", 1)]),
            "server_list has rank_id 1 of 'b' between those of 'a', should have the ranks of a server in a row",
        ),
        (
            changed(super_pod_list=[{"super_pod_id": "0", "server_list": [{"server_id": "x"}]}]),
            r"super_pod_list\[0\].server_list\[0\].server_id is 'x', which is not in the server_list of the table",
        ),
        (
            changed(super_pod_list=[{"super_pod_id": "0", "server_list": [{"server_id": "192.0.2.17"}] * 2}]),
            r"server_list\[1\].server_id is '192.0.2.17', which is in two places",
        ),
    ],
)
def test_tables_that_cannot_be_used(table: str, message: str) -> None:
    with pytest.raises(ClusterFileError, match=message):
        from_rank_table(table, "prompts=0")


def test_arguments_that_do_not_fit() -> None:
    table = json.dumps(TWO_SERVERS)
    with pytest.raises(ValueError, match="listen_port is None, should be a port, since there are PROMPTs"):
        from_rank_table(table, "prompts=1")
    with pytest.raises(ValueError, match="listen_port is 65536, which gives 65536 to a PROMPT, should be 1 to 65535"):
        from_rank_table(table, "prompts=1", listen_port=65536)
    with pytest.raises(ValueError, match="first_cluster_id is -1, should be from 0"):
        from_rank_table(table, "prompts=0", first_cluster_id=-1)
    with pytest.raises(ValueError, match="'prompts=3' are for 3 ranks, but there are 2"):
        from_rank_table(table, "prompts=3")
    machine = changed(server_count="1", server_list=[server("a machine", 0)])
    with pytest.raises(ValueError, match="server 'a machine' would listen at 'a machine:26000', should be host:port"):
        from_rank_table(machine, "prompts=1", listen_port=26000)


def test_a_cluster_file_of_people_is_no_rank_table() -> None:
    with pytest.raises(ClusterFileError, match="rank table:2: version is 1, should be '1.0' or '1.2'"):
        from_rank_table(EXAMPLE, "prompts=1")
