"""The rank table of a link between two devices: each process has a part, and both make the same table of the two.

A part says where one device is: its server, its index there, the address of its network port, its place in a super pod.
A program gives it (``llm.LocalCommRes``), or it is made of what the runtime says of the device. The two processes
exchange their parts, and each merges them by itself; the text that comes out is the same, byte by byte, since HCCL
compares it.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_datadist.rank_table_fields import (
    BadRankTable,
    number,
    read_device,
    read_port,
    read_server,
    read_servers,
    read_table,
    read_text,
    require,
)

VERSIONS = ("1.0", "1.2")

# The second generation counts servers, the third one super pods of servers.
_VERSIONS_OF_SOCS = {
    **{f"Ascend910{name}": "1.0" for name in ("B1", "B2", "B2C", "B3", "B4", "B4-1")},
    **{f"Ascend910_{name}": "1.2" for name in ("9362", "9372", "9381", "9382", "9391", "9392")},
}
_LOWEST_PORT = 1024  # those below belong to the system
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LocalPart(NamedTuple):
    """Where the device of one process is; all fields are text, empty where nothing is known.

    Attributes
    ----------
    version : str
        One of `VERSIONS`.
    server_id : str
        1 to 64 characters, the same for all processes of a server and for no others.
    device_id : str
        Physical id on the server.
    host_ip : str
        Address of the server.
    super_pod_id, super_device_id : str
        Super pod of the server, and index of the device in it.
    device_ip, device_port, backup_device_ip, backup_device_port, host_port : str
        Of the device's own network ports and of its server; several addresses are separated by commas.
    """

    version: str
    server_id: str
    device_id: str
    host_ip: str = ""
    super_pod_id: str = ""
    super_device_id: str = ""
    device_ip: str = ""
    device_port: str = ""
    backup_device_ip: str = ""
    backup_device_port: str = ""
    host_port: str = ""

    def to_json(self) -> str:
        """Give the part in the form that `read_local_part` reads, for the other side of a link."""
        return json.dumps(_table(self.version, [[self]], ranked=False))


class LinkRankTable(NamedTuple):
    """What both sides of a link hand to HCCL.

    Attributes
    ----------
    text : str
        The table in JSON, the same on both sides.
    rank : int
        Of the own side: 0 or 1.
    """

    text: str
    rank: int


def read_local_part(text: str, name: str = "llm.LocalCommRes") -> LocalPart:
    """Read the part of one process: a rank table with one server and one device.

    Ids and ports may be numbers or text. ``server_count``, ``rank_id`` and unknown fields are passed over, and so are
    fields that the version does not have, and halves of a place in a super pod.

    Parameters
    ----------
    text : str
        JSON.
    name : str
        What messages call it.

    Raises
    ------
    BadRankTable
        It is no JSON, lacks a field, or has a value that cannot be; the text names the field.
    """
    table = read_table(name, text, VERSIONS)
    status = table.get("status", "completed")
    require(status == "completed", "status", status, "'completed'")
    servers = read_servers(table)
    require(len(servers) == 1, "server_list", servers, "one server, that of this process")
    server = read_server("server_list[0]", servers[0])
    require(len(server.devices) == 1, "server_list[0].device", server.devices, "one device, that of this process")
    where, content = "server_list[0].device[0]", server.devices[0]
    device = read_device(where, content)
    part = LocalPart(
        version=table["version"],
        server_id=server.server_id,
        device_id=device.device_id,
        host_ip=_host_address(server.host_ip),
        super_pod_id=_read_super_pod(table, server.server_id),
        super_device_id=_count(f"{where}.super_device_id", device.super_device_id),
        device_ip=_addresses(f"{where}.device_ip", device.device_ip),
        device_port=_count(where, read_port(where, content, "device_port", _LOWEST_PORT)),
        backup_device_ip=_addresses(f"{where}.backup_device_ip", read_text(where, content, "backup_device_ip")),
        backup_device_port=_count(where, read_port(where, content, "backup_device_port", _LOWEST_PORT)),
        host_port=_count(where, read_port(where, content, "host_port", _LOWEST_PORT)),
    )
    # Only what is handed on counts, else the two sides would see two different parts.
    if part.version == "1.0":
        part = part._replace(backup_device_ip="", backup_device_port="")
    if part.version == "1.0" or not part.super_pod_id or not part.super_device_id:
        part = part._replace(super_pod_id="", super_device_id="")
    return part


def make_local_part(
    soc_name: str,
    physical_id: int,
    *,
    device_ip: str = "",
    super_device_id: int | None = None,
    super_pod_id: int | None = None,
    server_id: str | None = None,
) -> LocalPart:
    """Make the part of this process of what the runtime says of its device.

    Parameters
    ----------
    soc_name : str
        For instance ``Ascend910B3``; decides the version.
    physical_id : int
        Index of the device on the server, >= 0.
    device_ip : str
        Address of its network port, see `llm_datadist.devices.ascend.device_address`; empty if it has none.
    super_device_id, super_pod_id : int, optional
        Where the device stands in a super pod, >= 0.
    server_id : str, optional
        Name of the server. If it is not given: the id that the kernel drew when it booted, which all containers of a
        server see alike.

    Raises
    ------
    BadRankTable
        The device is of a kind that is not known: the program has to give ``llm.LocalCommRes``; or an argument cannot
        be.
    """
    version = _VERSIONS_OF_SOCS.get(soc_name)
    if version is None:
        known = ", ".join(_VERSIONS_OF_SOCS)
        raise BadRankTable(f"the device is {soc_name!r}, should be one of {known}: set llm.LocalCommRes for others")
    part = LocalPart(
        version,
        _BOOT_ID.read_text(encoding="ascii").strip() if server_id is None else server_id,
        str(physical_id),
        super_pod_id="" if super_pod_id is None else str(number("super_pod_id", super_pod_id)),
        super_device_id="" if super_device_id is None else str(super_device_id),
        device_ip=device_ip,
    )
    return read_local_part(part.to_json())  # looks at the fields


def check_device(part: LocalPart, physical_id: int) -> None:
    """Refuse a part that speaks of another device than the one that the process uses.

    Raises
    ------
    BadRankTable
        `physical_id`, which the runtime says, is another one.
    """
    if part.device_id != str(physical_id):
        raise BadRankTable(
            f"device_id is {part.device_id!r}, should be '{physical_id}', the physical id of the device of this process"
        )


def needs_addresses(own: LocalPart, peer: LocalPart, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether HCCL connects the two devices over their network ports.

    Parameters
    ----------
    own, peer : LocalPart
        The two parts, in either order.
    environment : mapping
        HCCL_INTRA_ROCE_ENABLE=1 and HCCL_INTER_HCCS_DISABLE=true ask for the network where there is another way.
    """
    if own.server_id == peer.server_id:
        return environment.get("HCCL_INTRA_ROCE_ENABLE") == "1"
    same_pod = own.super_pod_id != "" and own.super_pod_id == peer.super_pod_id
    return not same_pod or environment.get("HCCL_INTER_HCCS_DISABLE", "").lower() == "true"


