"""Torch tensors over addresses and caches; torch_npu is a fake here, which puts its tensors into host memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist import Cache, CacheDesc, DataType, LLMDataDist, LLMException, LLMRole, LLMStatusCode, Placement
from llm_datadist.torch_tensors import create_cpu_tensors, create_npu_tensors, create_tensors
from tests.datadist_member import make_options

torch = pytest.importorskip("torch")

NAMES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]
CREATE = [create_cpu_tensors, create_npu_tensors]


class Memory:
    """Bytes with an address, a multiple of 16."""

    def __init__(self, nbytes: int) -> None:
        room = (ctypes.c_char * (nbytes + 16))()
        self.buffer = (ctypes.c_char * nbytes).from_buffer(room, -ctypes.addressof(room) % 16)
        self.address = ctypes.addressof(self.buffer)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Put a fake torch_npu in place; gives what its constructor of storage is called with."""
    calls: list[tuple[Any, ...]] = []

    def construct_storage(address: int, device: Any, nbytes: int) -> Any:
        calls.append((address, device, nbytes))
        return torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), nbytes)

    def construct_tensor(metadata: dict[str, Any], storage: Any) -> Any:
        assert (metadata["data_ptr"], metadata["device"], metadata["nbytes"]) == calls[-1]
        assert metadata["npu_format"] == 2
        empty = torch.empty(0, dtype=metadata["dtype"])
        return empty.set_(storage, metadata["storage_offset"], metadata["size"], metadata["stride"])

    module: Any = types.ModuleType("torch_npu")
    module.__version__ = "fake"
    module.npu = types.SimpleNamespace(current_device=lambda: 3)
    module._C = types.SimpleNamespace(
        _construct_storage_from_data_pointer=construct_storage,
        _construct_NPU_Tensor_From_Storage_And_Metadata=construct_tensor,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    # What importing torch_npu does; it cannot be taken back, and does no harm to other tests.
    torch.utils.rename_privateuse1_backend("npu")
    return calls


# ---- tensors over addresses


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_is_the_memory_at_the_address(create: Any, name: str, npu: list[Any]) -> None:
    dtype = getattr(torch, name)
    nbytes = 6 * dtype.itemsize
    first, second = Memory(nbytes), Memory(nbytes)
    tensors = create((2, 3), dtype, [first.address, second.address])
    assert isinstance(tensors, list)
    for tensor, memory in zip(tensors, (first, second)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr()) == (torch.Size((2, 3)), dtype, memory.address)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == nbytes
    bits = bytes(range(1, nbytes + 1)) if name != "bool" else bytes([1, 0, 1, 1, 0, 0])
    second.buffer.raw = bits  # what another writes shows in the tensor
    assert bytes(tensors[1].reshape(-1).view(torch.uint8).tolist()) == bits
    assert first.buffer.raw == bytes(nbytes)
    tensors[0].copy_(tensors[1])  # and the other way round
    assert first.buffer.raw == bits


@pytest.mark.parametrize("create", CREATE)
def test_the_memory_outlives_the_tensor(create: Any, npu: list[Any]) -> None:
    memory = Memory(64)
    tensor = create([4], torch.float32, (memory.address,))[0]
    tensor[:] = 1
    part = tensor[1:]
    del tensor
    part[:] = 2
    del part
    gc.collect()
    assert memory.buffer.raw[:16] == bytes.fromhex("0000803f") + 3 * bytes.fromhex("00000040")


@pytest.mark.parametrize("create", CREATE)
def test_shapes(create: Any, npu: list[Any]) -> None:
    memory = Memory(256)
    assert create((2, 3, 4), torch.int16, [memory.address])[0].stride() == (12, 4, 1)
    assert create(torch.Size((8,)), torch.int16, [memory.address])[0].shape == (8,)
    assert create((), torch.int64, [memory.address])[0].shape == ()
    assert create((2,), torch.int64, []) == []


def test_npu_tensors_are_on_the_current_device(npu: list[Any]) -> None:
    memory = Memory(64)
    create_npu_tensors((4,), torch.float16, [memory.address, memory.address + 8])
    assert npu == [(memory.address + offset, torch.device("npu", 3), 8) for offset in (0, 8)]


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize(
    ("kind", "match", "wrong"),
    [
        (TypeError, "shape", {"shape": 4}),
        (TypeError, "shape", {"shape": None}),
        (TypeError, "shape inner type", {"shape": (2.0,)}),
        (TypeError, "dtype", {"dtype": "float16"}),
        (TypeError, "dtype", {"dtype": DataType.DT_FLOAT16}),
        (TypeError, "addrs", {"addrs": 4096}),
        (TypeError, "addrs inner type", {"addrs": ["4096"]}),
        (ValueError, "each dimension should be greater than 0", {"shape": (2, 0)}),
        (ValueError, "each dimension should be greater than 0", {"shape": (-1,)}),
        (ValueError, "do not fit into int64", {"shape": (2**40, 2**40)}),
        (ValueError, "dtype is torch.uint16, should be one of bool, uint8", {"dtype": torch.uint16}),
        (ValueError, "dtype is torch.float8_e4m3fn", {"dtype": torch.float8_e4m3fn}),
        (ValueError, r"addrs\[0\]", {"addrs": [-1]}),
        (ValueError, r"addrs\[1\]", {"addrs": [4096, 2**64]}),
    ],
)
def test_wrong_arguments(create: Any, kind: type[Exception], match: str, wrong: dict[str, Any], npu: list[Any]) -> None:
    with pytest.raises(kind, match=match):
        create(**{"shape": (2,), "dtype": torch.float16, "addrs": [4096], **wrong})
    assert npu == []


def test_host_addresses_that_cannot_be() -> None:
    for address in (0, 4097, 4098):
        with pytest.raises(ValueError, match=r"addrs\[1\] is 0x.*, should be a multiple of 4 and not 0"):
            create_cpu_tensors((1,), torch.float32, [4096, address])


def test_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(RuntimeError, match="tensors on an NPU need torch_npu, which cannot be imported"):
        create_npu_tensors((1,), torch.float16, [4096])


def test_a_torch_npu_without_the_constructors(npu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_construct_NPU_Tensor_From_Storage_And_Metadata"
    monkeypatch.delattr(f"torch_npu._C.{name}")
    with pytest.raises(RuntimeError, match=f"torch_npu fake has no {name}"):
        create_npu_tensors((1,), torch.float16, [4096])


def test_a_torch_npu_that_fails(npu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise TypeError("other arguments in this release")

    monkeypatch.setattr("torch_npu._C._construct_storage_from_data_pointer", fail)
    with pytest.raises(RuntimeError, match="made no tensor of 2 bytes at 0x1000: other arguments in this release"):
        create_npu_tensors((1,), torch.float16, [4096])


# ---- tensors of a cache


@pytest.fixture
def datadist() -> Iterator[LLMDataDist]:
    instance = LLMDataDist(LLMRole.DECODER, 1)
    instance.init(make_options(LLMRole.DECODER))
    yield instance
    gc.collect()
    instance.finalize()


def refuse_views(*args: Any) -> None:
    raise LLMException("device memory", status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED)


@pytest.mark.parametrize(
    ("data_type", "name"), [(DataType.DT_BF16, "bfloat16"), (DataType.DT_BOOL, "bool"), (DataType.DT_UINT16, "uint16")]
)
def test_tensors_of_a_cache(datadist: LLMDataDist, data_type: DataType, name: str) -> None:
    cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(3, (2, 5), data_type))
    tensors = create_tensors(cache)
    assert [tensor.data_ptr() for tensor in tensors] == cache.per_device_tensor_addrs[0]
    assert {(tensor.shape, tensor.dtype) for tensor in tensors} == {((2, 5), getattr(torch, name))}
    address = cache.per_device_tensor_addrs[0][2]
    del cache
    gc.collect()
    tensors[2][1, 4] = 1  # the tensors keep the cache
    assert any(ctypes.string_at(address, tensors[2].nbytes))


def test_tensors_of_a_cache_on_an_npu(datadist: LLMDataDist, npu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does not see the memory: the tensors are torch_npu's, and the cache outlives them."""
    manager = datadist.kv_cache_manager
    cache = manager.allocate_cache(CacheDesc(2, (4, 8), DataType.DT_BF16))
    other = manager.allocate_cache(CacheDesc(2, (4, 8), DataType.DT_UINT32))
    addrs = cache.per_device_tensor_addrs[0]
    monkeypatch.setattr(type(manager), "_tensor_memory", refuse_views)
    keys, values = create_tensors(cache)
    assert [(address, nbytes) for address, _, nbytes in npu] == [(address, 64) for address in addrs]
    assert (values.shape, values.dtype) == ((4, 8), torch.bfloat16)
    values[:] = 1.5
    del keys, values
    gc.collect()
    assert ctypes.string_at(addrs[1], 64) == bytes.fromhex("c03f") * 32
    with pytest.raises(ValueError, match="DT_UINT32 has no tensors here"):
        create_tensors(other)


def test_tensors_of_a_cpu_cache() -> None:
    first, second = Memory(64), Memory(64)
    desc = CacheDesc(2, (4, 8), DataType.DT_FLOAT16, Placement.HOST)
    tensors = create_tensors(Cache.create_cpu_cache(desc, [first.address, second.address]))
    tensors[1][:] = 1
    assert first.buffer.raw == bytes(64)
    assert second.buffer.raw == bytes.fromhex("003c") * 32


def test_what_has_no_tensors(datadist: LLMDataDist) -> None:
    manager = datadist.kv_cache_manager
    with pytest.raises(TypeError, match="cache"):
        create_tensors([4096])  # type: ignore[arg-type]
    cache = manager.allocate_cache(CacheDesc(2, (4, 8), DataType.DT_FLOAT))
    with pytest.raises(LLMException, match="device_index 1 is out of range"):
        create_tensors(cache, 1)
    manager.deallocate_cache(cache)
    with pytest.raises(LLMException) as raised:
        create_tensors(cache)
    assert raised.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
