"""A stand-in for the engine that notes what it is asked and moves no bytes, for tests of what stands above it."""

from __future__ import annotations

from typing import Any

from llm_datadist import LLMStatusCode
from llm_datadist._local import block_pairs


class RecordingEngine:
    """Has the calls of ``llm_datadist.engine.engine.Engine`` that the public interface makes.

    Attributes
    ----------
    calls : list of (str, tuple)
        Name and arguments of each call, in order.
    held : set of int
        Ids of the caches that were allocated and not given up.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.held: set[int] = set()
        self.is_open = True
        self._last_id = 0

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def close(self) -> None:
        self._note("close")
        self.is_open = False

    def allocate(
        self, num_tensors: int, tensor_nbytes: int, slots: int, keys: Any = (), blocks_model: int | None = None
    ) -> tuple[int, list[list[int]]]:
        self._note("allocate", num_tensors, tensor_nbytes, slots, list(keys), blocks_model)
        self._last_id += 1
        self.held.add(self._last_id)
        return self._last_id, [[512 * (index + 1) for index in range(num_tensors)]]

    def deallocate(self, cache_id: int) -> None:
        self._note("deallocate", cache_id)
        self.held.discard(cache_id)

    def deallocate_later(self, cache_id: int) -> None:
        self._note("deallocate_later", cache_id)
        self.held.discard(cache_id)

    def remove_key(self, key: Any) -> None:
        self._note("remove_key", key)

    def pull_cache(self, *args: Any) -> None:
        self._note("pull_cache", *args)

    def pull_blocks(
        self, cluster_id: int, model_id: int, cache_id: int, src_blocks: list[int], dst_blocks: list[int], *rest: Any
    ) -> None:
        block_pairs(src_blocks, dst_blocks)  # the engine begins with it too, and refuses what are no block numbers
        self._note("pull_blocks", cluster_id, model_id, cache_id, src_blocks, dst_blocks, *rest)

    def transfer(self, *args: Any) -> str:
        self._note("transfer", *args)
        return "job"

    def copy_cache(self, *args: Any) -> None:
        self._note("copy_cache", *args)

    def copy_blocks(self, *args: Any) -> None:
        self._note("copy_blocks", *args)

    def swap_blocks(self, *args: Any) -> None:
        self._note("swap_blocks", *args)

    def tensor_memory(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        self._note("tensor_memory", cache_id, tensor_index)
        return []

    def link(self, clusters: Any, timeout_ms: int) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        self._note("link", clusters, timeout_ms)
        return LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS] * len(clusters)

    def unlink(self, clusters: Any, timeout_ms: int, force: bool) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        self._note("unlink", clusters, timeout_ms, force)
        return LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS] * len(clusters)

    def check_link(self, remote_cluster_id: int) -> None:
        self._note("check_link", remote_cluster_id)

    def _note(self, name: str, *args: Any) -> None:
        self.calls.append((name, args))
