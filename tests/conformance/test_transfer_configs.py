"""TransferConfig, TransferWithCacheKeyConfig, LayerSynchronizer, and the argument checks of transfer_cache_async."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from tests.conformance.conftest import Start
from tests.conformance.expectations import invalid
from tests.conformance.remote import DECODER, target

LAYERS = 2


class Ready(LayerSynchronizer):
    """Every layer is there already."""

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


def test_C205_transfer_config() -> None:
    config = TransferConfig(1, [1, 2])
    assert (config.dst_cluster_id, config.dst_addrs) == (1, [1, 2])
    assert (config.src_layer_range, config.src_batch_index) == (None, 0)
    wrong: list[tuple[str, Any, type[Exception]]] = [
        ("dst_cluster_id", "1", TypeError),
        ("dst_cluster_id", -1, ValueError),
        ("dst_addrs", None, TypeError),
        ("dst_addrs", ["a"], TypeError),
        ("dst_addrs", [-1], ValueError),
        ("src_layer_range", [0, 1], TypeError),
        ("src_layer_range", range(0, 5, 2), LLMException),
        ("src_batch_index", "0", TypeError),
        ("src_batch_index", -1, ValueError),
    ]
    for name, value, error in wrong:
        with pytest.raises(error):
            setattr(config, name, value)
        with pytest.raises(error):
            TransferConfig(**{"dst_cluster_id": 1, "dst_addrs": [1, 2], name: value})


def test_C206_layers_and_slot() -> None:
    for layers in (range(0, 5, 2), range(0, 1, -1), range(4, 1), range(0)):
        invalid(TransferConfig, 1, [1, 2], layers)
    with pytest.raises(TypeError):
        TransferConfig(1, [1, 2], [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        TransferConfig(1, [1, 2], range(1), 2**32)


def test_C207_transfer_with_cache_key_config() -> None:
    key = BlocksCacheKey(1)
    config = TransferWithCacheKeyConfig(key, range(4), range(4, 8))
    assert (config.cache_key, config.src_layer_range, config.dst_layer_range) == (key, range(4), range(4, 8))
    invalid(TransferWithCacheKeyConfig, key, range(4), range(4, 7))
    for layers in ((None, range(4)), (range(4), None)):
        with pytest.raises(TypeError):
            TransferWithCacheKeyConfig(key, *layers)  # type: ignore[arg-type]
    invalid(TransferWithCacheKeyConfig, key, range(4), range(4), 1)
    assert TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 2), range(1), range(1), 1).src_batch_index == 1
    with pytest.raises(TypeError):
        TransferWithCacheKeyConfig(CacheKey(1, 2), range(4), range(4))  # type: ignore[arg-type]
    assert repr(config) == (
        f"TransferWithCacheKeyConfig(cache_key={key!r}, src_layer_range=range(0, 4), "
        "dst_layer_range=range(4, 8), src_batch_index=0)"
    )


def test_C208_the_synchronizer_is_abstract() -> None:
    with pytest.raises(TypeError):
        LayerSynchronizer()  # type: ignore[abstract]


def test_C220_blocks(start: Start) -> None:
    manager = start(LLMRole.PROMPT).kv_cache_manager
    cache, configs = target(manager), [TransferConfig(DECODER, [512] * 4)]

    def transfer(source: Any, destination: Any, nbytes: Any = None) -> Any:
        return manager.transfer_cache_async(cache, Ready(), configs, source, destination, nbytes)

    invalid(transfer, [0], None, match="transfer from blocks to cache is not supported")
    for destination in ([0], []):
        invalid(transfer, None, destination, match="transfer from cache to blocks is not supported")
    invalid(transfer, [0, 1], [0])
    invalid(transfer, None, None, 256)
    for source, destination in (([-1], [0]), ([0], [-1])):
        with pytest.raises(ValueError, match="out of range"):
            transfer(source, destination)
    with pytest.raises(ValueError, match="out of range"):
        transfer([0], [0], -1)
    with pytest.raises(TypeError):
        transfer([0], [0], 1.5)


def test_C221_numbers_that_do_not_fit(start: Start) -> None:
    manager = start(LLMRole.PROMPT).kv_cache_manager
    cache = target(manager)
    transfer = manager.transfer_cache_async
    invalid(transfer, target(manager, tensors=3), Ready(), [TransferConfig(DECODER, [512] * 3)], match="is not even")
    invalid(transfer, cache, Ready(), [TransferConfig(DECODER, [512] * 3)], match="dst_addrs")
    beyond = TransferConfig(DECODER, [512] * 4, range(1, LAYERS + 1))
    invalid(transfer, cache, Ready(), [beyond], match="out of range")
    invalid(transfer, cache, Ready(), [TransferConfig(DECODER, [512] * 4, None, 1)], [0], [0])


def test_C222_types(start: Start) -> None:
    datadist = start(LLMRole.PROMPT)
    manager = datadist.kv_cache_manager
    cache, configs = target(manager), [TransferConfig(DECODER, [512] * 4)]
    by_key = TransferWithCacheKeyConfig(BlocksCacheKey(DECODER), range(1), range(1))
    wrong: list[tuple[Any, Any, Any]] = [
        (None, Ready(), configs),
        (cache, object(), configs),
        (cache, Ready(), None),
        (cache, Ready(), [1]),
        (cache, Ready(), [by_key]),
    ]
    for arguments in wrong:
        with pytest.raises(TypeError):
            manager.transfer_cache_async(*arguments)
    task = manager.transfer_cache_async(cache, Ready(), [])
    assert task.synchronize(5000) is LLMStatusCode.LLM_SUCCESS
    assert task.get_results() == []
    datadist.finalize()
    decoder = start(LLMRole.DECODER).kv_cache_manager
    mine = target(decoder)
    invalid(decoder.transfer_cache_async, mine, Ready(), configs, match="is not supported by")


def test_C223_timeouts(start: Start) -> None:
    manager = start(LLMRole.PROMPT).kv_cache_manager
    task = manager.transfer_cache_async(target(manager), Ready(), [])
    for call in (task.synchronize, task.get_results):
        for number in (-1, 2**32):
            with pytest.raises(ValueError, match="out of range"):
                call(number)
        for wrong in ("1", 1.5):
            with pytest.raises(TypeError):
                call(wrong)  # type: ignore[arg-type]
    assert task.synchronize(5000) is LLMStatusCode.LLM_SUCCESS
