"""An instance in another process, and what tests compare: its caches are filled with known bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, KvCache, KvCacheManager, LLMDataDist, LLMRole
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.expectations import LINKED
from tests.processes import Member

PROMPT, DECODER = 1, 2  # cluster ids
SLOTS, STRIDE = 4, 256
SHAPE = (SLOTS, STRIDE)
SENTINEL = 0xAA


class Remote:
    """An instance that lives in a process of its own."""

    def __init__(self, member: Member, role: LLMRole, cluster_id: int, port: int | None, **options: Any) -> None:
        self.member = member
        self.cluster_id = cluster_id
        self.port = port
        self.options = options
        self.call(dd.init_datadist, role, cluster_id, port=port, **options)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.member.call(function, *args, **kwargs)

    def offer(
        self, *keys: CacheKey, seed: int = 1, tensors: int = 4, shape: tuple[int, ...] = SHAPE, hold: bool = True
    ) -> int:
        """Allocate a cache with keys, filled with the bytes of `seed`; give its id."""
        cache = self.call(dd.allocate, tensors, shape, keys=list(keys))
        self.call(dd.fill, cache, seed)
        if not hold:
            self.call(dd.deallocate, cache)
        return int(cache)

    def finalize(self) -> None:
        if self.member.exitcode is None:
            self.call(dd.finalize)


def link_to(decoder: LLMDataDist, *remotes: Remote) -> None:
    """Link an instance of this process to remote prompts."""
    infos = [dd.cluster_info(remote.cluster_id, remote.port or 0) for remote in remotes]
    assert decoder.link_clusters(infos) == (LINKED[0], LINKED[1] * len(remotes))


def payload_slot(seed: int, tensor: int, slot: int, shape: Sequence[int] = SHAPE) -> bytes:
    """Bytes of one slot of a cache that was filled with `seed`."""
    return dd.payload(seed, tensor, int(np.prod(shape))).reshape(shape)[slot].tobytes()


def target(manager: KvCacheManager, tensors: int = 4, shape: tuple[int, ...] = SHAPE) -> KvCache:
    """Allocate a local cache in which every byte is the sentinel."""
    cache = manager.allocate_cache(CacheDesc(tensors, shape, DataType.DT_UINT8))
    for tensor in range(tensors):
        tensor_view(cache, tensor)[:] = SENTINEL
    return cache


def slot(cache: KvCache, tensor: int, index: int) -> bytes:
    """Bytes that a slot of a local cache has now."""
    return tensor_view(cache, tensor)[index].tobytes()


def untouched(cache: KvCache, tensor: int, *indices: int) -> bool:
    """Whether these slots, or the whole tensor, still have only sentinels."""
    view = tensor_view(cache, tensor)
    return bool((view[list(indices)] if indices else view).min() == SENTINEL == view[list(indices) or ...].max())
