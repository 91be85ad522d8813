"""Fields of cluster files and rank tables: what each may be, in tables, and how an object is read by one."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llm_datadist.cluster.cluster_document import Document, Path

__all__ = [
    "DEVICE_FIELDS",
    "SERVER_FIELDS",
    "Field",
    "choice",
    "is_number",
    "items",
    "number",
    "members",
    "read_fields",
    "text",
]

PORT_MAX = 65535

_UINT64_MAX = 2**64 - 1
_INT32_MAX = 2**31 - 1
_MAX_TEXT = 64  # characters, as for the ids of a rank table


class Field(NamedTuple):
    """One field of an object.

    Attributes
    ----------
    read : callable
        Gives the value in its final form; raises ValueError that says what it should be.
    required : bool
        Whether it must be there; one that is null is not.
    """

    read: Callable[[Any], Any]
    required: bool = False


def read_fields(
    document: Document, path: Path, content: Any, fields: Mapping[str, Field], *, others: bool = False
) -> dict[str, Any]:
    """Read the fields of the object at `path`; those not given are left out.

    With `others`, fields that are not in the table are passed over.

    Raises
    ------
    ClusterFileError
        It is no object, a field lacks, has a bad value, or is unknown.
    """
    if not isinstance(content, dict):
        raise document.error(path, f"is {shown(content)}, should be an object with {', '.join(fields)}")
    for name in content:
        if name not in fields and not others:
            raise document.error((*path, name), f"is no field, should be one of {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        value = content.get(name)
        if value is None:
            if field.required:
                raise document.error((*path, name), "is missing")
            continue
        try:
            values[name] = field.read(value)
        except ValueError as error:
            raise document.error((*path, name), f"is {shown(value)}, {error}") from None
    return values


def number(lowest: int, highest: int) -> Callable[[Any], int]:
    """Make a reader of numbers in a range, also as text: rank tables have all numbers as text."""

    def read(value: Any) -> int:
        if not is_number(value, lowest, highest):
            raise ValueError(f"should be a number from {lowest} to {highest}")
        return int(value)

    return read


def is_number(value: Any, lowest: int, highest: int) -> bool:
    """Say whether it is a number in that range, or its decimal digits."""
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and len(value) <= 20 and lowest <= int(value) <= highest
    return type(value) is int and lowest <= value <= highest


def choice(*values: Any) -> Callable[[Any], Any]:
    """Make a reader of one of a few values."""

    def read(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            raise ValueError(f"should be {' or '.join(map(repr, values))}")
        return value

    return read


def text(value: Any) -> str:
    """Read an id that is text."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise ValueError(
            f"should be text of 1 to {_MAX_TEXT} printable characters, in quotes if it looks like a number"
        )
    return value


def ips(value: Any) -> str:
    """Read an IP address, or several that are joined by a comma."""
    try:
        parts = [part.strip() for part in value.split(",")]
        for part in parts:
            ipaddress.ip_address(part)
    except (AttributeError, ValueError):
        raise ValueError("should be an IP address, or several joined by a comma") from None
    return ",".join(parts)


def items(value: Any) -> Any:
    """Read a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError("should be a list with one entry at least")
    return value


def members(value: Any) -> Any:
    """Read an object."""
    if not isinstance(value, dict):
        raise ValueError("should be an object")
    return value


def shown(value: Any) -> str:
    """Show a value in a message."""
    if value is None:
        return "empty"
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:100]


_PORT = Field(number(1, PORT_MAX))

DEVICE_FIELDS = {
    "device_id": Field(number(0, _INT32_MAX), required=True),
    "device_ip": Field(ips),
    "device_port": _PORT,
    "host_port": _PORT,
    "super_device_id": Field(number(0, _UINT64_MAX)),
    "backup_device_ip": Field(ips),
    "backup_device_port": _PORT,
}
SERVER_FIELDS = {"host_ip": Field(ips), "super_pod_id": Field(text)}
