"""What transfer_cache_async of `CacheManager` checks, in which order, and what it asks."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheKeyByIdAndIndex,
    CacheTask,
    KvCache,
    LayerSynchronizer,
    LLMException,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.cache_manager import CacheManager
from llm_datadist.engine.keys import KeyKind
from llm_datadist.engine.transfer_job import Destination, LayerTransfer
from tests.recording_manager import HOST, Check, asked, cpu_cache, desc, expect_first, make_manager, refused


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


READY = Ready()


def to(cluster_id: int = 2, layers: int = 2, **kwargs: Any) -> TransferConfig:
    return TransferConfig(cluster_id, list(range(2 * layers)), **kwargs)


def by_key(key: Any, src: range = range(2), dst: range = range(2), slot: int = 0) -> TransferWithCacheKeyConfig:
    return TransferWithCacheKeyConfig(key, src, dst, slot)


@pytest.fixture
def manager() -> CacheManager:
    return make_manager()


@pytest.fixture
def pusher() -> CacheManager:
    return make_manager(remote_access=True)


def transferred(manager: CacheManager) -> LayerTransfer:
    (name, (transfer, synchronize_layer, source)) = asked(manager)[-1]
    assert name == "transfer"
    assert synchronize_layer == READY.synchronize_layer
    assert isinstance(source, Cache)
    return transfer


# ---- by addresses


def test_slots_and_blocks_go_to_addresses(manager: CacheManager) -> None:
    cache = manager.allocate_cache(desc())
    configs = [to(2), to(3, layers=1, src_layer_range=range(1, 2), src_batch_index=9)]
    task = manager.transfer_cache_async(cache, READY, configs)
    assert isinstance(task, CacheTask)
    destinations = (Destination(2, range(2), (0, 1, 2, 3), 0), Destination(3, range(1, 2), (0, 1), 9))
    assert transferred(manager) == LayerTransfer(1, destinations, None, None, 0)
    assert configs[0].src_layer_range == range(2), "None is replaced in the config"
    manager.transfer_cache_async(cache, READY, (to(),), (0, 1), [5, 6], 512)
    assert transferred(manager) == LayerTransfer(
        1, (Destination(2, range(2), (0, 1, 2, 3), None),), [0, 1], [5, 6], 512
    )


def test_a_slot_is_cut_into_blocks_at_addresses(manager: CacheManager) -> None:
    cache = manager.register_cache(desc(), [512] * 4)
    manager.transfer_cache_async(cache, READY, [to(src_batch_index=3)], None, (5, 6), 256)
    assert transferred(manager) == LayerTransfer(1, (Destination(2, range(2), (0, 1, 2, 3), 3),), None, [5, 6], 256)
    for size in (None, 0):
        refused("must be set", manager.transfer_cache_async, cache, READY, [to()], [], [5, 6], size)
    refused("dst_block_indices can not be empty", manager.transfer_cache_async, cache, READY, [to()], None, [], 256)


def test_a_config_by_addresses_has_no_destination_layers(manager: CacheManager) -> None:
    cache, config = manager.allocate_cache(desc()), to()
    config.dst_layer_range = range(5, 7)
    manager.transfer_cache_async(cache, READY, [config])
    assert transferred(manager).destinations[0].dst_layers is None


# ---- by key


def test_slots_go_to_slots_of_keys(pusher: CacheManager) -> None:
    cache = pusher.allocate_cache(desc())
    pusher.transfer_cache_async(cache, READY, [by_key(CacheKeyByIdAndIndex(7, 5, 1), range(1, 2), range(4, 5), 3)])
    destination = Destination(7, range(1, 2), (), 3, key=(KeyKind.CACHE, 5, 1), dst_layers=range(4, 5))
    assert transferred(pusher) == LayerTransfer(1, (destination,), None, None, 0)


def test_blocks_go_to_blocks_of_keys(pusher: CacheManager) -> None:
    cache = pusher.allocate_blocks_cache(desc())
    pusher.transfer_cache_async(cache, READY, [by_key(BlocksCacheKey(7, 3), dst=range(4, 6))], [0], [9])
    destination = Destination(7, range(2), (), None, key=(KeyKind.BLOCKS, 0, 3), dst_layers=range(4, 6))
    assert transferred(pusher) == LayerTransfer(1, (destination,), [0], [9], 0)
    plain = pusher.allocate_cache(desc())
    pusher.transfer_cache_async(plain, READY, [by_key(BlocksCacheKey(7))], None, [9, 8], 256)
    destination = Destination(7, range(2), (), 0, key=(KeyKind.BLOCKS, 0, 0), dst_layers=range(2))
    assert transferred(pusher) == LayerTransfer(2, (destination,), None, [9, 8], 256)


def test_a_key_says_whether_blocks_are_meant(pusher: CacheManager) -> None:
    cache = pusher.allocate_cache(desc())
    transfer = pusher.transfer_cache_async
    refused("should be a CacheKeyByIdAndIndex without", transfer, cache, READY, [by_key(BlocksCacheKey(7))])
    slot = [by_key(CacheKeyByIdAndIndex(7, 5))]
    refused("should be a BlocksCacheKey with", transfer, cache, READY, slot, [0], [0])
    refused("should be a BlocksCacheKey with", transfer, cache, READY, slot, None, [0], 256)
    with pytest.raises(ValueError, match="model_id .*out of range"):
        transfer(cache, READY, [by_key(BlocksCacheKey(7, -1))], [0], [0])


def test_layers_of_a_config_by_key(pusher: CacheManager) -> None:
    cache, key = pusher.allocate_cache(desc()), CacheKeyByIdAndIndex(7, 5)
    config = by_key(key)
    config.dst_layer_range = range(4, 5)  # lengths are compared at construction and at the transfer
    refused("equally many layers", pusher.transfer_cache_async, cache, READY, [config])
    config = by_key(key, range(3), range(3))
    refused(r"\[1\].src_layer_range .* out of range", pusher.transfer_cache_async, cache, READY, [by_key(key), config])


def test_the_way_of_access_decides_the_kind_of_config(manager: CacheManager, pusher: CacheManager) -> None:
    key_config = by_key(CacheKeyByIdAndIndex(7, 5))
    for one, wrong, wanted in (
        (manager, key_config, "TransferConfig"),
        (pusher, to(), "TransferWithCacheKeyConfig"),
    ):
        cache = one.allocate_cache(desc())
        with pytest.raises(TypeError, match=f"transfer_configs inner type only support {wanted}"):
            one.transfer_cache_async(cache, READY, [wrong])  # type: ignore[list-item]
        one.transfer_cache_async(cache, READY, [])
        assert transferred(one).destinations == ()


# ---- order


CHECKS: list[Check] = [
    (TypeError, "src_cache only support Cache", "src_cache", KvCache(1, desc(), [], None)),
    (LLMException, "Only support device cache", "src_cache", make_manager().allocate_cache(desc(placement=HOST))),
    (LLMException, "Only support device cache", "src_cache", cpu_cache()),
    (TypeError, "dst_block_indices only support", "dst_block_indices", 5),
    (ValueError, "dst_block_indices.*out of range", "dst_block_indices", [-1]),
    (TypeError, "src_block_indices inner type only support", "src_block_indices", ["0"]),
    (ValueError, "src_block_indices.*out of range", "src_block_indices", [2**64]),
    (TypeError, "dst_block_memory_size only support", "dst_block_memory_size", "1"),
    (ValueError, "dst_block_memory_size .*out of range", "dst_block_memory_size", -1),
    (LLMException, "from blocks to cache is not supported", "dst_block_indices", None),
    (LLMException, "num_block_indices mismatches", "dst_block_indices", [0, 1]),
    (TypeError, "layer_synchronizer only support", "layer_synchronizer", None),
    (TypeError, "transfer_configs only support", "transfer_configs", None),
    (TypeError, "transfer_configs inner type only support", "transfer_configs", [1]),
    (LLMException, "is not even", "src_cache", make_manager().allocate_cache(desc(3))),
    (LLMException, "should be 0 when blocks are sent", "transfer_configs", [to(src_batch_index=1)]),
    (LLMException, "out of range", "transfer_configs", [to(src_layer_range=range(5))]),
    (LLMException, "dst_addrs", "transfer_configs", [to(layers=1)]),
]


@pytest.mark.parametrize("row", range(len(CHECKS)))
def test_the_first_failing_check_of_a_transfer_counts(manager: CacheManager, row: int) -> None:
    good = {
        "src_cache": manager.allocate_cache(desc()),
        "layer_synchronizer": READY,
        "transfer_configs": [to()],
        "src_block_indices": [0],
        "dst_block_indices": [0],
    }
    expect_first(manager.transfer_cache_async, good, CHECKS, row)
    assert asked(manager) == []


def test_a_block_size_needs_blocks(manager: CacheManager) -> None:
    cache = manager.allocate_cache(desc())
    refused("dst_block_memory_size 512", manager.transfer_cache_async, cache, READY, [to()], None, None, 512)
    foreign = make_manager().allocate_cache(desc())
    manager.transfer_cache_async(foreign, READY, [to()])
    assert transferred(manager).cache_id == -1
