"""Descriptions of caches."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import CacheDesc, DataType, LLMException, LLMStatusCode, Placement

F16 = DataType.DT_FLOAT16


class Size(tuple):
    """A kind of tuple, as ``torch.Size`` is one."""


def test_defaults() -> None:
    desc = CacheDesc(2, [4, 8], F16)
    assert (desc.num_tensors, desc.data_type, desc.placement) == (2, F16, Placement.DEVICE)
    assert (desc.batch_dim, desc.batch_size, desc.size) == (0, 4, 64)
    assert (desc.seq_len_dim_index, desc.kv_tensor_format) == (-1, None)


def test_arguments_are_read_back() -> None:
    desc = CacheDesc(
        3, (2, 5, 7), DataType.DT_INT8, Placement.HOST, batch_dim_index=1, seq_len_dim_index=2, kv_tensor_format="ND"
    )
    assert (desc.num_tensors, desc.placement, desc.batch_dim, desc.batch_size) == (3, Placement.HOST, 1, 5)
    assert (desc.seq_len_dim_index, desc.kv_tensor_format, desc.size) == (2, "ND", 70)


@pytest.mark.parametrize("shape", [[1, 2], (1, 2), Size((1, 2))])
def test_the_shape_is_the_object_that_was_given(shape: Any) -> None:
    assert CacheDesc(1, shape, F16).shape is shape


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_tensors": "2"}, "num_tensors only support int"),
        ({"num_tensors": None}, "num_tensors only support int"),
        ({"shape": "ab"}, "shape only support list or tuple"),
        ({"shape": 5}, "shape only support list or tuple"),
        ({"shape": None}, "shape only support list or tuple"),
        ({"shape": [1, "2"]}, "shape inner type only support int"),
        ({"data_type": 1}, "data_type only support DataType"),
        ({"data_type": None}, "data_type only support DataType"),
        ({"placement": 1}, "placement only support Placement"),
        ({"batch_dim_index": "0"}, "batch_dim_index only support int"),
        ({"seq_len_dim_index": 1.0}, "seq_len_dim_index only support int"),
        ({"kv_tensor_format": 5}, "kv_tensor_format only support str"),
    ],
)
def test_wrong_types(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        CacheDesc(**{"num_tensors": 1, "shape": [4, 8], "data_type": F16, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tensors": -1},
        {"num_tensors": 2**32},
        {"seq_len_dim_index": 2**31},
        {"shape": [2**63]},
        {"shape": [1, -(2**63) - 1]},
    ],
)
def test_integers_beyond_their_width(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range") as caught:
        CacheDesc(**{"num_tensors": 1, "shape": [4, 8], "data_type": F16, **changes})
    assert not isinstance(caught.value, LLMException)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": []},
        {"batch_dim_index": 2},
        {"batch_dim_index": -1},
        {"seq_len_dim_index": -2},
        {"seq_len_dim_index": 2},
    ],
)
def test_indices_that_name_no_dimension(changes: dict[str, Any]) -> None:
    with pytest.raises(LLMException, match="out of range") as caught:
        CacheDesc(**{"num_tensors": 1, "shape": [4, 8], "data_type": F16, **changes})
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_what_passes_at_the_edges() -> None:
    for index in (-1, 0, 1):
        assert CacheDesc(1, [4, 8], F16, seq_len_dim_index=index).seq_len_dim_index == index
    assert CacheDesc(0, [4], F16).num_tensors == 0
    assert CacheDesc(2**32 - 1, [4], F16).num_tensors == 2**32 - 1


@pytest.mark.parametrize("shape", [[0, 4], [-1, 4], [4, 0], [2**62, 2], [2**40, 2**40], [2**62] * 400])
def test_a_size_that_cannot_be(shape: list[int]) -> None:
    desc = CacheDesc(1, shape, F16)
    for _ in range(2):
        with pytest.raises(LLMException) as caught:
            desc.size  # noqa: B018
        assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_dimension_can_be_changed() -> None:
    shape = [4, 8]
    desc = CacheDesc(1, shape, F16)
    assert desc.size == 64
    desc.update_dim(1, 16)
    assert (shape, desc.size) == ([4, 16], 128)
    desc.update_dim(0, 2)
    assert (desc.shape, desc.size, desc.batch_size) == ([2, 16], 64, 4)


def test_a_dimension_that_cannot_be_changed() -> None:
    desc = CacheDesc(1, [4, 8], F16)
    with pytest.raises(TypeError, match="tuple"):
        CacheDesc(1, (4, 8), F16).update_dim(1, 16)
    with pytest.raises(TypeError, match="only support int"):
        desc.update_dim(1, "16")  # type: ignore[arg-type]
    with pytest.raises(LLMException, match="out of range"):
        desc.update_dim(2, 16)
    assert desc.shape == [4, 8]


def test_the_text_of_a_description() -> None:
    assert repr(CacheDesc(2, [4, 8], F16)) == (
        "CacheDesc(num_tensors=2, shape=[4, 8], data_type=DataType.DT_FLOAT16, placement=Placement.DEVICE, "
        "batch_dim_index=0, seq_len_dim_index=-1,kv_tensor_format=None)"
    )
