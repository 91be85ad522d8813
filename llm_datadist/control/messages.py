"""Every message that two processes exchange, and nothing else about them.

A message is one msgpack map: ``v`` is the protocol version, ``t`` the name of the message, the other entries are its
fields. Fields that a reader does not know are ignored, so that a newer peer may say more; a field that is missing, of
another type or too long makes the message unreadable.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Union

import msgpack

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 64 * 1024
MAX_TEXT = 8192  # root information of HCCL has 4108 bytes
MAX_ITEMS = 64


class MessageError(ValueError):
    """Bytes that are no message of this protocol version; the text says why."""


@dataclasses.dataclass(frozen=True)
class Hello:
    """Client to server: let us link."""

    cluster_id: int  # of the client
    remote_cluster_id: int  # that the client expects at this address
    role: int  # LLMRole of the client
    instance: bytes  # random, made at init: tells a process that came back from the one that died
    host: str  # see transports.rendezvous.host_identity
    transports: list[str]  # offered, best first
    reason: str  # why a better one is not offered; empty if there is nothing to say
    timeout_ms: int  # how long the client waits; the server forgets the request then
    cache_manager: bool  # whether the client is in cache-manager mode; both must be, or none


@dataclasses.dataclass(frozen=True)
class Accept:
    """Server to client: how to go on."""

    cluster_id: int  # of the server
    instance: bytes
    token: bytes  # names this link from now on
    transport: str  # chosen from the offers
    reason: str  # why this one
    rendezvous: str  # shared_memory: abstract name of the server's Unix socket
    data_host: str  # tcp: address of the data port; empty = the one that the client has spoken to
    data_port: int  # tcp


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Server to client: no."""

    code: int  # LLMStatusCode
    reason: str


@dataclasses.dataclass(frozen=True)
class Unlink:
    """Client to server: take the link down on your side."""

    cluster_id: int
    token: bytes


@dataclasses.dataclass(frozen=True)
class Unlinked:
    """Server to client: the link is gone (or was gone already) here, unless the code says otherwise."""

    code: int  # LLMStatusCode: LLM_SUCCESS or LLM_LINK_BUSY


@dataclasses.dataclass(frozen=True)
class Probe:
    """Client to server: are you there, and do you know this link."""

    cluster_id: int
    token: bytes


@dataclasses.dataclass(frozen=True)
class ProbeAnswer:
    """Server to client."""

    linked: bool


@dataclasses.dataclass(frozen=True)
class MemberHello:
    """Member of a communicator to another one: I am here."""

    cluster_id: int
    rank: int
    instance: bytes
    rank_table: bytes  # digest: all members must have been given the same table
    host: str  # see transports.rendezvous.host_identity
    transports: list[str]  # offered, best first
    reason: str  # why a better one is not offered; empty if there is nothing to say


@dataclasses.dataclass(frozen=True)
class MemberAccept:
    """Member of lower rank to the one that said hello: let us link."""

    cluster_id: int
    rank: int
    instance: bytes
    token: bytes  # names this link from now on
    transport: str  # chosen from the offers; shared_memory over TCP: come to the Unix socket
    reason: str  # why this one


@dataclasses.dataclass(frozen=True)
class CommunicatorWish:
    """Over a data connection of a link over HCCL: let us make a communicator."""

    host: str  # see transports.rendezvous.host_identity
    device: int  # physical id
    version: str  # of the installed runtime; empty = not known
    batched: bool  # whether HCCL takes several operations in one call
    place: str  # hccl_one_sided: rank table of the own device alone
    pool_address: int  # hccl_one_sided: what the other side may reach, as this process sees it
    pool_bytes: int


@dataclasses.dataclass(frozen=True)
class CommunicatorOffer:
    """The answer: how it is made. The side that answers is rank 0, unless rank tables say who is."""

    busy: bool  # another one is being made on this device; ask again
    reason: str  # why there will be none; empty = there will
    root_info: bytes  # hccl: as HCCL gives it
    name: str
    buffer_mib: int
    execution_limit_s: int
    batched: bool  # whether both post the operations of a step in one call
    place: str  # as in the wish
    pool_address: int
    pool_bytes: int


@dataclasses.dataclass(frozen=True)
class CommunicatorMade:
    """Either side: how a step of making it went here."""

    reason: str  # what went wrong; empty = nothing


Message = Union[
    Hello,
    Accept,
    Refuse,
    Unlink,
    Unlinked,
    Probe,
    ProbeAnswer,
    MemberHello,
    MemberAccept,
    CommunicatorWish,
    CommunicatorOffer,
    CommunicatorMade,
]

_TYPES: dict[str, type[Any]] = {
    "hello": Hello,
    "accept": Accept,
    "refuse": Refuse,
    "unlink": Unlink,
    "unlinked": Unlinked,
    "probe": Probe,
    "probe_answer": ProbeAnswer,
    "member_hello": MemberHello,
    "member_accept": MemberAccept,
    "communicator_wish": CommunicatorWish,
    "communicator_offer": CommunicatorOffer,
    "communicator_made": CommunicatorMade,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}

# Annotations are strings here (PEP 563); each one names the check of its value.
_CHECKS = {
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "bytes": lambda value: type(value) is bytes,
    "list[str]": lambda value: type(value) is list and all(type(item) is str for item in value),
}


def encode(message: Message) -> bytes:
    """Turn a message into bytes."""
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    packed: bytes = msgpack.packb({"v": PROTOCOL_VERSION, "t": _NAMES[type(message)], **fields})
    return packed


def decode(data: bytes) -> Message:
    """Read a message from bytes that anyone may have sent.

    Raises
    ------
    MessageError
        Too long, no msgpack map, another protocol version, an unknown name, or a bad field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are read")
    try:
        fields = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_TEXT,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"not readable: {error}") from error
    if type(fields) is not dict:
        raise MessageError(f"expected a map, got {type(fields).__name__}")
    version = fields.get("v")
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise MessageError(f"protocol version {version!r}, this process speaks {PROTOCOL_VERSION}")
    name = fields.get("t")
    cls = _TYPES.get(name) if type(name) is str else None
    if cls is None:
        raise MessageError(f"unknown message {name!r}")
    return _build(cls, fields)


def _build(cls: type[Any], fields: dict[str, Any]) -> Message:
    values = {}
    for field in dataclasses.fields(cls):
        value = fields.get(field.name)
        if not _CHECKS[str(field.type)](value):
            raise MessageError(f"{cls.__name__}.{field.name} is {value!r}, should be {field.type}")
        values[field.name] = value
    message: Message = cls(**values)
    return message
