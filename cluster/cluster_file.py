"""The cluster file: which clusters there are, their roles, addresses and devices, written by people.

In YAML or JSON::

    clusters:
      - cluster_id: 1
        role: PROMPT
        listen_ip_info: 192.0.2.17:26000
        devices: [0]
      - cluster_id: 2
        role: DECODER

Each cluster is one process; a launcher gives the first one rank 0, the next one rank 1, and so on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from llm_datadist import LLMClusterInfo, LLMRole
from llm_datadist.cluster.cluster_document import (
    ClusterFileError,
    Document,
    Path,
    read_document,
    write_json,
    write_yaml,
)
from llm_datadist.cluster.cluster_fields import (
    DEVICE_FIELDS,
    PORT_MAX,
    SERVER_FIELDS,
    Field,
    choice,
    is_number,
    items,
    members,
    number,
    read_fields,
    text,
)
from llm_datadist.cluster.role_assignment import parse_role

__all__ = ["Cluster", "ClusterFile", "ClusterFileError", "Device", "Server", "parse_cluster_file", "read_cluster_file"]

VERSION = 1
CLUSTER_ID_MAX = 2**64 - 1

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


class Device(NamedTuple):
    """One device of a cluster; the fields are those of a rank table.

    Attributes
    ----------
    device_id : int
        Id of the device: 0 to 2**31 - 1. For a rank table it is the physical one.
    device_ip, backup_device_ip : str
        Addresses of its own network interfaces, several joined by a comma; empty if not given.
    device_port, host_port, backup_device_port : int or None
        1 to 65535.
    super_device_id : int or None
        Id in its super pod.
    """

    device_id: int
    device_ip: str = ""
    device_port: int | None = None
    host_port: int | None = None
    super_device_id: int | None = None
    backup_device_ip: str = ""
    backup_device_port: int | None = None


class Cluster(NamedTuple):
    """One cluster, which is one process.

    Attributes
    ----------
    cluster_id : int
        uint64, unique in the file.
    role : LLMRole
        Its role at the start.
    devices : tuple of Device
        At least one.
    listen_ip_info : tuple of str
        ``host:port`` for each device; an IPv6 address stands in brackets. Empty if it does not listen.
    server_id : str
        Server that it runs on; empty if it does not matter.
    """

    cluster_id: int
    role: LLMRole
    devices: tuple[Device, ...] = (Device(0),)
    listen_ip_info: tuple[str, ...] = ()
    server_id: str = ""

    def options(self) -> dict[str, str]:
        """Give the options of `LLMDataDist.init` that the file knows: the devices and where to listen.

        Examples
        --------
        >>> from llm_datadist import LLMRole
        >>> from llm_datadist.cluster.cluster_file import Cluster
        >>> Cluster(1, LLMRole.PROMPT, listen_ip_info=("127.0.0.1:26000",)).options()
        {'ge.exec.deviceId': '0', 'llm.listenIpInfo': '127.0.0.1:26000'}
        """
        options = {"ge.exec.deviceId": ";".join(str(device.device_id) for device in self.devices)}
        if self.listen_ip_info:
            options["llm.listenIpInfo"] = ";".join(self.listen_ip_info)
        return options

    def link_info(self) -> LLMClusterInfo:
        """Describe this cluster for `LLMDataDist.link_clusters` of another one with as many devices.

        Raises
        ------
        ValueError
            It does not listen.
        RuntimeError
            It listens at a host that `LLMClusterInfo` does not take.
        """
        if not self.listen_ip_info:
            raise ValueError(f"cluster {self.cluster_id} has no listen_ip_info, nobody can link to it")
        info = LLMClusterInfo()
        info.remote_cluster_id = self.cluster_id
        info.remote_role_type = self.role
        for address in self.listen_ip_info:
            info.append_local_ip_info("0.0.0.0", 0)
            info.append_remote_ip_info(*split_address(address))
        return info


class Server(NamedTuple):
    """What a rank table says about a server beyond its devices.

    Attributes
    ----------
    host_ip : str
        Address of its network interface; empty if not given.
    super_pod_id : str
        Super pod that it belongs to; empty if none.
    """

    host_ip: str = ""
    super_pod_id: str = ""


@dataclass(frozen=True)
class ClusterFile:
    """All clusters.

    Attributes
    ----------
    clusters : tuple of Cluster
        In the order of their ranks, at least one.
    servers : dict of str to Server
        By server id, those about which there is something to say.
    """

    clusters: tuple[Cluster, ...]
    servers: Mapping[str, Server] = field(default_factory=dict)

    def with_role(self, role: LLMRole) -> tuple[Cluster, ...]:
        """Give the clusters of a role, in the order of their ranks."""
        return tuple(cluster for cluster in self.clusters if cluster.role is role)

    def with_id(self, cluster_id: int) -> Cluster:
        """Give the cluster with an id.

        Raises
        ------
        ValueError
            There is none.
        """
        for cluster in self.clusters:
            if cluster.cluster_id == cluster_id:
                return cluster
        ids = ", ".join(str(cluster.cluster_id) for cluster in self.clusters)
        raise ValueError(f"cluster_id is {cluster_id!r}, should be one of {ids}")

    def to_json(self) -> str:
        """Write the file in JSON, on one line."""
        return write_json(self._content())

    def to_yaml(self) -> str:
        """Write the file in YAML."""
        return write_yaml(self._content())

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"version": VERSION, "clusters": [_cluster_content(one) for one in self.clusters]}
        if self.servers:
            content["servers"] = {name: _given(server._asdict()) for name, server in self.servers.items()}
        return content


def read_cluster_file(path: str | PathLike[str]) -> ClusterFile:
    """Read a cluster file.

    Raises
    ------
    ClusterFileError
        Its content cannot be used. The text gives line, field and value, and says what would be right.
    OSError
        The file cannot be read.
    """
    raw = FilePath(path).read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ClusterFileError(f"{path}: no cluster file: byte {error.start} is not UTF-8") from None
    return parse_cluster_file(text, str(path))


def parse_cluster_file(text: str, name: str = "cluster file") -> ClusterFile:
    """Read the text of a cluster file, YAML or JSON.

    Parameters
    ----------
    text : str
        Its content.
    name : str
        What messages call it.

    Raises
    ------
    ClusterFileError
        It cannot be used. The text gives line, field and value, and says what would be right.

    Examples
    --------
    >>> from llm_datadist.cluster.cluster_file import parse_cluster_file
    >>> file = parse_cluster_file("clusters: [{cluster_id: 1, role: PROMPT, listen_ip_info: 'node-a:26000'}]")
    >>> file.clusters[0].listen_ip_info
    ('node-a:26000',)
    """
    return _read_content(read_document(text, name))


def split_address(address: str) -> tuple[str, int]:
    """Split ``host:port``; the brackets of an IPv6 address are left away.

    Raises
    ------
    ValueError
        It is none, or one at which no peer can find this process, such as ``0.0.0.0:26000``.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    numeric = bracketed or re.fullmatch(r"[0-9.]+", host) is not None
    if not colon or not (numeric or _HOST_NAME.fullmatch(host)) or not is_number(port, 1, PORT_MAX):
        raise ValueError("should be host:port, with a port from 1 to 65535")
    if numeric:
        try:
            ip = ipaddress.IPv6Address(host) if bracketed else ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError("should be [host]:port with an IPv6 address, or host:port with IPv4 or a name") from None
        if ip.is_unspecified:
            raise ValueError("should be an address at which peers find the cluster")
    return host, int(port)


