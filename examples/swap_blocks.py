"""Make room in a paged cache: move the blocks of a waiting sequence to host memory, and bring them back later.

Which blocks belong to whom is the scheduler's business; here two lists stand for it. Beside the cache on the device
there is a larger one in host memory, in arrays of the program.

Run it: python examples/swap_blocks.py
"""

from __future__ import annotations

import numpy as np

from llm_datadist import CacheDesc, DataType, KvCache, LLMDataDist, LLMRole, Placement
from llm_datadist.views import tensor_view

LAYERS, TOKENS_PER_BLOCK, HIDDEN = 2, 16, 64
DEVICE_BLOCKS, HOST_BLOCKS = 8, 32
ON_DEVICE = CacheDesc(2 * LAYERS, (DEVICE_BLOCKS, TOKENS_PER_BLOCK, HIDDEN), DataType.DT_FLOAT16)
ON_HOST = CacheDesc(2 * LAYERS, (HOST_BLOCKS, TOKENS_PER_BLOCK, HIDDEN), DataType.DT_FLOAT16, Placement.HOST)
OPTIONS = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": str(16 << 20)}


def write(cache: KvCache, blocks: list[int], value: float) -> None:
    """Stand in for a model that writes the K and V of a sequence."""
    for tensor in range(ON_DEVICE.num_tensors):
        tensor_view(cache, tensor)[blocks] = value + tensor


def holds(cache: KvCache, blocks: list[int], value: float) -> bool:
    return all(np.all(tensor_view(cache, tensor)[blocks] == value + tensor) for tensor in range(ON_DEVICE.num_tensors))


def main() -> None:
    datadist = LLMDataDist(LLMRole.DECODER, cluster_id=1)
    datadist.init(dict(OPTIONS))
    manager = datadist.kv_cache_manager
    cache = manager.allocate_blocks_cache(ON_DEVICE)
    # One array a tensor. They must live as long as the cache that is made of their addresses.
    arrays = [np.zeros(ON_HOST.shape, np.float16) for _ in range(ON_HOST.num_tensors)]
    host = KvCache.create_cpu_cache(ON_HOST, [array.ctypes.data for array in arrays])

    waiting, at_host = [6, 2, 3], [20, 21, 22]
    write(cache, waiting, 10.0)

    manager.swap_blocks(cache, host, dict(zip(waiting, at_host)))  # swap out: device -> host
    print(f"swapped out: device blocks {waiting} -> host blocks {at_host}")

    urgent = waiting
    write(cache, urgent, 70.0)  # the freed blocks serve another sequence

    back = [7, 0, 1]  # the sequence comes back into whatever blocks are free then
    manager.swap_blocks(host, cache, dict(zip(at_host, back)))  # swap in: host -> device
    print(f"swapped in:  host blocks {at_host} -> device blocks {back}")

    assert holds(cache, back, 10.0)
    assert holds(cache, urgent, 70.0)
    datadist.finalize()


if __name__ == "__main__":
    main()
