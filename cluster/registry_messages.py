"""Every message between a registry and its clients, and nothing else about them.

A message is a frame of 8 bytes that names the request, and a frame with one msgpack map: ``v`` is the protocol version,
``t`` the name of the message, the other entries are its fields. A reply has the name of its request; `UNASKED` stands
for messages that the registry sends by itself. Fields that a reader does not know are ignored, so that a newer peer may
say more; a field that is missing, of another type or too long makes the message unreadable.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Union

import msgpack

from llm_datadist.cluster.member_info import MemberInfo
from llm_datadist.roles import LLMRole

PROTOCOL_VERSION = 1
UNASKED = bytes(8)
REQUEST_ID_BYTES = 8

MAX_REQUEST_BYTES = 64 * 1024
MAX_REPLY_BYTES = 1024 * 1024  # a page of changes is much smaller, see registry_table
MAX_RECORD_BYTES = 16 * 1024
MAX_TEXT = 4096
MAX_ITEMS = 4096

MAX_LABELS = 32
MAX_LABEL_BYTES = 256
MAX_DEVICES = 64
MAX_STATE_BYTES = 64
MAX_UINT64 = 2**64 - 1
INSTANCE_BYTES = 16


class RegistryMessageError(ValueError):
    """Bytes that are no message of this protocol version; the text says why."""


# ---- from a client


@dataclasses.dataclass(frozen=True)
class Announce:
    """I am this, and will be for as long as I renew my lease."""

    cluster_id: int
    instance: bytes
    version: int  # grows with what an instance says: an older announcement that comes late changes nothing
    role: int
    listen_ip_info: str
    devices: list[int]
    state: str
    labels: dict[str, str]
    host: str
    pid: int
    lease_ms: int
    follows: bool
    switch_token: int  # of the lock under which the sender drains, else 0
    seen_token: int  # the highest fencing token that the sender has seen


@dataclasses.dataclass(frozen=True)
class Renew:
    """I am still there."""

    cluster_id: int
    instance: bytes


@dataclasses.dataclass(frozen=True)
class Withdraw:
    """I leave."""

    cluster_id: int
    instance: bytes


@dataclasses.dataclass(frozen=True)
class Look:
    """Tell me what has changed after a revision; wait for a change if nothing has."""

    epoch: bytes  # of the registry that `since` is from; another one, or empty: tell everything
    since: int
    hold_ms: int  # 0: answer at once
    role: int  # 0: any
    labels: dict[str, str]  # all of which a member must have


@dataclasses.dataclass(frozen=True)
class Lock:
    """Give me the lock, or let me keep it."""

    name: str
    cluster_id: int
    instance: bytes
    token: int  # 0, or that of the lock which the sender holds
    lease_ms: int
    wait_ms: int


@dataclasses.dataclass(frozen=True)
class Unlock:
    """I do not need the lock any more."""

    name: str
    instance: bytes
    token: int


@dataclasses.dataclass(frozen=True)
class Drained:
    """I have no transfer with the member that holds a lock, and begin none."""

    name: str
    token: int
    cluster_id: int  # of the sender


@dataclasses.dataclass(frozen=True)
class Order:
    """Have a member switch its role, and tell me how it went."""

    order: bytes  # random; the same order may be sent again
    cluster_id: int  # who is to switch
    role: int
    listen_ip_info: str  # empty: where the member was told to when it started
    timeout_ms: int


@dataclasses.dataclass(frozen=True)
class OrderDone:
    """How an order went; from the member, and passed on to whom it came from."""

    order: bytes
    code: int  # LLMStatusCode
    reason: str


@dataclasses.dataclass(frozen=True)
class Status:
    """Tell me about yourself."""


# ---- from the registry


@dataclasses.dataclass(frozen=True)
class Granted:
    """Answer to `Announce` and `Renew`: you are known."""

    epoch: bytes
    revision: int
    lease_ms: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """No."""

    code: str  # one of the REFUSED_ words
    reason: str


@dataclasses.dataclass(frozen=True)
class Changes:
    """Answer to `Look`."""

    epoch: bytes
    revision: int  # to look from next time
    reset: bool  # the members begin a new list: forget those that are not in it
    more: bool  # there is more already
    members: list[bytes]  # records, see `encode_record`
    gone: list[int]  # cluster ids; also of members that do not match what was looked for any more
    expired: list[int]  # those of `gone` whose lease has ended


@dataclasses.dataclass(frozen=True)
class Locked:
    """Answer to `Lock`."""

    token: int
    lease_ms: int
    drained: list[int]  # cluster ids of the members that have sent `Drained` with this token


@dataclasses.dataclass(frozen=True)
class Done:
    """It is done."""


@dataclasses.dataclass(frozen=True)
class Switch:
    """Unasked, to a member: an order for you."""

    order: bytes
    role: int
    listen_ip_info: str
    timeout_ms: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """Unasked, to a member: somebody else wants your cluster id. What counts is whether this can be sent at all."""

    cluster_id: int


@dataclasses.dataclass(frozen=True)
class StatusReply:
    """Answer to `Status`."""

    epoch: bytes
    revision: int
    members: int
    uptime_ms: int
    requests: int
    unreadable: int


REFUSED_UNKNOWN = "unknown"  # nobody of that id and instance is there: announce
REFUSED_TAKEN = "taken"  # another living process has the cluster id
REFUSED_FENCED = "fenced"  # the token is not that of the lock
REFUSED_HELD = "held"  # somebody else has the lock
REFUSED_FULL = "full"  # no room for more
REFUSED_UNREACHABLE = "unreachable"  # the member does not answer
REFUSED_MALFORMED = "malformed"

Message = Union[
    Announce,
    Renew,
    Withdraw,
    Look,
    Lock,
    Unlock,
    Drained,
    Order,
    OrderDone,
    Status,
    Granted,
    Refused,
    Changes,
    Locked,
    Done,
    Switch,
    Probe,
    StatusReply,
]

_TYPES: dict[str, type[Any]] = {
    "announce": Announce,
    "renew": Renew,
    "withdraw": Withdraw,
    "look": Look,
    "lock": Lock,
    "unlock": Unlock,
    "drained": Drained,
    "order": Order,
    "order_done": OrderDone,
    "status": Status,
    "granted": Granted,
    "refused": Refused,
    "changes": Changes,
    "locked": Locked,
    "done": Done,
    "switch": Switch,
    "probe": Probe,
    "status_reply": StatusReply,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}


def _is_uint(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_UINT64


def _are_labels(value: object) -> bool:
    return (
        type(value) is dict
        and len(value) <= MAX_LABELS
        and all(type(text) is str and len(text) <= MAX_LABEL_BYTES for entry in value.items() for text in entry)
    )


# Annotations are strings here (PEP 563); each one names the check of its value. Numbers are uint64.
_CHECKS = {
    "int": _is_uint,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str and len(value) <= MAX_TEXT,
    "bytes": lambda value: type(value) is bytes and len(value) <= INSTANCE_BYTES,
    "list[int]": lambda value: type(value) is list and all(_is_uint(item) for item in value),
    "list[bytes]": lambda value: type(value) is list and all(type(item) is bytes for item in value),
    "dict[str, str]": _are_labels,
}
_FIELDS = {cls: [(field.name, str(field.type)) for field in dataclasses.fields(cls)] for cls in _NAMES}


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    fields = {name: getattr(message, name) for name, _ in _FIELDS[type(message)]}
    packed: bytes = msgpack.packb({"v": PROTOCOL_VERSION, "t": _NAMES[type(message)], **fields})
    return packed


def decode(data: bytes, most_bytes: int = MAX_REQUEST_BYTES) -> Message:
    """Read a message from bytes that anyone may have sent.

    Raises
    ------
    RegistryMessageError
        Too long, no msgpack map, another protocol version, an unknown name, or a bad field.
    """
    fields = _unpack(data, most_bytes)
    version = fields.get("v")
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise RegistryMessageError(f"protocol version {version!r}, this process speaks {PROTOCOL_VERSION}")
    name = fields.get("t")
    cls = _TYPES.get(name) if type(name) is str else None
    if cls is None:
        raise RegistryMessageError(f"unknown message {name!r:.60}")
    message: Message = cls(**_values(cls.__name__, _FIELDS[cls], fields))
    return message


# ---- records of members, which travel as bytes inside of `Changes` and are packed once

_RECORD = [
    *((name, kind) for name, kind in _FIELDS[Announce] if name not in ("seen_token", "version")),
    ("revision", "int"),
]


def encode_record(announce: Announce, lease_ms: int, revision: int) -> bytes:
    """Pack what the registry tells about a member; RegistryMessageError if that is too long."""
    fields = {name: getattr(announce, name) for name, _ in _RECORD if name != "revision"}
    packed: bytes = msgpack.packb({**fields, "lease_ms": lease_ms, "revision": revision})
    if len(packed) > MAX_RECORD_BYTES:
        raise RegistryMessageError(f"what is announced has {len(packed)} bytes, at most {MAX_RECORD_BYTES} are kept")
    return packed


def decode_record(data: bytes) -> MemberInfo:
    """Read what the registry tells about a member.

    Raises
    ------
    RegistryMessageError
        The bytes are no record.
    """
    values = _values("record", _RECORD, _unpack(data, MAX_RECORD_BYTES))
    try:
        role = LLMRole(values.pop("role"))
    except ValueError as error:
        raise RegistryMessageError(str(error)) from error
    lease_ms = values.pop("lease_ms")
    return MemberInfo(role=role, devices=tuple(values.pop("devices")), lease_s=lease_ms / 1000, **values)


def check_announce(announce: Announce) -> None:
    """Check what the types of the fields do not say.

    Raises
    ------
    RegistryMessageError
        A value is out of its range; the text says which.
    """
    if len(announce.instance) != INSTANCE_BYTES:
        raise RegistryMessageError(f"instance has {len(announce.instance)} bytes, should have {INSTANCE_BYTES}")
    if announce.role not in list(LLMRole):
        raise RegistryMessageError(f"role is {announce.role}, should be one of {[int(role) for role in LLMRole]}")
    if not 1 <= len(announce.state) <= MAX_STATE_BYTES:
        raise RegistryMessageError(f"state {announce.state!r:.80} should have 1 to {MAX_STATE_BYTES} characters")
    if len(announce.devices) > MAX_DEVICES:
        raise RegistryMessageError(f"{len(announce.devices)} devices, at most {MAX_DEVICES} are possible")


def _unpack(data: bytes, most_bytes: int) -> dict[str, Any]:
    if len(data) > most_bytes:
        raise RegistryMessageError(f"message of {len(data)} bytes, at most {most_bytes} are read")
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_RECORD_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise RegistryMessageError(f"not readable: {error}") from error
    if type(fields) is not dict:
        raise RegistryMessageError(f"expected a map, got {type(fields).__name__}")
    return fields


def _values(what: str, wanted: list[tuple[str, str]], fields: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, kind in wanted:
        value = fields.get(name)
        if not _CHECKS[kind](value):
            raise RegistryMessageError(f"{what}.{name} is {value!r:.80}, should be {kind}")
        values[name] = value
    return values
