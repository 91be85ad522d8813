"""Tensors over arrays and over the memory of caches."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from llm_datadist import DataType, Tensor, TensorDesc
from llm_datadist.data_type import dtype_to_np_dtype

NUMBERS = [member for member in DataType if member not in (DataType.DT_STRING, DataType.DT_BF16)]


def test_a_description() -> None:
    shape = (2, 3)
    desc = TensorDesc(DataType.DT_FLOAT16, shape)
    assert (desc.dtype, desc.shape) == (DataType.DT_FLOAT16, [2, 3])
    assert str(desc) == "TensorDesc(dtype=DataType.DT_FLOAT16, shape=[2, 3])"
    desc.shape.append(4)
    assert desc.shape == [2, 3]


def test_a_description_of_wrong_types() -> None:
    bad: list[tuple[Any, Any]] = [(1, [2]), (None, [2]), (DataType.DT_INT8, 5), (DataType.DT_INT8, ["2"])]
    for dtype, shape in bad:
        with pytest.raises(TypeError, match="only support"):
            TensorDesc(dtype, shape)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_tensor_is_a_copy_of_its_array(dtype: DataType) -> None:
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype_to_np_dtype[dtype])
    wanted = array.copy()
    derived, described = Tensor(array), Tensor(array, TensorDesc(dtype, [2, 3]))
    array[:] = 0
    for tensor in (derived, described, Tensor(derived)):
        assert tensor.numpy().dtype == wanted.dtype
        assert np.array_equal(tensor.numpy(), wanted)


def test_numpy_gives_a_view_or_a_copy() -> None:
    tensor = Tensor(np.zeros(4, np.int32))
    copied = tensor.numpy(copy=True)
    copied[:] = 7
    assert tensor.numpy().tolist() == [0, 0, 0, 0]
    assert np.shares_memory(tensor.numpy(), tensor.numpy(False))
    with pytest.raises(TypeError, match="copy only support bool"):
        tensor.numpy(copy=1)  # type: ignore[arg-type]


def test_a_copy_of_a_tensor_stands_alone() -> None:
    first = Tensor(np.zeros(4, np.int32))
    second = Tensor(first)
    second.numpy()[:] = 7
    assert first.numpy().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("array", "desc", "match"),
    [
        (np.zeros((2, 3), np.float32), TensorDesc(DataType.DT_FLOAT, [3, 2]), "shape"),
        (np.zeros((2, 3), np.float32), TensorDesc(DataType.DT_FLOAT16, [2, 3]), "type float32.*float16"),
        (np.zeros((2, 3), np.float32), TensorDesc(DataType.DT_STRING, [2, 3]), "type float32"),
        (np.zeros((2, 3), np.complex128), None, "type complex128"),
        (np.zeros((2, 3), ">f4"), None, "type >f4"),
        (np.zeros((2, 3), object), None, "type object"),
        (np.zeros((2, 3), np.float32).T, None, "C-contiguous"),
    ],
)
def test_an_array_that_does_not_fit(array: Any, desc: TensorDesc | None, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        Tensor(array, desc)


def test_arguments_of_wrong_types() -> None:
    bad: list[tuple[Any, Any]] = [([1, 2], None), (5, None), (None, None), (np.zeros(2), DataType.DT_DOUBLE)]
    for data, desc in bad:
        with pytest.raises(TypeError, match="only support"):
            Tensor(data, desc)


@pytest.mark.parametrize("array", [np.array(["a", "bcd"]), np.array([b"a", b"bcd"])])
def test_text_is_only_given_as_a_copy(array: Any) -> None:
    tensor = Tensor(array)
    assert "DT_STRING" in str(tensor)
    with pytest.raises(RuntimeError, match="copy=True"):
        tensor.numpy()
    assert np.array_equal(tensor.numpy(copy=True), array)


@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_bfloat16_is_read_as_float32(shape: tuple[int, ...]) -> None:
    values = np.array([1.0, -2.5, 3e38, 0.0][: int(np.prod(shape))], np.float32).reshape(shape)
    # Cut off, not rounded: the values above 1 but the third have no lower bits.
    expected = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    tensor = Tensor(np.asarray(bits).view(np.float16), TensorDesc(DataType.DT_BF16, list(shape)))
    for copy in (False, True):
        assert tensor.numpy(copy).dtype == np.float32
        assert tensor.numpy(copy).shape == shape
        assert np.array_equal(tensor.numpy(copy), expected)
    one = Tensor(np.array([0x3F80], np.uint16).view(np.float16), TensorDesc(DataType.DT_BF16, [1]))
    assert one.numpy().tolist() == [1.0]


def test_the_text_shows_values_and_description() -> None:
    text = str(Tensor(np.array([1, 2], np.int8)))
    assert "1 2" in text
    assert "TensorDesc(dtype=DataType.DT_INT8, shape=[2])" in text


class Owner:
    """Something whose life can be watched."""


@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_tensor_over_memory_shows_it_and_keeps_the_owner(dtype: DataType) -> None:
    memory = bytearray(6 * np.dtype(dtype_to_np_dtype[dtype]).itemsize)
    owner = Owner()
    watched = weakref.ref(owner)
    tensor = Tensor._over(memoryview(memory), TensorDesc(dtype, [2, 3]), owner)
    del owner
    assert tensor.numpy().shape == (2, 3)
    memory[0] = 1
    assert tensor.numpy().view(np.uint8)[0, 0] == 1
    tensor.numpy().view(np.uint8)[0, 0] = 0
    assert memory[0] == 0
    gc.collect()
    assert watched() is not None
    del tensor
    gc.collect()
    assert watched() is None


def test_a_tensor_over_memory_of_bfloat16_and_of_text() -> None:
    memory = bytearray(b"\x80\x3f\x00\x40")
    tensor = Tensor._over(memoryview(memory), TensorDesc(DataType.DT_BF16, [2, 1]), None)
    assert tensor.numpy().tolist() == [[1.0], [2.0]]
    memory[0:2] = b"\x00\x00"
    assert tensor.numpy().tolist() == [[0.0], [2.0]]
    text = Tensor._over(
        memoryview(b"one".ljust(16, b"\0") + b"two".ljust(16, b"\0")), TensorDesc(DataType.DT_STRING, [2]), None
    )
    assert text.numpy(copy=True).tolist() == [b"one", b"two"]
