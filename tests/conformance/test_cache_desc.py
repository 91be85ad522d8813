"""CacheDesc."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import CacheDesc, DataType, LLMException, Placement
from tests.conformance.expectations import invalid
from tests.own_instance import desc

FP16 = DataType.DT_FLOAT16


class Size(tuple):
    """Stands in for torch.Size, which is a subclass of tuple like this one."""


def test_C076_properties() -> None:
    described = desc(2, [4, 8])
    expected = {
        "num_tensors": 2,
        "batch_size": 4,
        "batch_dim": 0,
        "size": 64,
        "placement": Placement.DEVICE,
        "seq_len_dim_index": -1,
        "kv_tensor_format": None,
    }
    assert {name: getattr(described, name) for name in expected} == expected


@pytest.mark.parametrize("shape", [[4, 8], (4, 8), Size((4, 8))])
def test_C077_the_shape_is_the_given_object(shape: Any) -> None:
    assert desc(2, shape).shape is shape


def test_C078_number_of_tensors() -> None:
    for number in (-1, 2**32):
        with pytest.raises(ValueError, match="out of range"):
            desc(number, [4, 8])
    with pytest.raises(TypeError):
        desc("2", [4, 8])  # type: ignore[arg-type]
    assert desc(0, [4, 8]).num_tensors == 0


def test_C079_wrong_shapes() -> None:
    for shape in ("ab", 5, [1, "2"]):
        with pytest.raises(TypeError, match="only support"):
            desc(2, shape)
    invalid(desc, 2, [])
    with pytest.raises(ValueError, match="out of range"):
        desc(2, [2**63])


def test_C080_dimensions_of_batch_and_sequence() -> None:
    for index in (2, -1):
        invalid(CacheDesc, 2, [4, 8], FP16, batch_dim_index=index)
    for index in (-2, 2):
        invalid(CacheDesc, 2, [4, 8], FP16, seq_len_dim_index=index)
    for index in (-1, 0, 1):
        assert CacheDesc(2, [4, 8], FP16, seq_len_dim_index=index).seq_len_dim_index == index


@pytest.mark.parametrize("wrong", [{"data_type": 1}, {"placement": 1}, {"kv_tensor_format": 5}])
def test_C081_types(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        CacheDesc(**{"num_tensors": 2, "shape": [4, 8], "data_type": FP16, **wrong})


@pytest.mark.parametrize("shape", [[0, 4], [-1, 4]])
def test_C082_a_size_needs_positive_dimensions(shape: list[int]) -> None:
    described = desc(1, shape)
    with pytest.raises(LLMException):
        _ = described.size


def test_C083_update_dim() -> None:
    described = desc(1, [4, 8])
    assert described.size == 64
    described.update_dim(1, 16)
    assert (described.shape, described.size) == ([4, 16], 128)


def test_C084_repr() -> None:
    assert repr(desc(2, [4, 8])) == (
        "CacheDesc(num_tensors=2, shape=[4, 8], data_type=DataType.DT_FLOAT16, placement=Placement.DEVICE, "
        "batch_dim_index=0, seq_len_dim_index=-1,kv_tensor_format=None)"
    )
