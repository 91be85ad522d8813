"""Sizes on the command line and in tables: 64K, 1M."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NAMES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(text: str) -> int:
    """Read a number of bytes, with K, M or G for powers of 1024; a type of options, which shows its name."""
    found = re.fullmatch(r"(\d{1,15})([KMG]?)(i?B)?", text, re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise click.BadParameter(f"{text!r} is no size, should be like 65536, 64K, 1M or 2G")
    return int(found[1]) * _UNITS[found[2].upper()]


def size_text(nbytes: int) -> str:
    """Write a number of bytes in the largest unit that leaves no rest."""
    for name, unit in _NAMES:
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"
