"""Bytes of the host into tensors of caches and back, on the host and on a simulated device."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist import CacheDesc, DataType, KvCache, LLMDataDist, LLMRole, LLMStatusCode, Placement
from llm_datadist.device_copies import copy_from_cache, copy_to_cache
from llm_datadist.views import tensor_view
from tests.datadist_member import make_options
from tests.on_simulator import on_simulator, set_knob
from tests.own_instance import Open, expect, open_datadist

__all__ = ["open_datadist"]

DESC = CacheDesc(3, (4, 5, 7), DataType.DT_FLOAT16)
NBYTES = 4 * 5 * 7 * 2


def numbers(seed: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def check_copies(cache: KvCache) -> None:
    """Write and read all of a tensor and a part of it; nothing else may change."""
    wanted = [numbers(tensor, NBYTES) for tensor in range(3)]
    for tensor in range(3):
        copy_to_cache(cache, tensor, wanted[tensor])
    copy_to_cache(cache, 1, np.arange(7, dtype=np.float16), offset=70 + 14)
    wanted[1][84:98] = np.arange(7, dtype=np.float16).view(np.uint8)
    copy_to_cache(cache, 1, b"odd", offset=NBYTES - 3)
    wanted[1][-3:] = np.frombuffer(b"odd", np.uint8)
    copy_to_cache(cache, 1, b"", offset=NBYTES)
    for tensor in range(3):
        got = np.zeros(DESC.shape, np.float16)
        copy_from_cache(cache, tensor, got)
        np.testing.assert_array_equal(got.view(np.uint8).reshape(-1), wanted[tensor])
    part = bytearray(9)
    copy_from_cache(cache, 2, part, offset=31)
    assert part == wanted[2][31:40].tobytes()


def test_on_the_host(open_datadist: Open) -> None:
    cache = open_datadist(LLMRole.MIX).kv_cache_manager.allocate_cache(DESC)
    check_copies(cache)
    copy_to_cache(cache, 0, np.full(70, 2.5, np.float16))
    assert float(tensor_view(cache, 0)[1, 4, 6]) == 2.5


@on_simulator(LLM_DATADIST_DEVICE="simulator")
def test_on_a_device() -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    datadist.init({**make_options(LLMRole.MIX), "llm.SyncKvCacheWaitTime": "300"})
    cache = datadist.kv_cache_manager.allocate_cache(DESC)
    check_copies(cache)
    set_knob("FAULTS", "exec.copy=code(507015)")
    expect(LLMStatusCode.LLM_FAILED, "copy_to_cache failed.*507015", copy_to_cache, cache, 0, b"some")
    set_knob("FAULTS", "exec.copy=hang")
    expect(LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, "300 ms", copy_from_cache, cache, 0, bytearray(4))
    set_knob("FAULTS", "")
    datadist.finalize()


def test_arguments(open_datadist: Open) -> None:
    manager = open_datadist(LLMRole.MIX).kv_cache_manager
    cache = manager.allocate_cache(DESC)
    invalid = LLMStatusCode.LLM_PARAM_INVALID
    expect(invalid, "tensor_index 3 is out of range", copy_to_cache, cache, 3, b"")
    expect(invalid, "device_index 1 is out of range", copy_to_cache, cache, 0, b"", device_index=1)
    expect(
        invalid, f"offset {NBYTES - 1} \\+ 2 bytes is out of range", copy_to_cache, cache, 0, b"ab", offset=NBYTES - 1
    )
    expect(invalid, "contiguous", copy_to_cache, cache, 0, np.zeros(8)[::2])
    expect(invalid, "read-only", copy_from_cache, cache, 0, b"bytes")
    with pytest.raises(TypeError):
        copy_to_cache(cache, 0, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        copy_to_cache(None, 0, b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offset"):
        copy_to_cache(cache, 0, b"", offset=-1)
    memory = np.zeros(DESC.shape, np.float16)
    on_host = KvCache.create_cpu_cache(
        CacheDesc(1, DESC.shape, DataType.DT_FLOAT16, Placement.HOST), [memory.ctypes.data]
    )
    expect(invalid, "host cache", copy_to_cache, on_host, 0, b"")
    manager.deallocate_cache(cache)
    expect(LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, "deallocated", copy_to_cache, cache, 0, b"a")
