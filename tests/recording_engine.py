"""A stand-in for the engine that notes what it is asked and moves no bytes, for tests of what stands above it."""

from __future__ import annotations

import ctypes
from typing import Any

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist._local import block_pairs


class RecordingEngine:
    """Has the calls of ``llm_datadist.engine.engine.Engine`` that the public interface makes.

    Attributes
    ----------
    calls : list of (str, tuple)
        Name and arguments of each call, in order.
    held : set of int
        Ids of the caches that were allocated or registered and not given up.
    has_members : bool
        Whether a communicator was linked.
    member_state : int
        What is answered about the state of communicators.
    reserved : dict of int to bytearray
        Memory of the pool by its address.
    tensor : memoryview or None
        What every tensor of a cache is shown as.
    """

    def __init__(self, options: Any = None) -> None:
        self.options = options
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.held: set[int] = set()
        self.is_open = True
        self.role = None if options is None else options.role
        self.has_members = False
        self.member_state = 0
        self.reserved: dict[int, bytearray] = {}
        self.tensor: memoryview | None = None
        self._last_id = 0

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def close(self) -> None:
        self._note("close")
        self.is_open = False

    def allocate(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        keys: Any = (),
        blocks_model: int | None = None,
        host: bool = False,
    ) -> tuple[int, list[list[int]]]:
        on_host = ("host",) if host else ()
        self._note("allocate", num_tensors, tensor_nbytes, slots, list(keys), blocks_model, *on_host)
        return self._hold(), [[512 * (index + 1) for index in range(num_tensors)]]

    def register(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        addresses: list[int],
        keys: Any = (),
        blocks_model: int | None = None,
        accessible: bool = True,
    ) -> int:
        self._note("register", num_tensors, tensor_nbytes, slots, addresses, list(keys), blocks_model, accessible)
        return self._hold()

    def unregister(self, cache_id: int) -> None:
        self._note("unregister", cache_id)
        self.held.discard(cache_id)

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
        self,
        cluster_id: int,
        key: Any,
        cache_id: int,
        src_blocks: list[int] | None,
        dst_blocks: list[int],
        *rest: Any,
    ) -> None:
        if src_blocks is not None:
            block_pairs(src_blocks, dst_blocks)  # the engine begins with it too, and refuses what are no block numbers
        self._note("pull_blocks", cluster_id, key, cache_id, src_blocks, dst_blocks, *rest)

    def push_cache(self, *args: Any) -> None:
        self._note("push_cache", *args)

    def push_blocks(self, *args: Any) -> None:
        self._note("push_blocks", *args)

    def publish_blocks(self, cache_id: int, blocks: list[int], lease_s: float | None) -> bytes:
        self._note("publish_blocks", cache_id, blocks, lease_s)
        return b"token"

    def retire_blocks(self, token: bytes) -> None:
        self._note("retire_blocks", token)

    def retire_expired(self, cache_id: int) -> list[int]:
        self._note("retire_expired", cache_id)
        return [7]

    def reserve_memory(self, nbytes: int, host: bool = False) -> int:
        self._note("reserve_memory", nbytes, host)
        buffer = bytearray(nbytes)
        address = ctypes.addressof((ctypes.c_char * nbytes).from_buffer(buffer))
        self.reserved[address] = buffer
        return address

    def release_memory(self, address: int) -> None:
        self._note("release_memory", address)
        del self.reserved[address]

    def memory(self, address: int, nbytes: int) -> memoryview:
        return memoryview(self.reserved[address])[:nbytes]

    def transfer(self, *args: Any) -> str:
        self._note("transfer", *args)
        return "job"

    def copy_cache(self, *args: Any) -> None:
        self._note("copy_cache", *args)

    def copy_blocks(self, *args: Any) -> None:
        self._note("copy_blocks", *args)

    def swap_blocks(self, *args: Any) -> None:
        self._note("swap_blocks", *args)

    def tensor_contents(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        self._note("tensor_contents", cache_id, tensor_index)
        return [] if self.tensor is None else [self.tensor]

    def tensor_memory(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        self._note("tensor_memory", cache_id, tensor_index)
        return [] if self.tensor is None else [self.tensor]

    def link(self, clusters: Any, timeout_ms: int) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        self._note("link", clusters, timeout_ms)
        return LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS] * len(clusters)

    def unlink(self, clusters: Any, timeout_ms: int, force: bool) -> tuple[LLMStatusCode, list[LLMStatusCode]]:
        self._note("unlink", clusters, timeout_ms, force)
        return LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS] * len(clusters)

    def check_link(self, remote_cluster_id: int) -> None:
        self._note("check_link", remote_cluster_id)

    def switch_role(self, role: LLMRole, listen: tuple[str, int] | None) -> None:
        self._note("switch_role", role, listen)
        self.role = role

    def link_members(self, name: str, members: dict[int, int], rank_table: str) -> int:
        self._note("link_members", name, members, rank_table)
        self.has_members = True
        return 1

    def member_status(self, comm_id: int) -> int:
        self._note("member_status", comm_id)
        return self.member_state

    def unlink_members(self, comm_id: int) -> None:
        self._note("unlink_members", comm_id)

    def _hold(self) -> int:
        self._last_id += 1
        self.held.add(self._last_id)
        return self._last_id

    def _note(self, name: str, *args: Any) -> None:
        self.calls.append((name, args))
