"""What the process is in the cluster: its devices and the addresses that it listens on.

The option ``llm.ClusterInfo`` describes it in JSON. If it is absent it is made of ``ge.exec.deviceId`` and
``llm.listenIpInfo``, and ``init`` writes it into the program's dictionary. A program may use that dictionary again for
another instance, whose role or address differ, so a text that this process made counts as absent.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llm_datadist.arguments import INT32_MAX, UINT32_MAX, UINT64_MAX, check_uint16
from llm_datadist.ip_address import Ip, find_ip, host_text, split_host_port
from llm_datadist.option_text import option_number, option_text
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument

CLUSTER_INFO = "llm.ClusterInfo"
DEVICE_ID = "ge.exec.deviceId"
LISTEN_IP_INFO = "llm.listenIpInfo"
RANK_ID = "ge.exec.rankId"

_UINT16_MAX = 2**16 - 1

_made_here: set[str] = set()  # what `init` has written into options, which a program may use again


class OwnCluster(NamedTuple):
    """The process in its cluster.

    Attributes
    ----------
    cluster_id : int
        Id of the cluster.
    device_ids : tuple of int
        Devices that the process drives.
    listen : tuple of (str, int)
        IP and port for each device; empty unless PROMPT.
    text : str
        The description in JSON.
    """

    cluster_id: int
    device_ids: tuple[int, ...]
    listen: tuple[tuple[str, int], ...]
    text: str


def own_cluster(role: LLMRole, cluster_id: int, options: dict[str, str]) -> OwnCluster:
    """Read or make the description; raises what `read_init_options` documents."""
    text = option_text(options, CLUSTER_INFO)
    if text is None or (text in _made_here and DEVICE_ID in options):
        return _make(role, cluster_id, options)
    return _parse(role, options, text)


# ---- made of simpler options


def _make(role: LLMRole, cluster_id: int, options: dict[str, str]) -> OwnCluster:
    devices_text = option_text(options, DEVICE_ID)
    if devices_text is None:
        raise InvalidArgument(f"{DEVICE_ID} is required, should be the device id, or several ids joined by ';'")
    groups = devices_text.split(";")
    listen: list[tuple[Ip, int]] = []
    if role is LLMRole.PROMPT:
        listen = _parse_listen(options, len(groups))
    device_ids = _parse_device_ids(devices_text)
    description: dict[str, Any] = {
        "cluster_id": cluster_id,
        "logic_device_id": [f"0:0:{index}:0" for index in range(len(device_ids))],
    }
    if listen:
        description["listen_ip_info"] = [{"ip": ip, "port": port} for ip, port in listen]
    text = json.dumps(description)
    _made_here.add(text)
    return OwnCluster(cluster_id, device_ids, _texts(listen), text)


def _parse_listen(options: dict[str, str], num_devices: int) -> list[tuple[Ip, int]]:
    text = option_text(options, LISTEN_IP_INFO)
    if not text:
        raise InvalidArgument(f"neither {CLUSTER_INFO} nor {LISTEN_IP_INFO} was specified, a PROMPT needs its address")
    entries = text.split(";")
    if len(entries) != num_devices:
        raise InvalidArgument(
            f"{LISTEN_IP_INFO} {text!r} has {len(entries)} addresses for {num_devices} devices, should be one for each"
        )
    return [parse_listen_ip_info(entry) for entry in entries]


def switch_listen(options: dict[str, str] | None) -> tuple[str, int]:
    """Read where a process listens that becomes a PROMPT: one ``ip:port`` in ``llm.listenIpInfo``.

    Raises as `own_cluster` does.
    """
    text = None if options is None else option_text(options, LISTEN_IP_INFO)
    if not text:
        raise InvalidArgument(f"{LISTEN_IP_INFO} is not in switch_options, a PROMPT needs an address to listen at")
    ip, port = parse_listen_ip_info(text)
    return host_text(ip), port


def optional_listen(options: dict[str, str] | None) -> tuple[str, int] | None:
    """Read where a process in cache-manager mode listens: one ``ip:port``, None if it does not.

    Raises as `own_cluster` does.
    """
    text = None if options is None else option_text(options, LISTEN_IP_INFO)
    if not text:
        return None
    if ";" in text:
        raise InvalidArgument(f"{LISTEN_IP_INFO} is {text!r}, should be one ip:port in cache-manager mode")
    ip, port = parse_listen_ip_info(text)
    return host_text(ip), port


def parse_listen_ip_info(entry: str) -> tuple[Ip, int]:
    """Read one ``ip:port``; gives address (see `find_ip`) and port, raises as `own_cluster` does.

    An IPv6 address stands in brackets; a name is resolved.
    """
    parts = split_host_port(entry)
    if parts is None:
        raise InvalidArgument(f"{LISTEN_IP_INFO} has the entry {entry!r}, should be ip:port, or [ip]:port for IPv6")
    ip, port = parts
    address = find_ip(ip)
    try:
        number = int(port)
    except ValueError:
        raise ValueError(f"{LISTEN_IP_INFO} has the port {port!r}, should be a number") from None
    return address, check_uint16("port", number)


def _parse_device_ids(text: str) -> tuple[int, ...]:
    ids = [option_number(f"{DEVICE_ID} {text!r}: an id", group, 0, INT32_MAX) for group in text.split(";")]
    return tuple(device_id for device_id in ids if device_id is not None)


# ---- given by the program


def _parse(role: LLMRole, options: dict[str, str], text: str) -> OwnCluster:
    document = _parse_document(text)
    if "cluster_id" not in document:
        raise InvalidArgument(f"{CLUSTER_INFO} has no cluster_id")
    cluster_id = _number(document, "cluster_id", UINT64_MAX)
    logic_ids = [_logic_device(entry) for entry in _list(document, "logic_device_id")]
    listen = [_listen_entry(entry) for entry in _list(document, "listen_ip_info")]
    rank = option_number(RANK_ID, option_text(options, RANK_ID), 0, INT32_MAX)
    if rank is not None:
        logic_ids, listen = _of_rank("logic_device_id", logic_ids, rank), _of_rank("listen_ip_info", listen, rank)
    devices_text = option_text(options, DEVICE_ID)
    device_ids = tuple(logic_ids) or (0,)
    if devices_text is not None:
        device_ids = _parse_device_ids(devices_text)
        if logic_ids and len(logic_ids) != len(device_ids):
            raise InvalidArgument(
                f"{DEVICE_ID} {devices_text!r} names {len(device_ids)} devices, but logic_device_id of {CLUSTER_INFO}"
                f" has {len(logic_ids)}, the numbers should be equal"
            )
    if role is not LLMRole.PROMPT:
        return OwnCluster(cluster_id, device_ids, (), text)
    if len(listen) != len(device_ids):
        raise InvalidArgument(
            f"listen_ip_info of {CLUSTER_INFO} has {len(listen)} addresses for {len(device_ids)} devices, a PROMPT"
            " needs one for each"
        )
    return OwnCluster(cluster_id, device_ids, _texts(listen), text)


def _parse_document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{CLUSTER_INFO} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"{CLUSTER_INFO} is {text}, should be an object")
    return document


def _list(document: dict[str, Any], field: str) -> list[object]:
    entries = document.get(field, [])
    if not isinstance(entries, list):
        raise InvalidArgument(f"{field} of {CLUSTER_INFO} is {entries!r}, should be a list")
    return entries


def _number(fields: dict[str, Any], field: str, high: int) -> int:
    value = fields.get(field)
    # JSON's true and false are ints to Python.
    if type(value) is not int or not 0 <= value <= high:
        raise InvalidArgument(f"{field} of {CLUSTER_INFO} is {value!r}, should be an integer in [0, {high}]")
    return value


def _logic_device(entry: object) -> int:
    """Read the index of a device out of ``"0:0:<index>:0"``."""
    if isinstance(entry, str):
        parts = entry.split(":")
        if len(parts) == 4:
            indices = [option_number(f"logic_device_id of {CLUSTER_INFO}", part, 0, INT32_MAX) for part in parts]
            return indices[2] or 0
    raise InvalidArgument(f'logic_device_id of {CLUSTER_INFO} has {entry!r}, should be text such as "0:0:1:0"')


def _listen_entry(entry: object) -> tuple[Ip, int]:
    if not isinstance(entry, dict):
        raise InvalidArgument(f"listen_ip_info of {CLUSTER_INFO} has {entry!r}, should be an object with ip and port")
    port = _number(entry, "port", _UINT16_MAX)
    if isinstance(entry.get("ip"), str) and ":" in entry["ip"]:  # IPv6 has no integer form
        return find_ip(entry["ip"]), port
    return _number(entry, "ip", UINT32_MAX), port


def _of_rank(field: str, entries: list[Any], rank: int) -> list[Any]:
    """Choose the entry of the process in a cluster with one process for each device; a single entry is its own."""
    if len(entries) <= 1:
        return entries
    if rank >= len(entries):
        raise InvalidArgument(f"{RANK_ID} is {rank}, should be below {len(entries)}, the length of {field}")
    return [entries[rank]]


def _texts(listen: list[tuple[Ip, int]]) -> tuple[tuple[str, int], ...]:
    return tuple((host_text(ip), port) for ip, port in listen)
