"""From layer ranges to tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.layer_range import layer_range_to_tensor_indices, tensor_ranges


@pytest.mark.parametrize(
    ("src", "dst", "per_layer", "expected"),
    [
        (range(1, 2), range(1, 2), 2, ([2, 3], [2, 3])),
        (None, None, 2, ([], [])),
        (range(1), None, 2, ([0, 1], [])),
        (range(1, 3), range(2), 3, ([3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5])),
        (range(2, 2), range(3, 1), 2, ([], [])),
        (range(-5, -5), None, 2, ([], [])),
        (range(3), range(4, 7), 1, ([0, 1, 2], [4, 5, 6])),
    ],
)
def test_indices(src: Any, dst: Any, per_layer: int, expected: tuple[list[int], list[int]]) -> None:
    assert layer_range_to_tensor_indices(src, dst, per_layer) == expected


def test_two_tensors_make_a_layer_by_default() -> None:
    assert layer_range_to_tensor_indices(range(1), None) == ([0, 1], [])


@pytest.mark.parametrize("bad", [range(0, 4, 2), range(0, 1, -1), range(3, 3, 2)])
def test_a_step_is_refused(bad: range) -> None:
    for args in ((bad, None), (None, bad), (range(-1, 1), bad)):
        with pytest.raises(LLMException, match="step must be 1") as caught:
            tensor_ranges(*args, 2)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_negative_layer_is_refused() -> None:
    for args in ((range(-1, 1), None), (None, range(-3, -1))):
        with pytest.raises(LLMException, match="start value") as caught:
            tensor_ranges(*args, 2)
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_layer_beyond_uint32_is_refused() -> None:
    for bad in (range(2**33, 2**33 + 1), range(2**32 + 1), range(2**80)):
        with pytest.raises(ValueError, match="out of range") as caught:
            tensor_ranges(bad, None, 2)
        assert not isinstance(caught.value, LLMException)
    assert tensor_ranges(range(2**32 - 1, 2**32), None, 2) == ((2**33 - 2, 2), None)


@pytest.mark.parametrize("bad", [[0, 1], (0, 1), slice(0, 1), 1])
def test_something_else_is_refused_before_any_value(bad: Any) -> None:
    for args in ((bad, range(0, 4, 2)), (range(0, 4, 2), bad)):
        with pytest.raises(TypeError, match="only support range"):
            tensor_ranges(*args, 2)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 5))
def test_indices_are_those_of_the_layers(start: int, stop: int, per_layer: int) -> None:
    layers = range(start, stop)
    expected = [layer * per_layer + part for layer in layers for part in range(per_layer)]
    assert layer_range_to_tensor_indices(layers, None, per_layer) == (expected, [])