def merge_parts(own: LocalPart, peer: LocalPart, environment: Mapping[str, str] = os.environ) -> LinkRankTable:
    """Make the table of a link.

    Parameters
    ----------
    own, peer : LocalPart
        Of this process and of the other one.
    environment : mapping
        For `needs_addresses`.

    Returns
    -------
    LinkRankTable
        Its text is the same for ``merge_parts(peer, own)``, its rank the other one.

    Raises
    ------
    BadRankTable
        The two cannot be in one table: they are one device, contradict each other, or lack an address.
    """
    first, second = sorted((own, peer), key=_order)
    _require_two_places(first, second)
    _require_addresses(first, second, needs_addresses(own, peer, environment))
    same_server = first.server_id == second.server_id
    if same_server:
        for field in ("host_ip", "super_pod_id"):
            _require_agreement(field, first, second)
    version = min(first.version, second.version)
    text = json.dumps(_table(version, [[first, second]] if same_server else [[first], [second]], ranked=True))
    return LinkRankTable(text, 0 if own is first else 1)


# ---- reading


def _read_super_pod(table: dict[str, Any], server_id: str) -> str:
    """Give the super pod that a table puts the server in; empty if it says nothing."""
    pods = table.get("super_pod_list", [])
    require(isinstance(pods, list) and len(pods) <= 1, "super_pod_list", pods, "a list of one super pod")
    if not pods:
        return ""
    where = "super_pod_list[0]"
    require(isinstance(pods[0], dict), where, pods[0], "an object")
    pod_id = read_text(where, pods[0], "super_pod_id")
    require(pod_id, f"{where}.super_pod_id", pods[0].get("super_pod_id"), "text")
    members = pods[0].get("server_list")
    good = isinstance(members, list) and len(members) == 1 and isinstance(members[0], dict)
    require(good, f"{where}.server_list", members, "a list of one server")
    found = members[0].get("server_id")
    require(found == server_id, f"{where}.server_list[0].server_id", found, f"{server_id!r}, as in server_list")
    return pod_id


