"""Cluster files as rank tables of HCCL, and back: versions 1.0 and 1.2.

A rank table knows servers and devices, and nothing of roles, cluster ids and listening addresses: who reads one says
these. Each device of a cluster file is one rank. All values of a table are text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_document import Document, Path, read_document
from llm_datadist.cluster.cluster_fields import (
    DEVICE_FIELDS,
    PORT_MAX,
    SERVER_FIELDS,
    Field,
    choice,
    items,
    number,
    read_fields,
    text,
)
from llm_datadist.cluster.cluster_file import CLUSTER_ID_MAX, Cluster, ClusterFile, Device, Server, split_address
from llm_datadist.cluster.role_assignment import assign_roles

__all__ = ["cluster_rank_info", "from_rank_table", "to_rank_table"]

VERSIONS = ("1.0", "1.2")

_RANK_MAX = 2**32 - 1
_OF_SUPER_PODS = ("super_device_id", "backup_device_ip", "backup_device_port")  # fields that came with version 1.2


def to_rank_table(clusters: ClusterFile, version: str | None = None) -> str:
    """Write the rank table of all devices.

    Ranks count along the servers, in the order in which the clusters name them but those of a super pod in a row; on
    a server they count along the clusters.

    Parameters
    ----------
    clusters : ClusterFile
        Every cluster must have a server_id.
    version : str, optional
        ``"1.0"``, which says nothing of super pods, or ``"1.2"``. If it is not given it is 1.2 where the clusters need
        it.

    Returns
    -------
    str
        The table in JSON, on one line.

    Raises
    ------
    ValueError
        `version` is another one, a cluster has no server, two ranks share a device without ports that tell them apart,
        or some servers are in super pods, but another one or one of the devices has no id there.
    """
    servers = _by_server(clusters)
    of_super_pods = any(clusters.servers.get(server_id, Server()).super_pod_id for server_id in servers)
    if version is None:
        devices = [device for members in servers.values() for member in members for device in member.devices]
        newer = any(getattr(device, name) for device in devices for name in _OF_SUPER_PODS)
        version = "1.2" if of_super_pods or newer else "1.0"
    if version not in VERSIONS:
        raise ValueError(f"version is {version!r}, should be {' or '.join(map(repr, VERSIONS))}")
    left_out = _OF_SUPER_PODS if version == "1.0" else ()
    pods = _super_pods(clusters, servers) if of_super_pods and version == "1.2" else {}
    order = [server_id for server_ids in pods.values() for server_id in server_ids] or list(servers)
    table: dict[str, Any] = {"version": version, "status": "completed", "server_count": str(len(order))}
    table["server_list"] = []
    rank = 0
    for server_id in order:
        server = {"server_id": server_id, **_texts({"host_ip": clusters.servers.get(server_id, Server()).host_ip})}
        server["device"] = []
        for device in (device for member in servers[server_id] for device in member.devices):
            fields = {name: value for name, value in device._asdict().items() if name not in left_out}
            server["device"].append({**_texts(fields), "rank_id": str(rank)})
            rank += 1
        table["server_list"].append(server)
    if pods:
        table["super_pod_list"] = [
            {"super_pod_id": pod, "server_list": [{"server_id": server_id} for server_id in server_ids]}
            for pod, server_ids in pods.items()
        ]
    return json.dumps(table)


def cluster_rank_info(clusters: ClusterFile) -> dict[int, int]:
    """Give the rank of each cluster in the table of `to_rank_table`, as the call ``link`` takes it.

    Raises
    ------
    ValueError
        A cluster has several devices, and so several ranks, or the clusters have no table.
    """
    for cluster in clusters.clusters:
        if len(cluster.devices) > 1:
            raise ValueError(f"cluster {cluster.cluster_id} has {len(cluster.devices)} devices, should have one")
    table = json.loads(to_rank_table(clusters))
    members = _by_server(clusters)
    order = [member for server in table["server_list"] for member in members[server["server_id"]]]
    return {member.cluster_id: rank for rank, member in enumerate(order)}


def from_rank_table(
    table: str,
    roles: str,
    *,
    first_cluster_id: int = 1,
    listen_port: int | None = None,
    devices_per_cluster: int = 1,
    name: str = "rank table",
) -> ClusterFile:
    """Read a rank table, and say of its devices what it does not know.

    Parameters
    ----------
    table : str
        The table in JSON, version 1.0 or 1.2.
    roles : str
        Roles of the clusters, as `assign_roles` takes them.
    first_cluster_id : int
        Id of the first cluster; the others count on from it.
    listen_port : int, optional
        Port of the first device of each server; the further ones count on from it. A PROMPT listens there, at host_ip,
        or at server_id where there is none. Not needed without a PROMPT.
    devices_per_cluster : int
        How many devices, with ranks in a row and in one server, make a cluster.
    name : str
        What messages call the table.

    Raises
    ------
    ClusterFileError
        The table cannot be used: it is no JSON, lacks a field, or has a value that cannot be.
    ValueError
        Another argument is out of range, or does not fit the table.
    """
    document = read_document(table, name)
    ranked, servers = _read_table(document)
    size = devices_per_cluster
    if size < 1 or len(ranked) % size:
        raise ValueError(f"devices_per_cluster is {size}, should divide the {len(ranked)} devices")
    groups = [ranked[start : start + size] for start in range(0, len(ranked), size)]
    if not 0 <= first_cluster_id <= CLUSTER_ID_MAX - len(groups):
        raise ValueError(f"first_cluster_id is {first_cluster_id}, should be from 0 to {CLUSTER_ID_MAX - len(groups)}")
    clusters = []
    for index, (role, group) in enumerate(zip(assign_roles(roles, len(groups)), groups)):
        server_id = group[0].server_id
        if group[-1].server_id != server_id:
            raise ValueError(f"devices_per_cluster is {size}: one cluster would have devices of two servers")
        listen = _listen_ip_info(group, servers[server_id], listen_port) if role is LLMRole.PROMPT else ()
        devices = tuple(ranked.device for ranked in group)
        clusters.append(Cluster(first_cluster_id + index, role, devices, listen, server_id))
    return ClusterFile(tuple(clusters), {server_id: server for server_id, server in servers.items() if any(server)})


# ---- writing


def _by_server(clusters: ClusterFile) -> dict[str, list[Cluster]]:
    """Sort the clusters by server; each rank must have a place of its own."""
    servers: dict[str, list[Cluster]] = {}
    for cluster in clusters.clusters:
        if not cluster.server_id:
            raise ValueError(f"cluster {cluster.cluster_id} has no server_id, which a rank table needs")
        servers.setdefault(cluster.server_id, []).append(cluster)
    for server_id, members in servers.items():
        owners: dict[tuple[int, int | None], int] = {}
        for member in members:
            for device in member.devices:
                place = (device.device_id, device.device_port)
                if place in owners:
                    both = f"clusters {owners[place]} and {member.cluster_id}"
                    raise ValueError(
                        f"{both} have device {device.device_id} of server {server_id!r} with the same device_port; a"
                        " rank table needs a device, or at least a port, for each"
                    )
                owners[place] = member.cluster_id
    return servers


def _super_pods(clusters: ClusterFile, servers: Mapping[str, list[Cluster]]) -> dict[str, list[str]]:
    pods: dict[str, list[str]] = {}
    for server_id, members in servers.items():
        pod = clusters.servers.get(server_id, Server()).super_pod_id
        if not pod:
            raise ValueError(f"server {server_id!r} has no super_pod_id, but others have one")
        for member in members:
            if any(device.super_device_id is None for device in member.devices):
                raise ValueError(
                    f"cluster {member.cluster_id} is in super pod {pod!r} with a device without super_device_id"
                )
        pods.setdefault(pod, []).append(server_id)
    return pods


def _texts(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) for name, value in fields.items() if value not in (None, "")}


# ---- reading


class _Ranked(NamedTuple):
    rank: int
    server_id: str
    device: Device
    position: int  # in its server


_TABLE_FIELDS = {
    "version": Field(choice(*VERSIONS), required=True),
    "status": Field(choice("completed")),
    "server_count": Field(number(1, _RANK_MAX)),
    "server_list": Field(items, required=True),
    "super_pod_list": Field(items),
}
_SERVER_FIELDS = {
    "server_id": Field(text, required=True),
    "host_ip": SERVER_FIELDS["host_ip"],
    "device": Field(items, required=True),
}
_RANKED_FIELDS = {"rank_id": Field(number(0, _RANK_MAX), required=True), **DEVICE_FIELDS}
_POD_FIELDS = {"super_pod_id": Field(text, required=True), "server_list": Field(items, required=True)}
_POD_SERVER_FIELDS = {"server_id": Field(text, required=True)}


def _read_table(document: Document) -> tuple[list[_Ranked], dict[str, Server]]:
    """Give the devices in the order of their ranks, and the servers by id."""
    table = read_fields(document, (), document.content, _TABLE_FIELDS, others=True)
    ranked: list[_Ranked] = []
    servers: dict[str, Server] = {}
    for position, content in enumerate(table["server_list"]):
        path = ("server_list", position)
        server = read_fields(document, path, content, _SERVER_FIELDS, others=True)
        server_id = server["server_id"]
        if server_id in servers:
            raise document.error((*path, "server_id"), f"is {server_id!r} for a second server, should be different")
        servers[server_id] = Server(server.get("host_ip", ""))
        ranked += _read_devices(document, (*path, "device"), server_id, server["device"])
    count = table.get("server_count", len(servers))
    if count != len(servers):
        raise document.error(("server_count",), f"is {count}, should be {len(servers)}, as server_list has")
    _require_ranks(document, ranked)
    pods = _read_super_pods(document, table.get("super_pod_list", []), servers)
    return ranked, {name: server._replace(super_pod_id=pods.get(name, "")) for name, server in servers.items()}


def _read_devices(document: Document, path: Path, server_id: str, contents: Iterable[Any]) -> list[_Ranked]:
    devices = []
    for index, content in enumerate(contents):
        fields = read_fields(document, (*path, index), content, _RANKED_FIELDS, others=True)
        devices.append((fields.pop("rank_id"), Device(**fields)))
    devices.sort(key=lambda ranked: ranked[0])
    return [_Ranked(rank, server_id, device, index) for index, (rank, device) in enumerate(devices)]


def _require_ranks(document: Document, ranked: list[_Ranked]) -> None:
    """Sort the ranks; they must be 0, 1, ... without gaps, those of a server in a row."""
    ranked.sort(key=lambda one: one.rank)
    for expected, one in enumerate(ranked):
        if one.rank != expected:
            raise document.error(
                ("server_list",), f"has rank_id {one.rank}, should have {expected}: from 0 without gaps"
            )
        if one.position > 0 and ranked[expected - 1].server_id != one.server_id:
            other = ranked[expected - 1].server_id
            between = f"rank_id {expected - 1} of {other!r} between those of {one.server_id!r}"
            raise document.error(("server_list",), f"has {between}, should have the ranks of a server in a row")


def _read_super_pods(document: Document, contents: Iterable[Any], servers: Mapping[str, Server]) -> dict[str, str]:
    """Give the super pod of each server that is in one."""
    pod_of: dict[str, str] = {}
    for position, content in enumerate(contents):
        path = ("super_pod_list", position)
        pod = read_fields(document, path, content, _POD_FIELDS, others=True)
        for index, member in enumerate(pod["server_list"]):
            here = (*path, "server_list", index)
            server_id = read_fields(document, here, member, _POD_SERVER_FIELDS, others=True)["server_id"]
            if server_id not in servers or server_id in pod_of:
                wrong = "is in two places" if server_id in pod_of else "is not in the server_list of the table"
                raise document.error((*here, "server_id"), f"is {server_id!r}, which {wrong}")
            pod_of[server_id] = pod["super_pod_id"]
    return pod_of


def _listen_ip_info(group: Iterable[_Ranked], server: Server, listen_port: int | None) -> tuple[str, ...]:
    addresses = []
    for ranked in group:
        if listen_port is None:
            raise ValueError("listen_port is None, should be a port, since there are PROMPTs")
        port = listen_port + ranked.position
        if not 0 < port <= PORT_MAX:
            raise ValueError(f"listen_port is {listen_port}, which gives {port} to a PROMPT, should be 1 to {PORT_MAX}")
        host = server.host_ip or ranked.server_id
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            split_address(address)
        except ValueError as error:
            raise ValueError(f"server {ranked.server_id!r} would listen at {address!r}, {error}") from None
        addresses.append(address)
    return tuple(addresses)
