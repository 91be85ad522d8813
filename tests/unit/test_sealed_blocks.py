"""What publishing and retiring of blocks checks and asks, on both managers, and tokens on their way."""

from __future__ import annotations

import pickle
from typing import Any, Union

import msgpack
import pytest

from llm_datadist import BlocksCacheKey, Cache, KvCache, KvCacheManager, LLMException, LLMRole, Placement
from llm_datadist.cache_manager import CacheManager
from tests.recording_engine import RecordingEngine
from tests.recording_manager import cpu_cache, desc, make_manager, refused

Manager = Union[CacheManager, KvCacheManager]


@pytest.fixture(params=["cache manager", "KV"])
def manager(request: pytest.FixtureRequest) -> Manager:
    if request.param == "KV":
        return KvCacheManager(RecordingEngine(), LLMRole.DECODER)  # type: ignore[arg-type]
    return make_manager()


@pytest.fixture
def cache(manager: Manager) -> Cache | KvCache:
    return manager.allocate_blocks_cache(desc())


def asked(manager: Manager) -> list[tuple[str, tuple[Any, ...]]]:
    return manager._engine.calls[1:]  # type: ignore[union-attr]


def test_blocks_are_published_and_retired(manager: Manager, cache: Any) -> None:
    blocks = [4, True]
    token = manager.publish_blocks(cache, blocks)
    manager.publish_blocks(cache, blocks=(5,), lease_s=2)
    manager.retire_blocks(token)
    assert manager.retire_expired(cache) == [7]
    assert asked(manager) == [
        ("publish_blocks", (1, [4, 1], None)),
        ("publish_blocks", (1, [5], 2.0)),
        ("retire_blocks", (b"token",)),
        ("retire_expired", (1,)),
    ]


def test_a_pull_presents_what_the_router_made_of_a_token(manager: Manager, cache: Any) -> None:
    token = manager.publish_blocks(cache, [0])
    for carried in (pickle.loads(pickle.dumps(token)), msgpack.unpackb(msgpack.packb(token)), None):
        manager.pull_blocks(BlocksCacheKey(7), cache, [0], [0], token=carried)
    assert [args[-1] for name, args in asked(manager) if name == "pull_blocks"] == [b"token", b"token", None]


@pytest.mark.parametrize("token", ["token", bytearray(40), memoryview(b"token"), 5, [1]])
def test_a_token_is_bytes(manager: Manager, cache: Any, token: Any) -> None:
    with pytest.raises(TypeError, match="token only support bytes"):
        manager.pull_blocks(BlocksCacheKey(7), cache, [0], [0], token=token)
    with pytest.raises(TypeError, match="token only support bytes"):
        manager.retire_blocks(token)
    assert asked(manager) == []


def test_retiring_needs_a_token(manager: Manager) -> None:
    with pytest.raises(TypeError, match="token only support bytes"):
        manager.retire_blocks(None)  # type: ignore[arg-type]


def test_what_cannot_be_published(manager: Manager, cache: Any) -> None:
    for wrong in (None, 1):
        with pytest.raises(TypeError, match="cache only support KvCache or Cache"):
            manager.publish_blocks(wrong, 5, "1")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cache only support KvCache or Cache"):
            manager.retire_expired(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="blocks only support list or tuple"):
        manager.publish_blocks(cache, {5}, "1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="blocks inner type only support int"):
        manager.publish_blocks(cache, ["5"], "1")  # type: ignore[list-item, arg-type]
    with pytest.raises(TypeError, match="lease_s only support float or int"):
        manager.publish_blocks(cache, [], "1")  # type: ignore[arg-type]
    refused("blocks can not be empty", manager.publish_blocks, cache, [], -1)
    for lease_s in (0, -1, 0.0, float("nan"), float("inf")):
        refused("lease_s .* is invalid", manager.publish_blocks, cache, [-1], lease_s)
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range") as caught:
            manager.publish_blocks(cache, [number])
        assert not isinstance(caught.value, LLMException)
    assert asked(manager) == []


def test_only_blocks_are_published() -> None:
    manager = make_manager()
    plain = manager.allocate_cache(desc())
    refused("should be blocks cache", manager.publish_blocks, plain, [0])
    refused("should be blocks cache", manager.retire_expired, plain)
    host = KvCache.create_cpu_cache(desc(placement=Placement.HOST), [1, 2, 3, 4])
    refused("Only support device cache", manager.publish_blocks, host, [0])


def test_caches_of_another_instance_are_unknown_to_this_one() -> None:
    manager = make_manager()
    manager.publish_blocks(cpu_cache(), [0])
    manager.retire_expired(make_manager().allocate_blocks_cache(desc()))
    engine: Any = manager._engine
    assert [args[0] for _, args in engine.calls] == [-1, -1]
