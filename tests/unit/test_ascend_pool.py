"""A pool in the memory of a device: what the host may do with it, and what errors are called."""

from __future__ import annotations

import gc

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist._acl import AclError, Device
from llm_datadist._hccl import HcclError
from llm_datadist._shared_library import LibraryMissing, VendorError
from llm_datadist.devices.ascend.errors import llm_exception
from llm_datadist.devices.ascend.memory_figures import memory_figures
from llm_datadist.devices.ascend.pool import AscendPool
from tests.on_simulator import counter, on_simulator, set_knob

MIB = 1 << 20


@on_simulator()
def test_a_pool_is_read_and_written_by_copies() -> None:
    device, watcher = Device(0), Device(0)
    pool = AscendPool(device, 5 * MIB)
    assert pool.segment.address == pool.address
    assert (pool.capacity, pool.segment.size) == (5 * MIB, 6 * MIB)
    pool.prepare(0, pool.capacity)
    pool.write(pool.address + 5, b"some bytes")
    assert pool.read(pool.address + 5, 10) == b"some bytes"
    assert memory_figures(device).free == memory_figures(device).total - 6 * MIB
    with pytest.raises(LLMException, match="get_cache_tensors") as refused:
        pool.view(pool.address, 10)
    assert refused.value.status_code == LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    pool.close()
    pool.close()
    with pytest.raises(LLMException, match="closed") as closed:
        pool.read(pool.address, 1)
    assert closed.value.status_code == LLMStatusCode.LLM_FAILED
    assert memory_figures(watcher).free == memory_figures(watcher).total
    watcher.close()
    with pytest.raises(LLMException, match="closed"):
        memory_figures(device)


@on_simulator()
def test_a_copy_that_takes_too_long_is_a_timeout() -> None:
    device = Device(0)
    pool = AscendPool(device, 1)
    set_knob("FAULTS", "exec.copy=hang")
    for call in (lambda: pool.read(pool.address, 8, 0.05), lambda: pool.write(pool.address, b"12345678", 0.05)):
        with pytest.raises(LLMException, match=r"8 bytes .*longer than 0.05 s") as late:
            call()
        assert late.value.status_code == LLMStatusCode.LLM_TIMEOUT
    set_knob("FAULTS", "exec.copy=code(507054)")
    with pytest.raises(LLMException, match=r"reading 8 bytes of device 0.*507054") as failed:
        pool.read(pool.address, 8)
    assert failed.value.status_code == LLMStatusCode.LLM_FAILED
    pool.close()
    device.close()


@on_simulator(HBM_MIB=64)
def test_no_room_tells_how_much_there_is() -> None:
    device = Device(0)
    with pytest.raises(
        LLMException, match=rf"{65 * MIB} bytes on device 0 .*{64 * MIB} of {64 * MIB} bytes free.*207001"
    ) as full:
        AscendPool(device, 65 * MIB)
    assert full.value.status_code == LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    device.close()
    assert counter("live.allocations") == 0


@on_simulator(HOST_VISIBLE=1)
def test_a_simulated_pool_may_be_viewed_and_outlives_its_views() -> None:
    device = Device(0)
    pool = AscendPool(device, 1 * MIB)
    view = pool.view(pool.address + 64, 6)
    view[:] = b"abcdef"
    assert pool.read(pool.address + 64, 6) == b"abcdef"
    part = view[2:]
    pool.close()
    del view
    assert bytes(part) == b"cdef"
    assert counter("live.allocations") == 1
    del part
    gc.collect()
    assert counter("live.allocations") == 0
    device.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AclError("aclrtMalloc", 207001), LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY),
        (AclError("aclrtMalloc", 207018), LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY),
        (AclError("aclrtSynchronizeStreamWithTimeout", 507046), LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT),
        (AclError("aclrtSynchronizeEventWithTimeout", 507047), LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT),
        (AclError("aclrtMemcpyAsync", 107019), LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT),
        (AclError("aclrtMemcpy", 107000), LLMStatusCode.LLM_PARAM_INVALID),
        (AclError("aclrtMemcpy", 100000), LLMStatusCode.LLM_PARAM_INVALID),
        (AclError("aclrtMallocPhysical", 207000), LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
        (AclError("aclrtMallocPhysical", 200006), LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
        (AclError("aclrtMallocPhysical", 200001), LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
        (AclError("aclrtMemcpyAsync", 507053, "multi-bit"), LLMStatusCode.LLM_FAILED),
        (HcclError("HcclCommInitRootInfoConfig", 9), LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT),
        (HcclError("HcclSend", 1), LLMStatusCode.LLM_PARAM_INVALID),
        (HcclError("HcclSend", 5), LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
        (HcclError("HcclSend", 24), LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY),
        (HcclError("HcclSend", 21, "remote"), LLMStatusCode.LLM_FAILED),
        (LibraryMissing(("libacl_rt.so",), ("libacl_rt.so: no such file",)), LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
    ],
)
def test_what_errors_are_called(error: VendorError, status: LLMStatusCode) -> None:
    codes = {
        "timeout": LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT,
        "out_of_memory": LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY,
    }
    made = llm_exception("swap_blocks", error, **codes)
    assert made.status_code == status
    assert str(made) == f"swap_blocks failed, error code is {status}: {error}"
    for part in error.args[:2]:
        assert str(part if isinstance(part, (str, int)) else part[0]) in str(made)
