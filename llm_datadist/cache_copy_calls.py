"""The calls of `CacheManager` that copy inside the process: slots, blocks, and swaps between host and device."""

from __future__ import annotations

from llm_datadist.arguments import check_uint64
from llm_datadist.cache import Cache
from llm_datadist.cache_kinds import check_blocks_device_cache, check_plain_device_cache
from llm_datadist.cache_manager_access import CacheManagerAccess
from llm_datadist.local_copy_arguments import check_copy_blocks, check_copy_cache, check_swap_of_blocks_caches
from llm_datadist.log import logger


class CacheCopyCalls(CacheManagerAccess):
    """Base of `CacheManager`. The calls touch no keys."""

    def copy_cache(
        self,
        dst: Cache,
        src: Cache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copy one slot of a plain cache, or a part of it, into a slot of another or the same, tensor by tensor.

        Returns when the bytes are there. Concurrent calls of this and of `copy_blocks` queue.

        Parameters
        ----------
        dst, src : Cache
            Plain device caches with equally many tensors.
        dst_batch_index, src_batch_index : int
            Slots, uint32.
        offset : int
            First byte, in both slots, uint64.
        size : int
            Bytes, or -1 for the source slot from `offset` to its end.
        req_id : int, optional
            Request, uint64, for the log.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An integer is out of the range of its width.
        LLMException
            LLM_PARAM_INVALID: blocks cache, HOST cache, different numbers of tensors, or slots or bytes that do not
            exist on both sides. LLM_KV_CACHE_NOT_EXIST: a cache is deallocated. LLM_TIMEOUT: not finished within
            sync_kv_timeout; a part may have been copied.
        """
        check_copy_cache(
            dst, src, dst_batch_index, src_batch_index, offset, size, req_id, check_cache=check_plain_device_cache
        )
        if req_id is not None:
            check_uint64("req_id", req_id)
        logger.debug(
            "copy_cache req_id %s: %s slot %d -> %s slot %d", req_id, src, src_batch_index, dst, dst_batch_index
        )
        self._engine.copy_cache(
            self._engine_id(dst), self._engine_id(src), dst_batch_index, src_batch_index, offset, size
        )

    def copy_blocks(self, cache: Cache, copy_block_info: dict[int, list[int]]) -> None:
        """Copy blocks inside one blocks cache, in every tensor.

        The pairs are carried out in the order of the dict, one after the other: ``{1: [2], 2: [3]}`` brings block 1
        into both 2 and 3. Returns when the bytes are there. Concurrent calls of this and of `copy_cache` queue.

        Parameters
        ----------
        cache : Cache
            A blocks cache in device memory.
        copy_block_info : dict of int to list of int
            For each source block the blocks that it goes into, uint64. Without any of these nothing is copied.

        Raises
        ------
        TypeError
            An argument of the wrong type; a tuple of blocks is one.
        ValueError
            A block number is no uint64.
        LLMException
            LLM_PARAM_INVALID: plain cache, HOST cache, or a block that does not exist; nothing is copied then.
            LLM_KV_CACHE_NOT_EXIST: the cache is deallocated. LLM_TIMEOUT: not finished within sync_kv_timeout; a part
            may have been copied.
        """
        blocks = check_copy_blocks(cache, copy_block_info, Cache, check_blocks_device_cache)
        self._engine.copy_blocks(self._engine_id(cache), blocks.sources, blocks.targets)

    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: dict[int, int]) -> None:
        """Copy blocks between a blocks cache in host memory and one in device memory, in every tensor.

        From HOST to DEVICE this is a swap in, from DEVICE to HOST a swap out. The source keeps its content, and so do
        blocks that are not named. Returns when the bytes are there. Large swaps use several threads.

        Parameters
        ----------
        src_cache, dst_cache : Cache
            Blocks caches with blocks of equal size and equally many tensors, one of each placement. That in host memory
            may be one of `Cache.create_cpu_cache`. A block is one index of the dimension ``batch_dim_index``.
        src_to_dst : dict of int to int
            Destination block of each source block, carried out in the order of the dict. An empty one is a success.

        Raises
        ------
        TypeError
            An argument of the wrong type; None is an AttributeError as well.
        LLMException
            LLM_PARAM_INVALID: plain cache, different block sizes or numbers of tensors, a block that does not exist,
            two caches of the same placement, an address that is 0, or a cache that is deallocated. LLM_TIMEOUT: not
            finished within sync_kv_timeout; a part may have been copied.
        """
        device, host, block_nbytes, blocks, swap_in = check_swap_of_blocks_caches(src_cache, dst_cache, src_to_dst)
        self._engine.swap_blocks(
            self._engine_id(device), host._addresses(), block_nbytes, blocks.sources, blocks.targets, swap_in
        )
