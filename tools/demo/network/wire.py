"""How the messages of the demo travel over ZeroMQ: as a msgpack list, the name of the message and then its fields."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import msgpack

from llm_datadist.tools.demo.messages import (
    Answered,
    Cancel,
    Decoded,
    LevelQuery,
    Prefill,
    Prefilled,
    PrefillProgress,
    Pulled,
    RequestFailed,
    ServiceLevel,
    StillHere,
)

MAX_MESSAGE_BYTES = 1 << 20
_MAX_ITEMS = 1 << 16
_MAX_TEXT_BYTES = 1 << 18

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Prefill,
        PrefillProgress,
        Prefilled,
        Pulled,
        Decoded,
        Answered,
        Cancel,
        RequestFailed,
        LevelQuery,
        ServiceLevel,
        StillHere,
    )
}


class WireError(ValueError):
    """Bytes that are no message; the text says why."""


def _is_natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_piece(value: object) -> bool:
    return type(value) is list and len(value) == 2 and _is_natural(value[0]) and type(value[1]) is str


# Annotations are strings here (PEP 563); each one names the check of its value. No number is negative.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": _is_natural,
    "bool": lambda value: type(value) is bool,
    "str": lambda value: type(value) is str,
    "float": lambda value: type(value) is float,
    "float | None": lambda value: value is None or type(value) is float,
    "list[int]": lambda value: type(value) is list and all(map(_is_natural, value)),
    "list[tuple[int, str]]": lambda value: type(value) is list and all(map(_is_piece, value)),
}


def encode(message: Any) -> bytes:
    """Turn a message into bytes."""
    values = [getattr(message, field.name) for field in dataclasses.fields(message)]
    packed: bytes = msgpack.packb([type(message).__name__, *values])
    return packed


def decode(data: bytes) -> Any:
    """Read a message from bytes that anyone may have sent.

    Raises
    ------
    WireError
        Too long, no msgpack list, an unknown name, or a field that is missing or of another type.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES} are read")
    limits = {"max_str_len": _MAX_TEXT_BYTES, "max_array_len": _MAX_ITEMS, "max_map_len": 0, "max_bin_len": 0}
    try:
        items = msgpack.unpackb(data, raw=False, max_ext_len=0, **limits)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"not readable: {error}") from error
    cls = _TYPES.get(items[0]) if type(items) is list and items and type(items[0]) is str else None
    if cls is None:
        raise WireError(f"unknown message {items!r:.80}")
    fields, values = dataclasses.fields(cls), items[1:]
    if len(fields) != len(values):
        raise WireError(f"{cls.__name__} with {len(values)} fields, should be {len(fields)}")
    for field, value in zip(fields, values):
        if not _CHECKS[str(field.type)](value):
            raise WireError(f"{cls.__name__}.{field.name} is {value!r:.80}, should be {field.type}")
    return cls(*values)
