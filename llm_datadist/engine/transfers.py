"""One-sided transfers with linked peers: what they touch on this side, and the end of the link that moves the bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from llm_datadist._local import BlockPairs, LocalCache, block_pairs
from llm_datadist._outcome import TransferFault
from llm_datadist.engine.caches import CacheTable
from llm_datadist.engine.failures import invalid, no_cache
from llm_datadist.engine.geometry import TensorRange, local_blocks, local_slot, local_tensors, slot_bytes
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.transfer_failures import TransferFailures

if TYPE_CHECKING:
    from llm_datadist._local import BlockList

_ALL = -1  # a count of remote tensors: the puller takes as many as there are


class Transfers(ABC):
    """Base of `Engine`, which sets the attributes."""

    _caches: CacheTable
    _links: LinkTable
    _failures: TransferFailures
    _timeout_ns: int

    @abstractmethod
    def _require_open(self, call: str) -> None:
        """Raise LLM_FAILED if the engine is finalized."""

    # ---- pulls

    def pull_cache(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        batch_index: int,
        size: int,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
        src_offset: int,
        dst_offset: int,
        consume: bool,
    ) -> None:
        """Copy one remote slot, or a part of it, into a slot of a local cache.

        Parameters
        ----------
        cluster_id : int
            Remote cluster.
        key : KeyName
            Ordinary or prefix key, or ``(CACHE, cache_id, slot)`` of the remote cache.
        cache_id, batch_index : int
            Local cache and slot.
        size : int
            Bytes, or -1 for the rest of the local slot.
        src_tensors, dst_tensors : (int, int) or None
            First tensor and number of tensors; None = all.
        src_offset, dst_offset : int
            First byte inside the slots.
        consume : bool
            Whether an ordinary key is released when all its tensors were pulled.

        Raises
        ------
        LLMException
            The codes of ``KvCacheManager.pull_cache``.
        """
        call = "pull_cache"
        self._require_open(call)
        cache = self._find(call, cache_id)
        local_slot(call, cache, batch_index)
        dst_first, dst_count = local_tensors(call, cache, dst_tensors)
        size = slot_bytes(call, cache, dst_offset, size)
        end = self._links.puller(call, cluster_id)
        kind, number, third = key
        by_id = kind == KeyKind.CACHE
        src_first, src_count = (0, _ALL) if src_tensors is None else src_tensors
        try:
            end.pull_cache(
                cache,
                kind,
                number,
                0 if by_id else third,
                third if by_id else 0,
                batch_index,
                size,
                src_first,
                src_count,
                dst_first,
                dst_count,
                src_offset,
                dst_offset,
                consume,
                time.monotonic_ns() + self._timeout_ns,
            )
        except TransferFault as fault:
            self._links.mend(cluster_id)
            raise self._failures.of_pull(call, cluster_id, _key_text(key), cache, fault) from None

    def pull_blocks(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        src_blocks: BlockList | None,
        dst_blocks: BlockList,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
        token: bytes | None = None,
    ) -> None:
        """Copy block ``src_blocks[i]`` of a remote blocks cache into block ``dst_blocks[i]`` of a local cache.

        Parameters
        ----------
        key : KeyName
            ``(BLOCKS, 0, model_id)``. Any other key names a remote slot: without `src_blocks` it is cut into blocks of
            the size of the local ones, and an ordinary key is released.
        token : bytes or None
            Of `CacheTable.seal_blocks` at the owner: the pull fails unless the blocks are sealed under it.

        Raises
        ------
        ValueError
            A block number is negative or beyond uint64.
        LLMException
            The codes of ``KvCacheManager.pull_blocks``; LLM_PARAM_INVALID also for bytes that are no token.
        """
        call = "pull_blocks"
        self._require_open(call)
        pairs = block_pairs(list(range(len(dst_blocks))) if src_blocks is None else src_blocks, dst_blocks)
        cache = self._find(call, cache_id)
        local_blocks(call, cache, pairs)
        dst_first, dst_count = local_tensors(call, cache, dst_tensors)
        end = self._links.puller(call, cluster_id)
        kind, number, third = key
        by_id = kind == KeyKind.CACHE
        src_first, src_count = (0, _ALL) if src_tensors is None else src_tensors
        try:
            end.pull_blocks(
                cache,
                kind,
                number,
                0 if by_id else third,
                third if by_id else 0,
                pairs,
                src_first,
                src_count,
                dst_first,
                dst_count,
                token,
                time.monotonic_ns() + self._timeout_ns,
            )
        except TransferFault as fault:
            self._links.mend(cluster_id)
            raise self._failures.of_pull(call, cluster_id, _key_text(key), cache, fault) from None
        except ValueError as error:
            raise invalid(call, str(error)) from None

    # ---- pushes

    def push_cache(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        src_slot: int,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
    ) -> None:
        """Copy a slot of a local cache into the remote slot ``(CACHE, cache_id, slot)``.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID, LLM_KV_CACHE_NOT_EXIST, LLM_NOT_YET_LINK, the mode's code for a timeout.
        """
        self._push_to_key("push_cache", cluster_id, key, cache_id, src_slot, src_tensors, dst_tensors, None, 0)

    def push_blocks(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        src_blocks: BlockList,
        dst_blocks: BlockList,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
    ) -> None:
        """Copy block ``src_blocks[i]`` of a local cache into block ``dst_blocks[i]`` of ``(BLOCKS, 0, model_id)``.

        Raises
        ------
        ValueError
            A block number is negative or beyond uint64.
        LLMException
            As `push_cache`.
        """
        pairs = block_pairs(src_blocks, dst_blocks)
        self._push_to_key("push_blocks", cluster_id, key, cache_id, 0, src_tensors, dst_tensors, pairs, 0)

    def push_layer(
        self,
        cluster_id: int,
        cache_id: int,
        tensors: tuple[int, int],
        addresses: list[int],
        src_slot: int | None,
        src_blocks: list[int] | None,
        dst_blocks: list[int] | None,
        block_nbytes: int,
        key: KeyName | None = None,
        dst_first: int = 0,
    ) -> None:
        """Copy the tensors of one layer to addresses in a peer's process, or into the cache that a key names there.

        Parameters
        ----------
        cluster_id : int
            The peer.
        cache_id : int
            Local cache.
        tensors : (int, int)
            First tensor and number of tensors.
        addresses : list of int
            One a tensor: where its slot goes, or where the destination's tensor starts when blocks are given. Empty
            with a key.
        src_slot : int or None
            Local slot; not used when source blocks are given.
        src_blocks, dst_blocks : list of int or None
            Block table. Destination blocks alone: the slot is cut into blocks of `block_nbytes`.
        block_nbytes : int
            Bytes of a destination block; 0 = those of a source block.
        key : KeyName or None
            ``(CACHE, cache_id, slot)`` or ``(BLOCKS, 0, model_id)``.
        dst_first : int
            First tensor of that cache.

        Raises
        ------
        LLMException
            LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, LLM_NOT_YET_LINK, the mode's code for a timeout.
        """
        call = "transfer_cache_async"
        self._require_open(call)
        first, count = tensors
        pairs = cut = None
        if dst_blocks is not None:
            pairs = block_pairs(list(range(len(dst_blocks))) if src_blocks is None else src_blocks, dst_blocks)
            cut = block_nbytes if src_blocks is None else None
        cache = self._find(call, cache_id)
        if pairs is not None and cut is None and block_nbytes not in (0, cache.stride):
            reason = f"dst_block_memory_size is {block_nbytes}, a source block has {cache.stride} bytes"
            raise invalid(call, reason)
        if key is not None:
            there = (dst_first, count)
            self._push_to_key(call, cluster_id, key, cache_id, src_slot or 0, tensors, there, pairs, cut or 0)
            return
        end = self._links.pusher(call, cluster_id)
        if count != len(addresses):
            raise invalid(call, f"{len(addresses)} addresses for {count} tensors")
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        try:
            end.push(cache, first, addresses, src_slot or 0, pairs, cut or 0, deadline_ns)
        except TransferFault as fault:
            self._links.mend(cluster_id)
            raise self._failures.of_push(call, cluster_id, "an address", cache, fault) from None

    def _push_to_key(
        self,
        call: str,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        src_slot: int,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
        pairs: BlockPairs | None,
        block_nbytes: int,
    ) -> None:
        self._require_open(call)
        cache = self._find(call, cache_id)
        src_first, count = local_tensors(call, cache, src_tensors)
        dst_first, dst_count = (0, count) if dst_tensors is None else dst_tensors
        if count != dst_count:
            raise invalid(call, f"{count} source tensors for {dst_count} destination tensors, should be equally many")
        end = self._links.pusher(call, cluster_id)
        kind, number, third = key
        by_id = kind == KeyKind.CACHE
        try:
            end.push_to_key(
                cache,
                src_first,
                count,
                src_slot,
                kind,
                number,
                0 if by_id else third,
                third if by_id else 0,
                dst_first,
                pairs,
                block_nbytes,
                time.monotonic_ns() + self._timeout_ns,
            )
        except TransferFault as fault:
            self._links.mend(cluster_id)
            raise self._failures.of_push(call, cluster_id, _key_text(key), cache, fault) from None

    def _find(self, call: str, cache_id: int) -> LocalCache:
        cache = self._caches.by_id.get(cache_id)
        if cache is None:
            raise no_cache(call, cache_id)
        return cache


def _key_text(key: KeyName) -> str:
    kind, number, third = key
    if kind == KeyKind.CACHE:
        return f"cache id {number}, batch index {third}"
    if kind == KeyKind.BLOCKS:
        return f"the blocks key of model {third}"
    return f"{KeyKind(kind).name.lower()} key {number} of model {third}"
