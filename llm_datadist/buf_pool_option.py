"""The option ``llm.BufPoolCfg``: size classes of the memory pool."""

from __future__ import annotations

import json

from llm_datadist.engine.options import SizeClass
from llm_datadist.status import InvalidArgument

KEY = "llm.BufPoolCfg"

_FIELDS = ("total_size", "blk_size", "max_buf_size")
_MAX_TOTAL_SIZE = 0xFFFFFFFF
_MAX_BLK_SIZE = 2 << 20
_TOTAL_SIZE_UNIT = 2 << 20


def parse_buf_pool(text: str) -> tuple[SizeClass, ...]:
    """Read the size classes.

    Parameters
    ----------
    text : str
        JSON: ``{"buf_cfg": [{"total_size": T, "blk_size": B, "max_buf_size": M}, ...]}``, bytes.

    Returns
    -------
    tuple of SizeClass
        In the order given, which is that of growing `max_buf_size`.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: the text is no such JSON, or a size breaks one of the rules.
    """
    classes = [_size_class(index, entry) for index, entry in enumerate(_entries(text))]
    for index, (smaller, larger) in enumerate(zip(classes, classes[1:])):
        if larger.max_buf_size <= smaller.max_buf_size:
            raise InvalidArgument(
                f"{KEY}: max_buf_size should increase, but is {smaller.max_buf_size} in buf_cfg[{index}] and"
                f" {larger.max_buf_size} in buf_cfg[{index + 1}]"
            )
    return tuple(classes)


def _entries(text: str) -> list[object]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{KEY} is no JSON: {error}") from None
    entries = document.get("buf_cfg") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InvalidArgument(f'{KEY} should be an object with a list "buf_cfg", but is {text}')
    if not entries:
        raise InvalidArgument(f"{KEY}: buf_cfg is empty, should have a size class at least")
    return entries


def _size_class(index: int, entry: object) -> SizeClass:
    where = f"{KEY}: buf_cfg[{index}]"
    if not isinstance(entry, dict):
        raise InvalidArgument(f"{where} is {entry!r}, should be an object with {', '.join(_FIELDS)}")
    for field in _FIELDS:
        # JSON's true and false are ints to Python.
        if type(entry.get(field)) is not int or entry[field] < 0:
            raise InvalidArgument(
                f"{where}.{field} should be an unsigned integer of bytes, but is {entry.get(field)!r}"
            )
    size_class = SizeClass(*(entry[field] for field in _FIELDS))
    _check_rules(where, size_class)
    return size_class


def _check_rules(where: str, sizes: SizeClass) -> None:
    total, blk, max_buf = sizes.total_size, sizes.blk_size, sizes.max_buf_size
    rules = (
        (
            0 < blk <= _MAX_BLK_SIZE and blk & (blk - 1) == 0,
            f"blk_size {blk} should be a power of two up to {_MAX_BLK_SIZE}",
        ),
        (blk <= max_buf, f"blk_size {blk} should be at most max_buf_size {max_buf}"),
        (total <= _MAX_TOTAL_SIZE, f"total_size {total} should be at most {_MAX_TOTAL_SIZE}"),
        (total % _TOTAL_SIZE_UNIT == 0, f"total_size {total} should be a multiple of {_TOTAL_SIZE_UNIT}"),
        (blk == 0 or total % blk == 0, f"total_size {total} should be a multiple of blk_size {blk}"),
        (max_buf < total, f"max_buf_size {max_buf} should be below total_size {total}"),
    )
    for is_met, rule in rules:
        if not is_met:
            raise InvalidArgument(f"{where}: {rule}")
