"""Fields of rank tables: what tables of whole communicators and the parts of single processes have in common.

Every value of a table is text, but programs write numbers too, so ids and ports may be either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

_MAX_SERVER_ID = 64  # characters
_MAX_PORT = 65535
_COUNT = "a number from 0 on, as text"


class BadRankTable(ValueError):
    """A table that cannot be used; the text names the field, its value, and what would be right."""


class ServerFields(NamedTuple):
    """What a table says of a server.

    Attributes
    ----------
    server_id : str
        1 to 64 characters.
    host_ip : str
        Empty where the table does not say.
    devices : list
        Not looked at, at least one; for `read_device`.
    """

    server_id: str
    host_ip: str
    devices: list[Any]


class DeviceFields(NamedTuple):
    """What a table says of a device; all are text, empty where the table does not say.

    Attributes
    ----------
    device_id, super_device_id : str
        Index on the server, and in its super pod.
    device_ip : str
        Address of its network port, without blanks; several are separated by commas.
    device_port, host_port : str
        1 to 65535.
    """

    device_id: str
    device_ip: str
    device_port: str
    super_device_id: str
    host_port: str


def read_table(name: str, text: str, versions: Sequence[str]) -> dict[str, Any]:
    """Read a JSON object that has one of the versions.

    Raises
    ------
    BadRankTable
        It is something else.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRankTable(f"{name} is no JSON: {error}") from error
    require(isinstance(table, dict), name, table, "a JSON object")
    version = table.get("version")
    require(version in versions, "version", version, "one of " + ", ".join(map(repr, versions)))
    assert isinstance(table, dict)
    return table


def read_servers(table: dict[str, Any]) -> list[Any]:
    """Give the servers of a table, at least one; raises what `read_table` raises."""
    servers = table.get("server_list")
    require(isinstance(servers, list) and servers, "server_list", servers, "a list of servers")
    assert isinstance(servers, list)
    return servers


def read_server(where: str, server: Any) -> ServerFields:
    """Check one of the servers; `where` names it in messages. Raises what `read_table` raises."""
    require(isinstance(server, dict), where, server, "an object")
    server_id = server.get("server_id")
    require(
        isinstance(server_id, str) and 0 < len(server_id) <= _MAX_SERVER_ID,
        f"{where}.server_id",
        server_id,
        f"text of 1 to {_MAX_SERVER_ID} characters",
    )
    host_ip = server.get("host_ip", "")
    require(isinstance(host_ip, str), f"{where}.host_ip", host_ip, "text")
    devices = server.get("device")
    require(isinstance(devices, list) and devices, f"{where}.device", devices, "a list of devices")
    return ServerFields(server_id, host_ip.strip(), devices)


def read_device(where: str, device: Any) -> DeviceFields:
    """Check one of the devices; `where` names it in messages. Raises what `read_table` raises."""
    require(isinstance(device, dict), where, device, "an object")
    require("device_id" in device, f"{where}.device_id", None, _COUNT)
    return DeviceFields(
        device_id=str(number(f"{where}.device_id", device["device_id"])),
        device_ip=read_text(where, device, "device_ip").replace(" ", ""),
        device_port=read_port(where, device, "device_port"),
        super_device_id=read_text(where, device, "super_device_id"),
        host_port=read_port(where, device, "host_port"),
    )


def read_text(where: str, owner: dict[str, Any], field: str) -> str:
    """Give a field that may be missing; a number becomes text. Raises what `read_table` raises."""
    value = owner.get(field, "")
    require(isinstance(value, str) or _is_count(value), f"{where}.{field}", value, "text")
    return str(value)


def read_port(where: str, owner: dict[str, Any], field: str, lowest: int = 1) -> str:
    """Give a port that may be missing; raises what `read_table` raises."""
    port = owner.get(field, "")
    if port != "":
        good = lowest <= number(f"{where}.{field}", port) <= _MAX_PORT
        require(good, f"{where}.{field}", port, f"{lowest} to {_MAX_PORT}")
    return str(port)


def number(field: str, value: Any) -> int:
    """Give a number from 0 on, which may be text; raises what `read_table` raises."""
    is_text = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20
    require(is_text or _is_count(value), field, value, _COUNT)
    return int(value)


def require(good: object, field: str, value: object, expected: str) -> None:
    """Refuse a value of a field."""
    if not good:
        raise BadRankTable(f"{field} is {_shown(value)}, should be {expected}")


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:100]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
