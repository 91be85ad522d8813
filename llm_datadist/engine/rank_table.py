"""The rank table of a communicator: which device of which server each rank is. Reads and checks it.

Every value of a table is text, but programs write numbers too, so ids and ports may be either. What is not needed to
tell ranks apart is passed over.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from llm_datadist.rank_table_fields import (
    BadRankTable,
    number,
    read_device,
    read_server,
    read_servers,
    read_table,
    require,
)

__all__ = ["VERSIONS", "BadRankTable", "RankTable", "RankedDevice", "read_rank_table"]

VERSIONS = ("1.0", "1.2", "1.3")


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
    table = read_table("rank_table", text, VERSIONS)
    status = table.get("status", "completed")
    require(status == "completed", "status", status, "'completed'")
    servers = read_servers(table)
    if "server_count" in table:
        count = number("server_count", table["server_count"])
        require(count == len(servers), "server_count", table["server_count"], f"{len(servers)}, as server_list has")
    devices = [
        device for index, server in enumerate(servers) for device in _read_server(f"server_list[{index}]", server)
    ]
    _require_different("server_id", [server["server_id"] for server in servers], "servers")
    devices.sort()
    _require_ranks([device.rank for device in devices])
    _require_places(devices)
    return RankTable(table["version"], tuple(devices))


def _read_server(where: str, content: Any) -> list[RankedDevice]:
    server = read_server(where, content)
    return [
        _read_device(f"{where}.device[{index}]", server.server_id, server.host_ip, device)
        for index, device in enumerate(server.devices)
    ]


def _read_device(where: str, server_id: str, host_ip: str, content: Any) -> RankedDevice:
    device = read_device(where, content)
    require("rank_id" in content, f"{where}.rank_id", None, "a number from 0 on, as text")
    return RankedDevice(
        number(f"{where}.rank_id", content["rank_id"]),
        server_id,
        device.device_id,
        device.device_ip,
        device.device_port,
        device.super_device_id,
        host_ip,
        device.host_port,
    )


def _require_ranks(ranks: list[int]) -> None:
    """Refuse ranks, given in ascending order, that are not 0, 1, ... without gaps."""
    _require_different("rank_id", ranks, "devices")
    for expected, rank in enumerate(ranks):
        require(rank == expected, "rank_id", rank, f"{expected}: ranks count from 0 without gaps")


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
