"""A `CacheManager` over a recording engine, and what tests of its arguments say about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import Cache, CacheDesc, DataType, LLMException, LLMStatusCode, Placement
from llm_datadist.cache_manager import CacheManager
from llm_datadist.engine.options import CacheManagerOptions
from tests.recording_engine import RecordingEngine

INVALID_ID = 2**64 - 1
OWN_CLUSTER = 1
HOST = Placement.HOST
PREPARING = ("allocate", "register")

# A check of a call: the error, part of its message, the name of the argument and a value that fails the check.
Check = tuple[type[Exception], str, str, Any]


def desc(num_tensors: int = 4, shape: Any = (4, 256), **kwargs: Any) -> CacheDesc:
    return CacheDesc(num_tensors, shape, DataType.DT_FLOAT16, **kwargs)


def make_manager(remote_access: bool = False, device_pool: int = 1 << 20, host_pool: int = 1 << 20) -> CacheManager:
    options = CacheManagerOptions(remote_access=remote_access, device_pool_bytes=device_pool, host_pool_bytes=host_pool)
    return CacheManager(RecordingEngine(), OWN_CLUSTER, options)  # type: ignore[arg-type]


def asked(manager: CacheManager) -> list[tuple[str, tuple[Any, ...]]]:
    """What the engine was asked, without what made the caches."""
    engine: Any = manager._engine
    return [call for call in engine.calls if call[0] not in PREPARING]


def prepared(manager: CacheManager) -> list[tuple[str, tuple[Any, ...]]]:
    """How the engine was asked to make caches."""
    engine: Any = manager._engine
    return [call for call in engine.calls if call[0] in PREPARING]


def cpu_cache(num_tensors: int = 4, shape: Any = (4, 256)) -> Cache:
    return Cache.create_cpu_cache(desc(num_tensors, shape, placement=HOST), [512 * (i + 1) for i in range(num_tensors)])


def refused(match: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert isinstance(caught.value, ValueError)


def expect_first(function: Callable[..., Any], good: dict[str, Any], checks: list[Check], row: int) -> None:
    """Expect the error of a check when its argument alone is wrong, and when the arguments of later checks are as well.

    Of an argument with several checks the nearest later one is made to fail.
    """
    error, match, name, value = checks[row]
    all_wrong = dict(good)
    for _, _, later_name, later_value in reversed(checks[row:]):
        all_wrong[later_name] = later_value
    for arguments in ({**good, name: value}, all_wrong):
        with pytest.raises(error, match=match) as caught:
            function(**arguments)
        assert isinstance(caught.value, LLMException) is (error is LLMException)
