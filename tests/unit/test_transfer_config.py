"""The configs of a layer-wise transfer, its synchronizer, and what `transfer_cache_async` checks and asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    KvCache,
    KvCacheManager,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.engine.transfer_job import Destination, LayerTransfer
from tests.recording_engine import RecordingEngine

BAD_RANGES = [range(0, 5, 2), range(0, 1, -1), range(4, 1), range(0), range(-1, 2)]


def refused(match: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert isinstance(caught.value, ValueError)


# ---- TransferConfig


def test_a_config_by_addresses() -> None:
    config = TransferConfig(1, [1, 2])
    assert (config.dst_cluster_id, config.dst_addrs, config.src_layer_range, config.src_batch_index) == (
        1,
        [1, 2],
        None,
        0,
    )
    assert config.dst_layer_range is None
    config = TransferConfig(dst_cluster_id=2**64 - 1, dst_addrs=(3,), src_layer_range=range(1, 3), src_batch_index=7)
    assert repr(config) == (
        "TransferConfig(dst_cluster_id=18446744073709551615, dst_addrs=(3,), src_layer_range=range(1, 3),"
        " src_batch_index=7)"
    )


@pytest.mark.parametrize(
    ("name", "good", "wrong_type", "wrong_value"),
    [
        ("dst_cluster_id", [0, 2**64 - 1, True], [None, "1", 1.0], [-1, 2**64]),
        ("dst_addrs", [[], [0], (1, 2**64 - 1)], [None, 1, ["a"], [None], {1}], [[-1], [1, 2**64]]),
        ("src_batch_index", [0, 2**32 - 1], [None, "1", 1.0], [-1, 2**32]),
        ("src_layer_range", [None, range(1), range(3, 9)], [[0, 1], 1, "0"], []),
    ],
)
def test_setters_check_like_the_constructor(
    name: str, good: list[Any], wrong_type: list[Any], wrong_value: list[Any]
) -> None:
    arguments: dict[str, Any] = {"dst_cluster_id": 1, "dst_addrs": [1, 2], "src_layer_range": None}
    config = TransferConfig(**arguments)
    for value in good:
        assert getattr(TransferConfig(**{**arguments, name: value}), name) is value
        setattr(config, name, value)
        assert getattr(config, name) is value
    for values, kind in ((wrong_type, TypeError), (wrong_value, ValueError)):
        for value in values:
            with pytest.raises(kind):
                TransferConfig(**{**arguments, name: value})
            with pytest.raises(kind):
                setattr(config, name, value)
    assert getattr(config, name) is good[-1], "a refused value changes nothing"


@pytest.mark.parametrize("layers", BAD_RANGES)
def test_layer_ranges_that_cannot_be_used(layers: range) -> None:
    refused("src_layer_range", TransferConfig, 1, [1, 2], layers)
    config = TransferConfig(1, [1, 2])
    refused("src_layer_range", setattr, config, "src_layer_range", layers)


def test_the_first_wrong_argument_of_a_config_counts() -> None:
    with pytest.raises(TypeError, match="dst_cluster_id"):
        TransferConfig("1", None, 0, -1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dst_addrs"):
        TransferConfig(1, None, 0, -1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="src_layer_range"):
        TransferConfig(1, [], 0, -1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="src_batch_index"):
        TransferConfig(1, [], None, -1)


# ---- TransferWithCacheKeyConfig


def test_a_config_by_key() -> None:
    key = BlocksCacheKey(5)
    config = TransferWithCacheKeyConfig(key, range(4), range(4, 8))
    assert (config.cache_key, config.src_layer_range, config.dst_layer_range, config.src_batch_index) == (
        key,
        range(4),
        range(4, 8),
        0,
    )
    assert config.dst_cluster_id == 5
    assert repr(config) == (
        f"TransferWithCacheKeyConfig(cache_key={key}, src_layer_range=range(0, 4), dst_layer_range=range(4, 8),"
        " src_batch_index=0)"
    )
    assert TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 2), range(1), range(1), 3).src_batch_index == 3


@pytest.mark.parametrize("key", [None, 1, CacheKey(1, 2)])
def test_a_config_by_key_needs_one_of_two_kinds_of_key(key: Any) -> None:
    with pytest.raises(TypeError, match="cache_key"):
        TransferWithCacheKeyConfig(key, range(1), range(1))
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1))
    with pytest.raises(TypeError, match="cache_key"):
        config.cache_key = key


@pytest.mark.parametrize("name", ["src_layer_range", "dst_layer_range"])
def test_a_config_by_key_needs_both_ranges(name: str) -> None:
    ranges: dict[str, Any] = {"src_layer_range": range(2), "dst_layer_range": range(2)}
    config = TransferWithCacheKeyConfig(BlocksCacheKey(1), **ranges)
    for wrong in (None, [0, 1]):
        with pytest.raises(TypeError, match=name):
            TransferWithCacheKeyConfig(BlocksCacheKey(1), **{**ranges, name: wrong})
        with pytest.raises(TypeError, match=name):
            setattr(config, name, wrong)
    for wrong in BAD_RANGES:
        refused(name, TransferWithCacheKeyConfig, BlocksCacheKey(1), **{**ranges, name: wrong})
        refused(name, setattr, config, name, wrong)
    setattr(config, name, range(3, 9))  # lengths are compared by the constructor only
    assert getattr(config, name) == range(3, 9)


def test_a_config_by_key_needs_ranges_of_equal_length() -> None:
    refused("differ in length", TransferWithCacheKeyConfig, BlocksCacheKey(1), range(2), range(3))
    with pytest.raises(TypeError):
        TransferWithCacheKeyConfig(BlocksCacheKey(1))


def test_a_blocks_key_goes_with_slot_0() -> None:
    blocks, slot = BlocksCacheKey(1), CacheKeyByIdAndIndex(1, 2)
    refused("src_batch_index 1", TransferWithCacheKeyConfig, blocks, range(1), range(1), 1)
    config = TransferWithCacheKeyConfig(blocks, range(1), range(1))
    refused("src_batch_index 1", setattr, config, "src_batch_index", 1)
    config.cache_key = slot
    config.src_batch_index = 1
    refused("src_batch_index 1", setattr, config, "cache_key", blocks)
    assert config.cache_key is slot
    for wrong, kind in ((-1, ValueError), (2**32, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(kind):
            TransferWithCacheKeyConfig(slot, range(1), range(1), wrong)  # type: ignore[arg-type]
        with pytest.raises(kind):
            config.src_batch_index = wrong  # type: ignore[assignment]


# ---- LayerSynchronizer


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def test_a_synchronizer_without_its_method_cannot_be_made() -> None:
    class Without(LayerSynchronizer):
        pass

    for cls in (LayerSynchronizer, Without):
        with pytest.raises(TypeError):
            cls()  # type: ignore[abstract]


# ---- transfer_cache_async


@pytest.fixture
def prompt() -> KvCacheManager:
    return KvCacheManager(RecordingEngine(), LLMRole.PROMPT)  # type: ignore[arg-type]


@pytest.fixture
def cache(prompt: KvCacheManager) -> KvCache:
    return prompt.allocate_cache(CacheDesc(4, (4, 256), DataType.DT_FLOAT16))


def to(cluster_id: int = 2, layers: int = 2, **kwargs: Any) -> TransferConfig:
    return TransferConfig(cluster_id, list(range(2 * layers)), **kwargs)


def asked(prompt: KvCacheManager) -> Any:
    """What the engine was asked, after the allocation of the cache."""
    engine: Any = prompt._engine
    assert engine.names() == ["allocate", "transfer"]
    return engine.calls[-1][1]


def test_a_transfer_of_a_slot(prompt: KvCacheManager, cache: KvCache) -> None:
    ready = Ready()
    configs = (to(2), to(3, layers=1, src_layer_range=range(1, 2), src_batch_index=9))
    task = prompt.transfer_cache_async(cache, ready, configs, src_block_indices=[], dst_block_memory_size=0)
    assert isinstance(task, CacheTask)
    transfer, synchronize_layer, source = asked(prompt)
    destinations = (Destination(2, range(2), (0, 1, 2, 3), 0), Destination(3, range(1, 2), (0, 1), 9))
    assert transfer == LayerTransfer(cache.cache_id, destinations, None, None, 0)
    assert synchronize_layer == ready.synchronize_layer
    assert source is cache
    assert configs[0].src_layer_range == range(2), "None is replaced in the config"


def test_a_transfer_of_blocks(prompt: KvCacheManager, cache: KvCache) -> None:
    prompt.transfer_cache_async(cache, Ready(), [to()], (0, 1), [5, 6], 512)
    assert asked(prompt)[0] == LayerTransfer(
        cache.cache_id, (Destination(2, range(2), (0, 1, 2, 3), None),), [0, 1], [5, 6], 512
    )


def test_later_changes_of_a_config_do_not_count(prompt: KvCacheManager, cache: KvCache) -> None:
    addresses, blocks = [1, 2, 3, 4], [0]
    config = TransferConfig(2, addresses)
    prompt.transfer_cache_async(cache, Ready(), [config], blocks, [7])
    addresses[0] = 99
    blocks[0] = 99
    config.dst_cluster_id = 99
    transfer = asked(prompt)[0]
    assert transfer.destinations[0].addresses == (1, 2, 3, 4)
    assert transfer.destinations[0].cluster_id == 2
    assert transfer.src_blocks == [0]


def test_host_and_foreign_caches_are_left_to_the_job(prompt: KvCacheManager) -> None:
    host = KvCache.create_cpu_cache(CacheDesc(2, (1, 8), DataType.DT_INT8, Placement.HOST), [512, 1024])
    engine: Any = prompt._engine
    prompt.transfer_cache_async(host, Ready(), [])
    assert engine.calls[-1][1][0].cache_id == -1
    other = KvCacheManager(RecordingEngine(), LLMRole.PROMPT)  # type: ignore[arg-type]
    foreign = other.allocate_cache(CacheDesc(2, (1, 8), DataType.DT_INT8))
    prompt.transfer_cache_async(foreign, Ready(), [])
    assert engine.calls[-1][1][0].cache_id == -1


@pytest.mark.parametrize("role", [LLMRole.DECODER, LLMRole.MIX])
def test_only_a_prompt_transfers(role: LLMRole) -> None:
    manager = KvCacheManager(RecordingEngine(), role)  # type: ignore[arg-type]
    refused("is not supported by", manager.transfer_cache_async, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"src_cache": None}, TypeError, "src_cache"),
        ({"src_cache": 1}, TypeError, "src_cache"),
        ({"dst_block_indices": 1}, TypeError, "dst_block_indices"),
        ({"dst_block_indices": [1.5]}, TypeError, "dst_block_indices"),
        ({"dst_block_indices": [-1]}, ValueError, "dst_block_indices"),
        ({"src_block_indices": {1}}, TypeError, "src_block_indices"),
        ({"src_block_indices": ["1"]}, TypeError, "src_block_indices"),
        ({"src_block_indices": [2**64], "dst_block_indices": [1]}, ValueError, "src_block_indices"),
        ({"dst_block_memory_size": 1.5}, TypeError, "dst_block_memory_size"),
        ({"dst_block_memory_size": -1}, ValueError, "dst_block_memory_size"),
        ({"layer_synchronizer": object()}, TypeError, "layer_synchronizer"),
        ({"layer_synchronizer": None}, TypeError, "layer_synchronizer"),
        ({"transfer_configs": None}, TypeError, "transfer_configs"),
        ({"transfer_configs": [1]}, TypeError, "transfer_configs"),
        ({"transfer_configs": {1: 2}}, TypeError, "transfer_configs"),
        (
            {"transfer_configs": [TransferWithCacheKeyConfig(BlocksCacheKey(1), range(2), range(2))]},
            TypeError,
            "transfer_configs",
        ),
    ],
)
def test_types_and_widths(
    prompt: KvCacheManager, cache: KvCache, arguments: dict[str, Any], kind: type[Exception], match: str
) -> None:
    good = {"src_cache": cache, "layer_synchronizer": Ready(), "transfer_configs": [to()]}
    with pytest.raises(kind, match=match) as caught:
        prompt.transfer_cache_async(**{**good, **arguments})
    assert not isinstance(caught.value, LLMException)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"src_block_indices": [0]}, "transfer from blocks to cache is not supported"),
        ({"src_block_indices": [0], "dst_block_indices": []}, "transfer from blocks to cache is not supported"),
        ({"src_block_indices": [0], "dst_block_indices": [0, 1]}, "num_block_indices mismatches"),
        ({"dst_block_indices": [0]}, "transfer from cache to blocks is not supported"),
        ({"dst_block_indices": []}, "transfer from cache to blocks is not supported"),
        ({"src_block_indices": [], "dst_block_indices": [0]}, "transfer from cache to blocks is not supported"),
        ({"dst_block_memory_size": 512}, "dst_block_memory_size 512"),
        ({"transfer_configs": [to(), to(layers=1)]}, r"transfer_configs\[1\] has 2 dst_addrs for 2 layers"),
        ({"transfer_configs": [to(layers=2, src_layer_range=range(1, 3))]}, "out of range"),
        ({"transfer_configs": [to(layers=2, src_layer_range=range(1))]}, "dst_addrs"),
        (
            {"transfer_configs": [to(src_batch_index=1)], "src_block_indices": [0], "dst_block_indices": [0]},
            "src_batch_index 1",
        ),
    ],
)
def test_values(prompt: KvCacheManager, cache: KvCache, arguments: dict[str, Any], match: str) -> None:
    good = {"src_cache": cache, "layer_synchronizer": Ready(), "transfer_configs": [to()]}
    refused(match, prompt.transfer_cache_async, **{**good, **arguments})


def test_an_odd_number_of_tensors(prompt: KvCacheManager) -> None:
    odd = prompt.allocate_cache(CacheDesc(3, (4, 256), DataType.DT_FLOAT16))
    refused("is not even", prompt.transfer_cache_async, odd, Ready(), [])


def test_the_first_wrong_argument_counts(prompt: KvCacheManager, cache: KvCache) -> None:
    """Repairing one argument after the other shows the checks in the documented order."""
    odd = prompt.allocate_cache(CacheDesc(3, (4, 256), DataType.DT_FLOAT16))
    arguments: dict[str, Any] = {
        "src_cache": None,
        "layer_synchronizer": None,
        "transfer_configs": None,
        "src_block_indices": [1.5],
        "dst_block_indices": ["a"],
        "dst_block_memory_size": -1,
    }
    steps: list[tuple[str, dict[str, Any]]] = [
        ("src_cache", {"src_cache": odd}),
        ("dst_block_indices", {"dst_block_indices": None}),
        ("src_block_indices", {"src_block_indices": [1]}),
        ("dst_block_memory_size", {"dst_block_memory_size": 7}),
        ("from blocks to cache", {"dst_block_indices": [1, 2]}),
        ("num_block_indices mismatches", {"src_block_indices": None}),
        ("from cache to blocks", {"dst_block_indices": None}),
        ("layer_synchronizer", {"layer_synchronizer": Ready()}),
        ("transfer_configs", {"transfer_configs": [to(src_batch_index=1, src_layer_range=range(9))]}),
        ("dst_block_memory_size", {"dst_block_memory_size": None}),
        ("is not even", {"src_cache": cache}),
        ("out of range", {"transfer_configs": [to(layers=1)]}),
        ("dst_addrs", {"transfer_configs": [to()]}),
    ]
    for match, repair in steps:
        with pytest.raises((TypeError, ValueError), match=match):
            prompt.transfer_cache_async(**arguments)
        arguments.update(repair)
    prompt.transfer_cache_async(**arguments)
