"""Validators of arguments."""

from __future__ import annotations

import pytest

from llm_datadist.utils.utils import check_dict, check_int64, check_isinstance, check_uint32, check_uint64


def test_C025_check_uint32() -> None:
    for wrong in ("1", None, 1.0):
        with pytest.raises(TypeError, match="only support"):
            check_uint32("a", wrong)
    with pytest.raises(ValueError, match="out of range"):
        check_uint32("a", 2**32)
    check_uint32("a", 0)
    check_uint32("a", 2**32 - 1)


@pytest.mark.parametrize(("check", "low", "high"), [(check_int64, -(2**63), 2**63 - 1), (check_uint64, 0, 2**64 - 1)])
def test_C026_both_ends_of_64_bits(check: object, low: int, high: int) -> None:
    assert callable(check)
    check("a", low)
    check("a", high)
    for beyond in (low - 1, high + 1):
        with pytest.raises(ValueError, match="out of range"):
            check("a", beyond)


def test_C027_none_passes_where_it_is_allowed() -> None:
    check_isinstance("a", None, int)
    with pytest.raises(TypeError, match="only support"):
        check_isinstance("a", None, int, allow_none=False)


def test_C028_the_type_of_elements() -> None:
    with pytest.raises(TypeError, match="inner type only support"):
        check_isinstance("a", [1, "x"], list, int)


def test_C029_the_types_of_a_dict() -> None:
    with pytest.raises(TypeError, match="dict key only support"):
        check_dict("a", {1: 2}, str, int)
    with pytest.raises(TypeError, match="dict value only support"):
        check_dict("a", {"1": "2"}, str, int)
