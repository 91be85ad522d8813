"""The rank table of a communicator: which device of which server each rank is. Reads and checks it.

Every value of a table is text, but programs write numbers too, so ids and ports may be either. What is not needed to
tell ranks apart is passed over.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

VERSIONS = ("1.0", "1.2", "1.3")

_MAX_SERVER_ID = 64  # characters
_MAX_PORT = 65535


class BadRankTable(ValueError):
    """A table that cannot be used; the text names the field, its value, and what would be right."""


class RankedDevice(NamedTuple):
    """The device of one rank.

    Attributes
    ----------
    rank : int
        From 0 on.
    server_id : str
        The server that it is in.
    device_id, device_ip, device_port, super_device_id : str
        As the table says; empty where it does not.
    host_ip, host_port : str
        Address of the server, and port that the process of this rank has there; empty where the table does not say.
    """

    rank: int
    server_id: str
    device_id: str
    device_ip: str
    device_port: str
    super_device_id: str
    host_ip: str = ""
    host_port: str = ""


class RankTable(NamedTuple):
    """A table that was checked.

    Attributes
    ----------
    version : str
        One of `VERSIONS`.
    devices : tuple of RankedDevice
        In the order of their ranks, one for each.
    """

    version: str
    devices: tuple[RankedDevice, ...]

    def digest(self) -> bytes:
        """Give 32 bytes that are equal for two tables exactly if these say the same, in whatever order and spelling."""
        return hashlib.sha256(json.dumps(self).encode()).digest()


def read_rank_table(text: str) -> RankTable:
    """Read a table in JSON.

    Raises
    ------
    BadRankTable
        It is no JSON, lacks a field, or has a value that cannot be.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRankTable(f"rank_table is no JSON: {error}") from error
    _require(isinstance(table, dict), "rank_table", table, "a JSON object")
    version = table.get("version")
    _require(version in VERSIONS, "version", version, "one of " + ", ".join(map(repr, VERSIONS)))
    status = table.get("status", "completed")
    _require(status == "completed", "status", status, "'completed'")
    servers = table.get("server_list")
    _require(isinstance(servers, list) and servers, "server_list", servers, "a list of servers")
    if "server_count" in table:
        count = _number("server_count", table["server_count"])
        _require(count == len(servers), "server_count", table["server_count"], f"{len(servers)}, as server_list has")
    devices = [
        device for index, server in enumerate(servers) for device in _read_server(f"server_list[{index}]", server)
    ]
    _require_different("server_id", [server["server_id"] for server in servers], "servers")
    devices.sort()
    _require_ranks([device.rank for device in devices])
    _require_places(devices)
    return RankTable(version, tuple(devices))


def _read_server(where: str, server: Any) -> list[RankedDevice]:
    _require(isinstance(server, dict), where, server, "an object")
    server_id = server.get("server_id")
    _require(
        isinstance(server_id, str) and 0 < len(server_id) <= _MAX_SERVER_ID,
        f"{where}.server_id",
        server_id,
        f"text of 1 to {_MAX_SERVER_ID} characters",
    )
    host_ip = server.get("host_ip", "")
    _require(isinstance(host_ip, str), f"{where}.host_ip", host_ip, "text")
    devices = server.get("device")
    _require(isinstance(devices, list) and devices, f"{where}.device", devices, "a list of devices")
    return [
        _read_device(f"{where}.device[{index}]", server_id, host_ip.strip(), device)
        for index, device in enumerate(devices)
    ]


def _read_device(where: str, server_id: str, host_ip: str, device: Any) -> RankedDevice:
    _require(isinstance(device, dict), where, device, "an object")
    for field in ("rank_id", "device_id"):
        _require(field in device, f"{where}.{field}", None, "a number from 0 on, as text")
    for field in ("device_ip", "super_device_id"):
        value = device.get(field, "")
        _require(isinstance(value, str) or _is_count(value), f"{where}.{field}", value, "text")
    for field in ("device_port", "host_port"):
        port = device.get(field, "")
        if port != "":
            _require(0 < _number(f"{where}.{field}", port) <= _MAX_PORT, f"{where}.{field}", port, "1 to 65535")
    return RankedDevice(
        _number(f"{where}.rank_id", device["rank_id"]),
        server_id,
        str(_number(f"{where}.device_id", device["device_id"])),
        str(device.get("device_ip", "")).replace(" ", ""),
        str(device.get("device_port", "")),
        str(device.get("super_device_id", "")),
        host_ip,
        str(device.get("host_port", "")),
    )


def _require_ranks(ranks: list[int]) -> None:
    """Refuse ranks, given in ascending order, that are not 0, 1, ... without gaps."""
    _require_different("rank_id", ranks, "devices")
    for expected, rank in enumerate(ranks):
        _require(rank == expected, "rank_id", rank, f"{expected}: ranks count from 0 without gaps")


def _require_places(devices: list[RankedDevice]) -> None:
    """Refuse two ranks on one device, unless ports tell them apart."""
    ids: dict[tuple[str, str, str], RankedDevice] = {}
    addresses: dict[tuple[str, str], RankedDevice] = {}
    for device in devices:
        place = (device.server_id, device.device_id, device.device_port)
        other = ids.setdefault(place, device)
        if other is not device:
            reason = f"server {device.server_id!r} has it for ranks {other.rank} and {device.rank} with the same port"
            raise BadRankTable(f"device_id is {device.device_id!r}: {reason}, give each its own")
        for address in filter(None, device.device_ip.split(",")):
            other = addresses.setdefault((address, device.device_port), device)
            if other is not device:
                reason = f"ranks {other.rank} and {device.rank} have it with the same port, give each its own"
                raise BadRankTable(f"device_ip is {address!r}: {reason}")


def _require_different(field: str, values: list[Any], owners: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise BadRankTable(f"{field} is {value!r} for two {owners}, must be different")
        seen.add(value)


def _require(good: object, field: str, value: object, expected: str) -> None:
    if not good:
        raise BadRankTable(f"{field} is {_shown(value)}, should be {expected}")


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:100]


def _number(field: str, value: Any) -> int:
    is_text = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20
    _require(is_text or _is_count(value), field, value, "a number from 0 on, as text")
    return int(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
