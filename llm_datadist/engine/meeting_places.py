"""Where the members of a communicator meet: follows from the rank table, which all of them have.

On one host they meet on abstract Unix sockets, whatever the table says. Over TCP they meet at the address of the
server of each rank, and at a port that is the rank's own on its server. TCP is for

- members that the table puts on another server,
- members that it puts on the same server, if the address of that server is none of this network name space: then this
  process is in a container, and the other one may be in another container,
- all of them, if the settings allow nothing but tcp.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Callable, NamedTuple

from llm_datadist.engine.rank_table import BadRankTable, RankedDevice, RankTable
from llm_datadist.ip_address import find_ip, host_text
from llm_datadist.transports import shared_memory

Address = tuple[str, int]

BASE_PORT = "HCCL_IF_BASE_PORT"
PORT_RANGE = "HCCL_HOST_SOCKET_PORT_RANGE"
DEFAULT_BASE_PORT = 60000

_LOWEST_BASE, _HIGHEST_BASE = 1024, 65520  # documented for HCCL_IF_BASE_PORT
_MAX_PORT = 65535
_ANY_PORT = "auto"  # a range that says nothing

_PORT = re.compile(r"[0-9]{1,5}$")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?$")
_LOOKS_LIKE_AN_ADDRESS = re.compile(r"[0-9.]*$|.*:")


class MeetingPlaces(NamedTuple):
    """Where one member of a communicator waits for the others, and where it looks for them.

    Attributes
    ----------
    unix : bool
        Whether it does so on Unix sockets.
    own : (str, int) or None
        Address and port to listen at over TCP; the address is of this host, or stands for all of its addresses. None
        if nobody is met over TCP.
    others : dict of int to (str, int)
        Address and port of every rank that may be met over TCP.
    """

    unix: bool
    own: Address | None
    others: dict[int, Address]


UNIX_ALONE = MeetingPlaces(True, None, {})


def meeting_places(
    table: RankTable,
    ranks: Iterable[int],
    own_rank: int,
    transports: tuple[str, ...],
    environment: Mapping[str, str] = os.environ,
) -> MeetingPlaces:
    """Find where the members of a communicator meet. May ask for the address of a server that has a name.

    Parameters
    ----------
    table : RankTable
        Has a device for every rank.
    ranks : iterable of int
        Of the members.
    own_rank : int
        Of this process.
    transports : tuple of str
        That the settings allow.
    environment : mapping of str to str
        Has the ports, see `BASE_PORT` and `PORT_RANGE`.

    Raises
    ------
    BadRankTable
        Members must be met over TCP, and the table or the environment does not say where.
    """
    unix = shared_memory.NAME in transports
    own = table.devices[own_rank]
    others = [table.devices[rank] for rank in ranks if rank != own_rank]
    over_network = any(name != shared_memory.NAME for name in transports)
    if unix and over_network:
        others = [other for other in others if other.server_id != own.server_id or _is_in_a_container(own)]
    if not over_network or not others:
        return MeetingPlaces(unix, None, {})
    port_of = _Ports(table, environment)
    addresses = {other.server_id: _address_of(other) for other in [own, *others]}
    return MeetingPlaces(
        unix,
        (_address_to_bind(own, addresses[own.server_id]), port_of(own)),
        {other.rank: (addresses[other.server_id], port_of(other)) for other in others},
    )


# ---- addresses


def _is_in_a_container(own: RankedDevice) -> bool:
    """Tell whether a server has an address, not only a name, which is not to be seen from this process."""
    _, address = _called(own)
    return _is_address(address) and not _is_own(address)


def _called(device: RankedDevice) -> tuple[str, str]:
    """Give the field of a server that says where it is, and what it says."""
    return ("host_ip", device.host_ip) if device.host_ip else ("server_id", device.server_id)


def _is_address(text: str) -> bool:
    """Tell whether text is an address in the usual form, rather than a name or a label that happens to be a number."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        socket.inet_pton(family, text.partition("%")[0] if family is socket.AF_INET6 else text)
    except (OSError, UnicodeError, ValueError):
        return False
    return True


def _is_own(address: str) -> bool:
    """Tell whether an address is one of this network name space."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def _address_of(device: RankedDevice) -> str:
    field, text = _called(device)
    if _is_address(text):
        return text
    reason = "that is no address"
    if not _LOOKS_LIKE_AN_ADDRESS.match(text):
        try:
            return host_text(find_ip(text))
        except RuntimeError as error:
            reason = str(error)
    raise BadRankTable(
        f"{field} is {text!r}, should be an IP address, or the name of a host that can be resolved, since members meet"
        f" there over TCP ({reason}); give the server a host_ip, or set llm.Transport to shared_memory if all members"
        " are processes of one host"
    )


def _address_to_bind(own: RankedDevice, address: str) -> str:
    # Many a host takes its own name for an address of its loopback interface, at which others do not reach it.
    is_for_others = _is_address(_called(own)[1]) or not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if is_for_others and _is_own(address):
        return address
    return "::" if ":" in address else "0.0.0.0"


# ---- ports


class _Ports:
    """The port of every rank at its server: what the table says, or counted from one that all processes are told."""

    def __init__(self, table: RankTable, environment: Mapping[str, str]) -> None:
        self._table = table
        self._environment = environment

    def __call__(self, device: RankedDevice) -> int:
        """Give the port of a rank; raises `BadRankTable`."""
        here = [other for other in self._table.devices if other.server_id == device.server_id]
        port: Callable[[RankedDevice], str]
        for port in (lambda other: other.host_port, lambda other: other.device_port):
            if all(port(other) for other in here) and _differ(port(other) for other in here):
                return int(port(device))
        if not _differ(other.device_id for other in here):
            raise BadRankTable(
                f"device_id is {device.device_id!r} for several ranks of server {device.server_id!r}: members that meet"
                " over TCP need ports of their own, give each of them another host_port or device_port"
            )
        return self._count(int(device.device_id))

    def _count(self, device_id: int) -> int:
        text = self._environment.get(PORT_RANGE, "").strip()
        if text and text != _ANY_PORT:
            return _port_in(text, device_id)
        base = self._environment.get(BASE_PORT, "").strip() or str(DEFAULT_BASE_PORT)
        if not _PORT.match(base) or not _LOWEST_BASE <= int(base) <= _HIGHEST_BASE:
            raise BadRankTable(f"{BASE_PORT} is {base!r}, should be {_LOWEST_BASE} to {_HIGHEST_BASE}")
        if int(base) + device_id > _MAX_PORT:
            raise BadRankTable(
                f"device_id is {device_id}, the port of that device would be {BASE_PORT} {base} and as many more, which"
                f" is above {_MAX_PORT}: give every device of the server a host_port or device_port"
            )
        return int(base) + device_id


def _port_in(text: str, index: int) -> int:
    """Give the port at an index of ports and ranges such as ``60000,60050-60100``."""
    count = 0
    for part in text.split(","):
        match = _PORTS.match(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= _MAX_PORT:
            raise BadRankTable(f'{PORT_RANGE} is {text!r}, should be ports and ranges such as "60000,60050-60100"')
        if index < count + last - first + 1:
            return first + index - count
        count += last - first + 1
    raise BadRankTable(
        f"device_id is {index}, {PORT_RANGE} ({text}) has {count} ports: members that meet over TCP need one for every"
        " device id from 0 on"
    )


def _differ(values: Iterable[str]) -> bool:
    seen = list(values)
    return len(set(seen)) == len(seen)