# ---- from plain values to clusters


def _read_content(document: Document) -> ClusterFile:
    """Check plain values and make a file of them; raises as `parse_cluster_file` does."""
    fields = read_fields(document, (), document.content, _FILE_FIELDS)
    clusters = tuple(
        _read_cluster(document, ("clusters", index), one) for index, one in enumerate(document.content["clusters"])
    )
    servers = {
        name: Server(**read_fields(document, ("servers", name), server, SERVER_FIELDS))
        for name, server in fields.get("servers", {}).items()
    }
    _require_different(document, clusters)
    named = {cluster.server_id for cluster in clusters}
    for name in servers:
        if name not in named:
            raise document.error(("servers", name), "is no server_id of any cluster")
    return ClusterFile(clusters, servers)


def _read_cluster(document: Document, path: Path, content: Any) -> Cluster:
    fields = read_fields(document, path, content, _CLUSTER_FIELDS)
    if "devices" in fields:
        fields["devices"] = tuple(
            _read_device(document, (*path, "devices", index), device) for index, device in enumerate(content["devices"])
        )
    cluster = Cluster(**fields)
    if cluster.role is LLMRole.PROMPT and not cluster.listen_ip_info:
        raise document.error((*path, "listen_ip_info"), "is missing, a PROMPT needs one for each device")
    if cluster.listen_ip_info and len(cluster.listen_ip_info) != len(cluster.devices):
        count = f"{len(cluster.listen_ip_info)} addresses for {len(cluster.devices)} devices"
        raise document.error((*path, "listen_ip_info"), f"has {count}, should have one for each")
    return cluster


