"""Checks of types and widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_datadist import arguments
from llm_datadist.arguments import (
    check_dict,
    check_int64,
    check_isinstance,
    check_list_int32,
    check_list_int64,
    check_list_uint64,
    check_positive_or_set_default,
    check_uint32,
    check_uint64,
)

WIDTHS = [
    ("check_uint8", 0, 2**8 - 1),
    ("check_uint16", 0, 2**16 - 1),
    ("check_uint32", 0, 2**32 - 1),
    ("check_uint64", 0, 2**64 - 1),
    ("check_int32", -(2**31), 2**31 - 1),
    ("check_int64", -(2**63), 2**63 - 1),
]


@pytest.mark.parametrize(("name", "low", "high"), WIDTHS)
def test_a_width_ends_where_it_should(name: str, low: int, high: int) -> None:
    check: Callable[[str, object], int] = getattr(arguments, name)
    assert (check("a", low), check("a", high)) == (low, high)
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"a {value} is out of range of {name[len('check_') :]}"):
            check("a", value)


@pytest.mark.parametrize("value", ["1", None, 1.0, np.int64(1), [1]])
@pytest.mark.parametrize("check", [check_uint32, check_uint64, check_int64])
def test_only_ints_have_a_width(check: Callable[[str, object], int], value: object) -> None:
    with pytest.raises(TypeError, match="a only support int"):
        check("a", value)


def test_bool_is_an_int() -> None:
    assert check_uint32("a", True) == 1


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_list_int32, [-(2**31), 2**31 - 1], 2**31),
        (check_list_int64, [-(2**63), 2**63 - 1], 2**63),
        (check_list_uint64, [0, 2**64 - 1], -1),
    ],
)
def test_each_element_of_a_list_has_the_width(check: Callable[[str, Any], None], good: list[int], bad: int) -> None:
    check("a", good)
    with pytest.raises(ValueError, match=rf"a\[2\] {bad} is out of range"):
        check("a", [*good, bad])
    with pytest.raises(TypeError, match="only support"):
        check("a", [*good, "1"])


def test_isinstance_lets_none_through_if_it_may() -> None:
    assert check_isinstance("a", None, int) is None
    assert check_isinstance("a", 5, [str, int]) == 5
    with pytest.raises(TypeError, match="a only support int"):
        check_isinstance("a", None, int, allow_none=False)
    with pytest.raises(AttributeError, match="a only support int"):
        check_isinstance("a", None, int, allow_none=False)
    with pytest.raises(TypeError, match="^first a only support str or int, but got float 1.5"):
        check_isinstance("a", 1.5, [str, int], extra_fmt="first ")


def test_isinstance_looks_at_elements() -> None:
    check_isinstance("a", [1, 2], list, int)
    check_isinstance("a", {1: "x"}, dict, int)
    with pytest.raises(TypeError, match="inner type only support int"):
        check_isinstance("a", [1, "x"], list, int)
    with pytest.raises(TypeError, match="inner type only support str"):
        check_isinstance("a", {1: "x"}, dict, str)


def test_dict_looks_at_keys_values_and_elements_of_values() -> None:
    check_dict("a", {1: [2]}, int, list, int)
    with pytest.raises(TypeError, match="dict key only support str"):
        check_dict("a", {1: 2}, str, int)
    with pytest.raises(TypeError, match="dict value only support str"):
        check_dict("a", {1: 2}, int, str)
    with pytest.raises(TypeError, match="inner type only support int"):
        check_dict("a", {1: ["2"]}, int, list, int)
    for value in ([], None):
        with pytest.raises(TypeError, match="a only support dict"):
            check_dict("a", value, int, int)


def test_a_positive_number_or_the_default() -> None:
    assert check_positive_or_set_default("a", None) == -1
    assert check_positive_or_set_default("a", None, 7) == 7
    assert check_positive_or_set_default("a", 0) == 0
    with pytest.raises(ValueError, match="should be >= 0"):
        check_positive_or_set_default("a", -1)
    with pytest.raises(ValueError, match="out of range"):
        check_positive_or_set_default("a", 2**63)
    with pytest.raises(TypeError, match="only support"):
        check_positive_or_set_default("a", "1")


def test_a_message_stays_short_whatever_the_argument() -> None:
    with pytest.raises(TypeError) as caught:
        check_isinstance("a", list(range(100000)), str)
    assert len(str(caught.value)) < 200
