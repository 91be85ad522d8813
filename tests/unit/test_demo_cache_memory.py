"""Arrays of the demo's model beside a cache on a simulated device."""

from __future__ import annotations

import numpy as np

from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
from llm_datadist.tools.demo.cache_memory import CopiedMemory, SeenMemory, memory_of
from tests.datadist_member import make_options
from tests.on_simulator import on_simulator
from tests.own_instance import Open, open_datadist

__all__ = ["open_datadist"]

DESC = CacheDesc(3, (4, 8, 2), DataType.DT_FLOAT16)


def test_on_the_host_they_are_the_cache(open_datadist: Open) -> None:
    manager = open_datadist(LLMRole.MIX).kv_cache_manager
    cache = manager.allocate_cache(DESC)
    memory = memory_of(manager, cache)
    assert isinstance(memory, SeenMemory)
    memory.arrays[1][2] = 5.0
    assert memory.store([2], 8) == memory.fetch([2], 8) == 0.0
    assert float(manager.get_cache_tensors(cache, 1)[0].numpy()[2, 7, 1]) == 5.0


@on_simulator(LLM_DATADIST_DEVICE="simulator")
def test_on_a_device_they_are_copied() -> None:
    datadist = LLMDataDist(LLMRole.MIX, 1)
    datadist.init(make_options(LLMRole.MIX))
    manager = datadist.kv_cache_manager
    cache = manager.allocate_cache(DESC)
    memory = memory_of(manager, cache)
    assert isinstance(memory, CopiedMemory)
    for tensor, array in enumerate(memory.arrays):
        array[:] = np.arange(array.size).reshape(array.shape) + 100 * tensor
    kept = [array.copy() for array in memory.arrays]
    assert memory.store([0, 1, 2, 3], 8) > 0
    for array in memory.arrays:
        array[:] = -1
    assert memory.store([3], 5) > 0  # a part of a slot
    assert memory.fetch([1], 8) > 0
    assert memory.fetch([2], 3) > 0
    for tensor, array in enumerate(memory.arrays):
        np.testing.assert_array_equal(array[1], kept[tensor][1])
        np.testing.assert_array_equal(array[2, :3], kept[tensor][2, :3])
        assert (array[[0, 3]] == -1).all()
        assert (array[2, 3:] == -1).all()
        there = manager.get_cache_tensors(cache, tensor)[0].numpy()
        assert (there[3, :5] == -1).all()
        np.testing.assert_array_equal(there[3, 5:], kept[tensor][3, 5:])
    datadist.finalize()