def _read_device(document: Document, path: Path, content: Any) -> Device:
    if not isinstance(content, dict):  # an id alone
        content = {"device_id": content}
    return Device(**read_fields(document, path, content, DEVICE_FIELDS))


def _require_different(document: Document, clusters: Iterable[Cluster]) -> None:
    ids: dict[int, int] = {}
    addresses: dict[tuple[str, int], int] = {}
    for index, cluster in enumerate(clusters):
        path = ("clusters", index)
        if ids.setdefault(cluster.cluster_id, index) != index:
            other = f"as in clusters[{ids[cluster.cluster_id]}]"
            raise document.error((*path, "cluster_id"), f"is {cluster.cluster_id}, {other}; should be different")
        for address in cluster.listen_ip_info:
            place = split_address(address)
            if place in addresses:
                other = f"as in clusters[{addresses[place]}]"
                raise document.error((*path, "listen_ip_info"), f"has {address!r}, {other}; should be different")
            addresses[place] = index


# ---- what fields may be


def _role(value: Any) -> LLMRole:
    try:
        return parse_role(value)
    except (AttributeError, ValueError):
        raise ValueError(f"should be one of {', '.join(LLMRole.__members__)}") from None


def _addresses(value: Any) -> tuple[str, ...]:
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError("should be host:port in quotes, or a list of them, one for each device")
    for part in parts:
        try:
            split_address(part)
        except ValueError as error:
            raise ValueError(f"with {part!r}: {error}" if len(parts) > 1 else str(error)) from None
    return tuple(parts)


_FILE_FIELDS = {
    "version": Field(choice(VERSION)),
    "clusters": Field(items, required=True),
    "servers": Field(members),
}
_CLUSTER_FIELDS = {
    "cluster_id": Field(number(0, CLUSTER_ID_MAX), required=True),
    "role": Field(_role, required=True),
    "listen_ip_info": Field(_addresses),
    "devices": Field(items),
    "server_id": Field(text),
}


# ---- from clusters to plain values


def _cluster_content(cluster: Cluster) -> dict[str, Any]:
    content = _given(cluster._asdict())
    content["role"] = cluster.role.name
    content["devices"] = [_device_content(device) for device in cluster.devices]
    if cluster.listen_ip_info:
        content["listen_ip_info"] = ";".join(cluster.listen_ip_info)
    return content


def _device_content(device: Device) -> int | dict[str, Any]:
    content = _given(device._asdict())
    return device.device_id if len(content) == 1 else content


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "", ())}
