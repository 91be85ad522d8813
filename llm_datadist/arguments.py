"""Checks of arguments: types (TypeError) and widths of integers (ValueError).

The first parameter of each check is the argument's name, for the message. A value that is returned is the argument.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from reprlib import repr as short_repr
from typing import Union

Classes = Union[type, Sequence[type]]

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1

_WIDTHS = {
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, UINT32_MAX),
    "uint64": (0, UINT64_MAX),
    "int32": (-(2**31), INT32_MAX),
    "int64": (-(2**63), INT64_MAX),
}


class NoneArgument(TypeError, AttributeError):
    """None was given in place of an object; the documentation promises now the one, now the other kind of error."""


def check_isinstance(
    arg_name: str,
    arg_value: object,
    classes: Classes,
    inner_class: type | None = None,
    extra_fmt: str = "",
    allow_none: bool = True,
) -> object:
    """Check the type of an argument and, with `inner_class`, of its elements (of the keys for a dict).

    Parameters
    ----------
    arg_name : str
        Name of the argument.
    arg_value : object
        The argument; None passes if `allow_none`.
    classes : type or sequence of types
        What the argument may be an instance of.
    inner_class : type, optional
        What each element must be an instance of.
    extra_fmt : str
        Start of the message.
    allow_none : bool
        Whether None passes.

    Raises
    ------
    TypeError
        The argument or an element of it has another type.
    """
    if arg_value is None and allow_none:
        return arg_value
    allowed = (classes,) if isinstance(classes, type) else tuple(classes)
    if not isinstance(arg_value, allowed):
        names = " or ".join(cls.__name__ for cls in allowed)
        kind = NoneArgument if arg_value is None else TypeError
        raise kind(f"{extra_fmt}{arg_name} only support {names}, but got {_describe(arg_value)}")
    if inner_class is not None and isinstance(arg_value, Collection):
        _check_elements(f"{extra_fmt}{arg_name} inner type", arg_value, inner_class)
    return arg_value


def check_dict(arg_name: str, d: object, k_class: type, v_class: type, v_inner_class: type | None = None) -> None:
    """Check that an argument is a dict whose keys, values and, with `v_inner_class`, elements of values have a type.

    Raises
    ------
    TypeError
        The argument, a key, a value or an element of a value has another type.
    """
    check_isinstance(arg_name, d, dict, allow_none=False)
    assert isinstance(d, dict)
    _check_elements(f"{arg_name} dict key", d, k_class)
    _check_elements(f"{arg_name} dict value", d.values(), v_class)
    if v_inner_class is not None and not _all_exactly(chain.from_iterable(d.values()), v_inner_class):
        for value in d.values():
            _check_elements(f"{arg_name} inner type", value, v_inner_class)


def check_uint8(arg_name: str, value: object) -> int:
    """Check for an int in [0, 2**8)."""
    return _check_width(arg_name, value, "uint8")


def check_uint16(arg_name: str, value: object) -> int:
    """Check for an int in [0, 2**16)."""
    return _check_width(arg_name, value, "uint16")


def check_uint32(arg_name: str, value: object) -> int:
    """Check for an int in [0, 2**32)."""
    return _check_width(arg_name, value, "uint32")


def check_uint64(arg_name: str, value: object) -> int:
    """Check for an int in [0, 2**64)."""
    return _check_width(arg_name, value, "uint64")


def check_int32(arg_name: str, value: object) -> int:
    """Check for an int in [-2**31, 2**31)."""
    return _check_width(arg_name, value, "int32")


def check_int64(arg_name: str, value: object) -> int:
    """Check for an int in [-2**63, 2**63)."""
    return _check_width(arg_name, value, "int64")


def check_list_int32(arg_name: str, values: Iterable[object]) -> None:
    """Check each element for an int in [-2**31, 2**31)."""
    _check_list_width(arg_name, values, "int32")


def check_list_int64(arg_name: str, values: Iterable[object]) -> None:
    """Check each element for an int in [-2**63, 2**63)."""
    _check_list_width(arg_name, values, "int64")


def check_list_uint64(arg_name: str, values: Iterable[object]) -> None:
    """Check each element for an int in [0, 2**64)."""
    if isinstance(values, (list, tuple)) and are_block_numbers(values):
        return
    _check_list_width(arg_name, values, "uint64")


def check_positive_or_set_default(arg_name: str, value: object, default: int = -1) -> int:
    """Check for an int64 >= 0; `default` in place of None."""
    if value is None:
        return default
    number = check_int64(arg_name, value)
    if number < 0:
        raise ValueError(f"{arg_name} is {number}, should be >= 0")
    return number


def are_block_numbers(numbers: Collection[object], end: int = 2**64) -> bool:
    """Tell at once of many whether each is an int in [0, end); of a bool or a subclass of int it does not know."""
    if not _all_exactly(numbers, int):
        return False
    return not numbers or (min(numbers) >= 0 and max(numbers) < end)  # type: ignore[type-var, operator]


def _all_exactly(elements: Iterable[object], allowed: type) -> bool:
    return set(map(type, elements)) <= {allowed}


def _check_elements(what: str, elements: Collection[object], allowed: type) -> None:
    if _all_exactly(elements, allowed):
        return
    for element in elements:
        if not isinstance(element, allowed):
            raise TypeError(f"{what} only support {allowed.__name__}, but got {_describe(element)}")


def _check_list_width(arg_name: str, values: Iterable[object], width: str) -> None:
    for index, value in enumerate(values):
        _check_width(f"{arg_name}[{index}]", value, width)


def _check_width(arg_name: str, value: object, width: str) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{arg_name} only support int, but got {_describe(value)}")
    low, high = _WIDTHS[width]
    if not low <= value <= high:
        raise ValueError(f"{arg_name} {value} is out of range of {width}, should be in [{low}, {high}]")
    return value


def _describe(value: object) -> str:
    return f"{type(value).__name__} {short_repr(value)}"
