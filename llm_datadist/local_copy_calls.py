"""The calls of `KvCacheManager` that copy inside the process: slots, blocks, and swaps with host memory."""

from __future__ import annotations

from llm_datadist.engine_access import EngineAccess
from llm_datadist.kv_cache import KvCache
from llm_datadist.local_copy_arguments import check_copy_blocks, check_copy_cache, check_swap_blocks
from llm_datadist.log import logger


class LocalCopyCalls(EngineAccess):
    """Base of `KvCacheManager`; every role has these calls. They touch no keys."""

    def copy_cache(
        self,
        dst: KvCache,
        src: KvCache,
        dst_batch_index: int = 0,
        src_batch_index: int = 0,
        offset: int = 0,
        size: int = -1,
        req_id: int | None = None,
    ) -> None:
        """Copy one slot of a cache, or a part of it, into a slot of another or the same cache, tensor by tensor.

        Returns when the bytes are there. Concurrent calls of this and of `copy_blocks` queue.

        Parameters
        ----------
        dst, src : KvCache
            Allocated caches with equally many tensors.
        dst_batch_index, src_batch_index : int
            Slots, uint32.
        offset : int
            First byte, in both slots, uint64.
        size : int
            Bytes, or -1 for the source slot from `offset` to its end.
        req_id : int, optional
            Request, for the log.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An integer is out of the range of its width.
        LLMException
            LLM_PARAM_INVALID: HOST cache, different numbers of tensors, or slots or bytes that do not exist on both
            sides. LLM_KV_CACHE_NOT_EXIST: a cache is deallocated. LLM_WAIT_PROCESS_TIMEOUT: not finished within
            sync_kv_timeout; a part may have been copied.
        """
        check_copy_cache(dst, src, dst_batch_index, src_batch_index, offset, size, req_id)
        dst_id, src_id = self._engine_id(dst), self._engine_id(src)
        logger.debug(
            "copy_cache req_id %s: cache %d slot %d -> cache %d slot %d, offset %d, size %d",
            req_id,
            src.cache_id,
            src_batch_index,
            dst.cache_id,
            dst_batch_index,
            offset,
            size,
        )
        self._engine.copy_cache(dst_id, src_id, dst_batch_index, src_batch_index, offset, size)

    def copy_blocks(self, cache: KvCache, copy_block_info: dict[int, list[int]]) -> None:
        """Copy blocks inside one cache, in every tensor.

        The pairs are carried out in the order of the dict, one after the other: ``{1: [2], 2: [3]}`` brings block 1
        into both 2 and 3. Returns when the bytes are there. Concurrent calls of this and of `copy_cache` queue.

        Parameters
        ----------
        cache : KvCache
            An allocated cache; one of `allocate_cache` works too, its slots are the blocks.
        copy_block_info : dict of int to list of int
            For each source block the blocks that it goes into, uint64. Without any of these nothing is copied.

        Raises
        ------
        TypeError
            An argument of the wrong type; a tuple of blocks is one.
        ValueError
            A block number is no uint64.
        LLMException
            LLM_PARAM_INVALID: HOST cache, or a block that does not exist; nothing is copied then.
            LLM_KV_CACHE_NOT_EXIST: the cache is deallocated. LLM_WAIT_PROCESS_TIMEOUT: not finished within
            sync_kv_timeout; a part may have been copied.

        Examples
        --------
        >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
        >>> from llm_datadist.views import tensor_view
        >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
        >>> datadist.init({"ge.exec.deviceId": "0"})
        >>> cache = datadist.kv_cache_manager.allocate_blocks_cache(CacheDesc(1, (4, 128), DataType.DT_INT32))
        >>> view = tensor_view(cache)
        >>> view[0] = 7
        >>> datadist.kv_cache_manager.copy_blocks(cache, {0: [1, 3]})
        >>> view[1, 0].item(), view[3, 127].item()
        (7, 7)
        >>> del view
        >>> datadist.finalize()
        """
        blocks = check_copy_blocks(cache, copy_block_info)
        self._engine.copy_blocks(self._engine_id(cache), blocks.sources, blocks.targets)

    def swap_blocks(self, src: KvCache, dst: KvCache, src_to_dst: dict[int, int]) -> None:
        """Copy blocks between host memory of the caller and a cache, in every tensor of every device.

        From HOST to DEVICE this is a swap in, from DEVICE to HOST a swap out. The source keeps its content, and so do
        blocks that are not named. Returns when the bytes are there. Large swaps use several threads.

        Parameters
        ----------
        src, dst : KvCache
            One of `KvCache.create_cpu_cache`, whose memory must be alive, and one that is allocated; with blocks of
            equal size and equally many tensors. A block is one index of the dimension ``batch_dim_index``.
        src_to_dst : dict of int to int
            Destination block of each source block, carried out in the order of the dict. An empty one is a success.

        Raises
        ------
        TypeError
            An argument of the wrong type; None is an AttributeError as well.
        LLMException
            LLM_PARAM_INVALID: different block sizes or numbers of tensors, a block that does not exist, two caches of
            the same placement, addresses for other devices, an address that is 0, or a cache that is deallocated.
            LLM_WAIT_PROCESS_TIMEOUT: not finished within sync_kv_timeout; a part may have been copied.
        """
        device, host, block_nbytes, blocks, swap_in = check_swap_blocks(src, dst, src_to_dst)
        self._engine.swap_blocks(
            self._engine_id(device),
            host._addresses(),
            block_nbytes,
            blocks.sources,
            blocks.targets,
            swap_in,
        )