def _host_address(text: str) -> str:
    field = "server_list[0].host_ip"
    require("," not in text, field, text, "one address")
    return _addresses(field, text)


def _addresses(field: str, text: str) -> str:
    """Give addresses in their usual spelling, so that the same one looks the same in both parts."""
    found = []
    for part in text.replace(" ", "").split(",") if text.strip() else ():
        try:
            found.append(str(ipaddress.ip_address(part)))
        except ValueError:
            require(False, field, text, "an IPv4 or IPv6 address, or several with commas")
    return ",".join(found)


def _count(field: str, text: str) -> str:
    """Give a number that may be missing in its usual spelling."""
    return str(number(field, text)) if text else ""


# ---- merging


def _order(part: LocalPart) -> tuple[str, ...]:
    """Give what ranks are counted by: as text, so that "10" stands before "9"; both sides must do the same."""
    return (part.server_id, part.device_id, part.super_device_id, part.device_ip, part.device_port, *part)


def _require_two_places(first: LocalPart, second: LocalPart) -> None:
    if (first.server_id, first.device_id) == (second.server_id, second.device_id):
        raise BadRankTable(
            f"device_id is {first.device_id!r} on server {first.server_id!r} for both sides of the link, whatever their"
            " ports: should be two devices"
        )
    ports = [text for part in (first, second) for text in (part.device_ip, part.backup_device_ip) if text]
    seen: set[str] = set()
    for address in ",".join(ports).split(",") if ports else ():
        if address in seen:
            raise BadRankTable(f"device_ip is {address!r} for two ports of the link, may stand in a table once")
        seen.add(address)


def _require_addresses(first: LocalPart, second: LocalPart, needed: bool) -> None:
    for part in (first, second) if needed else ():
        if not part.device_ip:
            raise BadRankTable(
                f"device_ip is missing for device {part.device_id} of server {part.server_id!r}, should be the address"
                " of its network port, over which the two are linked: mount /etc/hccn.conf there, or set"
                " llm.LocalCommRes"
            )


def _require_agreement(field: str, first: LocalPart, second: LocalPart) -> None:
    values = {getattr(first, field), getattr(second, field)} - {""}
    if len(values) > 1:
        one, other = sorted(values)
        raise BadRankTable(
            f"{field} is {one!r} on one side of the link and {other!r} on the other, should be the same for server"
            f" {first.server_id!r}"
        )


# ---- writing

_DEVICE_FIELDS = ("device_id", "super_device_id", "device_ip", "device_port")
_FURTHER_FIELDS = ("backup_device_ip", "backup_device_port")
_OF_SUPER_PODS = {"super_device_id", *_FURTHER_FIELDS}  # fields that came with version 1.2


def _table(version: str, servers: list[list[LocalPart]], *, ranked: bool) -> dict[str, Any]:
    """Make a table of the parts of each server, in the order of their ranks."""
    parts = [part for server in servers for part in server]
    # Half of what is needed for super pods is as good as nothing to HCCL.
    with_pods = version != "1.0" and all(part.super_pod_id and part.super_device_id for part in parts)
    left_out = _OF_SUPER_PODS if version == "1.0" else set() if with_pods else {"super_device_id"}
    table: dict[str, Any] = {"version": version}
    if ranked:
        table.update(status="completed", server_count=str(len(servers)))
    table["server_list"] = []
    for members in servers:
        devices = []
        for part in members:
            fields = (*_DEVICE_FIELDS, *_FURTHER_FIELDS, "host_port")
            device = {name: getattr(part, name) for name in fields if name not in left_out and getattr(part, name)}
            if ranked:
                device["rank_id"] = str(parts.index(part))
            devices.append(device)
        host_ip = max(part.host_ip for part in members)
        server: dict[str, Any] = {"server_id": members[0].server_id, **({"host_ip": host_ip} if host_ip else {})}
        table["server_list"].append({**server, "device": devices})
    if with_pods:
        table["super_pod_list"] = _super_pods(servers)
    return table


def _super_pods(servers: list[list[LocalPart]]) -> list[dict[str, Any]]:
    pods: dict[str, list[dict[str, str]]] = {}
    for members in servers:
        pods.setdefault(members[0].super_pod_id, []).append({"server_id": members[0].server_id})
    return [{"super_pod_id": pod, "server_list": pods[pod]} for pod in sorted(pods)]
