"""DLPack capsules: who keeps what alive, and what consumers see."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import pytest

from llm_datadist import _dlpack

PLAIN = b"dltensor"
VERSIONED = b"dltensor_versioned"
CPU, READ_ONLY, IS_COPIED = 1, 1, 2


class Owner:
    pass


class Producer:
    """Speaks the protocol for 24 bytes that an `Owner` stands for."""

    def __init__(self, memory: object, owner: object, code: int = _dlpack.FLOAT, bits: int = 16) -> None:
        self.arguments = (memory, owner, code, bits, (3, 24 * 8 // bits // 3))

    def __dlpack_device__(self) -> tuple:
        return _dlpack.CPU_DEVICE

    def __dlpack__(self, *, max_version: object = None, **ignored: object) -> object:
        return self.capsule(versioned=max_version is not None)

    def capsule(self, *, versioned: bool, copied: bool = False) -> object:
        return _dlpack.make_capsule(*self.arguments, versioned=versioned, copied=copied)


# A consumer of our own, which knows the structures from the description of the protocol.


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


def capsule_name(capsule: object) -> bytes:
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    return get_name(capsule)


def take(capsule: object) -> Managed | ManagedVersioned:
    """Take the tensor out of a capsule; the taker then owes a call of `give_back`."""
    name = capsule_name(capsule)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    set_name = ctypes.pythonapi.PyCapsule_SetName
    set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]
    structure = ManagedVersioned if name == VERSIONED else Managed
    managed = structure.from_address(get_pointer(capsule, name))
    set_name(capsule, b"used_dltensor_versioned" if name == VERSIONED else b"used_dltensor")
    return managed


def give_back(managed: Managed | ManagedVersioned) -> None:
    managed.deleter(ctypes.addressof(managed))


@pytest.mark.parametrize("versioned", [False, True])
def test_capsule_that_nobody_takes_lets_go(versioned: bool) -> None:
    memory, owner = bytearray(24), Owner()
    gone = weakref.ref(owner)
    capsule = Producer(memory, owner).capsule(versioned=versioned)
    assert capsule_name(capsule) == (VERSIONED if versioned else PLAIN)
    del owner
    assert gone() is not None
    with pytest.raises(BufferError):
        memory.append(0)  # a bytearray cannot be resized while its buffer is held
    del capsule
    assert gone() is None
    memory.append(0)


@pytest.mark.parametrize("versioned", [False, True])
def test_tensor_that_was_taken_outlives_the_capsule(versioned: bool) -> None:
    memory, owner = bytearray(range(24)), Owner()
    gone = weakref.ref(owner)
    managed = take(Producer(memory, owner).capsule(versioned=versioned))
    del owner
    gc.collect()
    assert gone() is not None
    tensor = managed.tensor
    assert ctypes.string_at(tensor.data, 24) == bytes(range(24))
    assert (tensor.device_type, tensor.device_id, tensor.byte_offset) == (CPU, 0, 0)
    assert (tensor.code, tensor.bits, tensor.lanes) == (_dlpack.FLOAT, 16, 1)
    assert (tensor.ndim, tensor.shape[:2], tensor.strides[:2]) == (2, [3, 4], [4, 1])
    give_back(managed)
    assert gone() is None
    memory.append(0)


@pytest.mark.parametrize(
    ("memory", "copied", "flags"),
    [(bytearray(24), False, 0), (bytes(24), False, READ_ONLY), (bytearray(24), True, IS_COPIED)],
)
def test_newer_structure_says_what_it_is(memory: object, copied: bool, flags: int) -> None:
    managed = take(Producer(memory, Owner()).capsule(versioned=True, copied=copied))
    assert (managed.major, managed.flags) == (1, flags)
    give_back(managed)


def test_read_only_memory_needs_the_newer_structure() -> None:
    with pytest.raises(BufferError):
        Producer(bytes(24), Owner()).capsule(versioned=False)


def test_several_tensors_of_one_producer() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    memory = bytearray(24)
    producer = Producer(memory, owner)
    first, second = np.from_dlpack(producer), np.from_dlpack(producer)
    memory[2:4] = np.float16(1.5).tobytes()
    assert first[0, 1] == second[0, 1] == 1.5
    del producer, owner, first
    assert gone() is not None
    del second
    assert gone() is None


NUMPY_TYPES = [
    *((np.dtype(f"int{bits}"), _dlpack.INT, bits) for bits in (8, 16, 32, 64)),
    *((np.dtype(f"uint{bits}"), _dlpack.UINT, bits) for bits in (8, 16, 32, 64)),
    *((np.dtype(f"float{bits}"), _dlpack.FLOAT, bits) for bits in (16, 32, 64)),
    (np.dtype("bool"), _dlpack.BOOL, 8),
]


@pytest.mark.parametrize(("dtype", "code", "bits"), NUMPY_TYPES)
def test_types_numpy_knows(dtype: np.dtype, code: int, bits: int) -> None:
    array = np.from_dlpack(Producer(bytearray(24), Owner(), code, bits))
    assert array.dtype == dtype
    assert array.shape == (3, 64 // bits)


def test_torch_sees_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    memory = bytearray(24)
    tensor = torch.from_dlpack(Producer(memory, Owner(), _dlpack.BFLOAT, 16))
    assert tensor.dtype is torch.bfloat16
    tensor[0, 1] = 1.0
    assert memory[2:4] == b"\x80\x3f"  # the upper half of float32 1.0, little endian


@pytest.mark.parametrize("shape", [(13,), (3, 3), (0,), ()])
def test_shape_must_make_up_the_memory(shape: tuple) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    memory = bytearray(24)
    with pytest.raises(ValueError, match="does not make up a buffer of 24 bytes"):
        _dlpack.make_capsule(memory, owner, _dlpack.FLOAT, 16, shape, versioned=True, copied=False)
    del owner
    assert gone() is None
    memory.append(0)


def test_a_failing_export_leaves_nothing() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    with pytest.raises(TypeError):
        _dlpack.make_capsule(24, owner, _dlpack.FLOAT, 16, (12,), versioned=True, copied=False)
    del owner
    assert gone() is None
