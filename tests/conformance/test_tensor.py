"""Tensor and TensorDesc."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist import DataType, KvCacheManager, Tensor, TensorDesc
from llm_datadist.views import tensor_view
from tests.own_instance import desc


def test_C251_the_description() -> None:
    described = TensorDesc(DataType.DT_FLOAT16, (2, 3))
    assert described.shape == [2, 3]
    assert str(described) == "TensorDesc(dtype=DataType.DT_FLOAT16, shape=[2, 3])"
    with pytest.raises(TypeError):
        TensorDesc(1, (2, 3))  # type: ignore[arg-type]


def test_C252_the_data_are_copied() -> None:
    array = np.zeros((2, 3), np.float32)
    tensor = Tensor(array)
    array[:] = 1
    np.testing.assert_array_equal(tensor.numpy(), np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError):
        tensor.numpy(copy=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "described"),
    [
        (np.zeros((2, 3), np.float32), TensorDesc(DataType.DT_FLOAT, (3, 2))),
        (np.zeros((2, 3), np.float32), TensorDesc(DataType.DT_INT32, (2, 3))),
        (np.zeros((2, 3), np.complex128), None),
        (np.zeros((2, 3), np.float32).T, None),
    ],
)
def test_C253_arrays_that_do_not_fit(array: np.ndarray, described: TensorDesc | None) -> None:
    with pytest.raises(RuntimeError):
        Tensor(array, described)


def test_C254_text() -> None:
    tensor = Tensor(np.array(["a", "bc"]))
    with pytest.raises(RuntimeError):
        tensor.numpy()
    assert [str(text) for text in tensor.numpy(copy=True)] == ["a", "bc"]


def test_C255_bfloat16(manager: KvCacheManager) -> None:
    cache = manager.allocate_cache(desc(1, [2, 2], DataType.DT_BF16))
    tensor_view(cache)[:] = 0x3F80
    assert (manager.get_cache_tensors(cache)[0].numpy() == 1.0).all()
