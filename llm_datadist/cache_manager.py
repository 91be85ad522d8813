"""What a process does with caches in cache-manager mode: allocate, register, pull, push, copy, transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_datadist.allocation_arguments import blocks_model, check_num_tensors, check_tensor_nbytes, key_names
from llm_datadist.arguments import INT64_MAX, UINT32_MAX, check_isinstance
from llm_datadist.cache import Cache
from llm_datadist.cache_copy_calls import CacheCopyCalls
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_handle import CPU_CACHE_ID
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.cache_kinds import check_blocks_cache, check_plain_cache
from llm_datadist.cache_pull_arguments import check_pull_into_blocks, check_pull_of_slot
from llm_datadist.cache_transfer_call import CacheTransferCall
from llm_datadist.layer_range import TensorRanges
from llm_datadist.pull_arguments import check_tensor_ranges
from llm_datadist.push_calls import PushCalls
from llm_datadist.registration_calls import RegistrationCalls
from llm_datadist.sealed_blocks import BlocksToken, SealedBlocks
from llm_datadist.status import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist._local import BlockList
    from llm_datadist.engine.engine import Engine
    from llm_datadist.engine.options import CacheManagerOptions

_ALL_TENSORS = TensorRanges(None, None)


class CacheManager(RegistrationCalls, PushCalls, CacheCopyCalls, CacheTransferCall, SealedBlocks):
    """The caches of an instance in cache-manager mode; given by `LLMDataDist.cache_manager`.

    Every role has every call. After `LLMDataDist.finalize` calls that need the engine are LLM_FAILED.

    Parameters
    ----------
    llm_engine : Engine
        Engine of the instance.
    cluster_id : int
        Cluster of the instance.
    options : CacheManagerOptions
        What the instance was initialised with.
    """

    def __init__(self, llm_engine: Engine, cluster_id: int, options: CacheManagerOptions) -> None:
        super().__init__(llm_engine, cluster_id, options)
        self._slot_keys = [CacheKeyByIdAndIndex] if options.remote_access else [CacheKey, CacheKeyByIdAndIndex]
        self._pulls_by_key = not options.remote_access

    # ---- allocation

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: tuple[CacheKey, ...] | list[CacheKey] = ()) -> Cache:
        """Allocate a cache in the pool of its placement.

        Parameters
        ----------
        cache_desc : CacheDesc
            What to allocate: at least one tensor of 1 to 31 positive dimensions.
        cache_keys : tuple or list of CacheKey
            Key i names slot i. A key whose request is ``2**64 - 1`` and that has no prefix leaves its slot without one;
            slots at the end need none.

        Returns
        -------
        Cache
            Held by its id and by each key. The contents are undefined.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        LLMException
            LLM_PARAM_INVALID: there is no pool of this placement, the description cannot be allocated, there are more
            keys than slots, a key is given twice or bound already. LLM_OUT_OF_MEMORY: no room; nothing is allocated, no
            key bound.

        Examples
        --------
        >>> from llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
        >>> config = LLMConfig()
        >>> config.enable_cache_manager = True
        >>> config.mem_pool_cfg = '{"memory_size": 1048576}'
        >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
        >>> datadist.init(config.generate_options())
        >>> datadist.cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
        Cache(cache_id = 1, device_tensor_addrs = 2, is_blocks_cache = False)
        >>> datadist.finalize()
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey, allow_none=False)
        check_num_tensors(cache_desc)
        self._check_pool(cache_desc.placement)
        nbytes = check_tensor_nbytes(cache_desc)
        slots = cache_desc.shape[0]
        names = key_names(cache_keys, slots, unique=True)
        cache_id, addresses = self._engine.allocate(
            cache_desc.num_tensors, nbytes, slots, keys=names, host=cache_desc.placement is Placement.HOST
        )
        return Cache(cache_id, cache_desc, addresses[0], self, is_registered=False, is_blocks_cache=False)

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> Cache:
        """Allocate a cache for paged attention in the pool of its placement: dimension 0 counts the blocks.

        Parameters
        ----------
        cache_desc : CacheDesc
            What to allocate: at least one tensor of 1 to 31 positive dimensions.
        blocks_cache_key : BlocksCacheKey, optional
            Name for peers, one cache for each model.

        Returns
        -------
        Cache
            Held by its id alone; the key goes with it. The contents are undefined.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A number of the key is no uint64.
        LLMException
            LLM_PARAM_INVALID: there is no pool of this placement, the description cannot be allocated, or the model has
            a blocks cache already. LLM_OUT_OF_MEMORY: no room; nothing is allocated, no key bound.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_num_tensors(cache_desc)
        self._check_pool(cache_desc.placement)
        model_id = blocks_model(blocks_cache_key)
        nbytes = check_tensor_nbytes(cache_desc)
        cache_id, addresses = self._engine.allocate(
            cache_desc.num_tensors,
            nbytes,
            cache_desc.shape[0],
            blocks_model=model_id,
            host=cache_desc.placement is Placement.HOST,
        )
        return Cache(cache_id, cache_desc, addresses[0], self, is_registered=False, is_blocks_cache=True)

    def deallocate_cache(self, cache: Cache) -> None:
        """Give up the id of a plain cache; its memory is freed when no key refers to it. A second call does nothing.

        Parameters
        ----------
        cache : Cache
            A plain cache. Its list of addresses becomes ``[]``, every use of it is LLM_KV_CACHE_NOT_EXIST. One that was
            registered is unregistered.

        Raises
        ------
        AttributeError
            `cache` is None.
        TypeError
            `cache` is something else than a Cache.
        LLMException
            LLM_PARAM_INVALID: a blocks cache.
        """
        check_plain_cache("cache", cache)
        self._give_up(cache)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Give up a blocks cache: its memory is freed, its key unbound. A second call does nothing.

        Parameters
        ----------
        cache : Cache
            A blocks cache. Its list of addresses becomes ``[]``, every use of it is LLM_KV_CACHE_NOT_EXIST. One that
            was registered is unregistered.

        Raises
        ------
        AttributeError
            `cache` is None.
        TypeError
            `cache` is something else than a Cache.
        LLMException
            LLM_PARAM_INVALID: a plain cache.
        """
        check_blocks_cache("cache", cache)
        self._give_up(cache)

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbind a key, so that it can no longer be pulled; an unknown key is ignored.

        Parameters
        ----------
        cache_key : CacheKey
            The key; a key with a prefix is looked up by its prefix, its cluster does not matter.

        Raises
        ------
        TypeError
            `cache_key` is no CacheKey.
        LLMException
            LLM_FEATURE_NOT_ENABLED: there is no pool.
        """
        check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
        if not any(self._pools.values()):
            raise LLMException(
                "remove_cache_key needs a memory pool: llm.MemPoolConfig or llm.HostMemPoolConfig",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        if not cache_key._is_placeholder:
            self._engine.remove_key(cache_key._name)

    # ---- pulls

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        cache: Cache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: Any,
    ) -> None:
        """Copy one slot of a remote cache into a slot of a local one, tensor by tensor.

        Returns when the bytes are there. On success an ordinary key of an allocated cache is released at its owner,
        unless tensors of it have not been pulled yet; keys of registered caches stay.

        Parameters
        ----------
        cache_key : CacheKey or CacheKeyByIdAndIndex
            Remote slot; its cluster chooses the link. With ``enable_remote_cache_accessible`` only a
            CacheKeyByIdAndIndex.
        cache : Cache
            Local plain cache, of either placement.
        batch_index : int
            Local slot, uint32.
        size : int
            Bytes, or -1 for the whole local slot.
        **kwargs
            Others than these are ignored, also offsets:

            src_layer_range, dst_layer_range : range or None
                Layers of the remote and of the local cache, step 1; None and an empty range mean all.
            tensor_num_per_layer : int
                Tensors that make one layer, by default 2; divides the number of tensors if a range is given.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An integer is out of the range of its width.
        LLMException
            LLM_PARAM_INVALID: blocks cache, the own cluster, key with both or neither of request and prefix, or slots,
            bytes or tensors that do not exist or do not fit. LLM_KV_CACHE_NOT_EXIST: there is no such key, or the local
            cache is deallocated. LLM_NOT_YET_LINK: no link. LLM_LINK_BUSY: the link is in use. LLM_TIMEOUT: not
            finished within sync_kv_timeout, or the peer is gone.
        """
        tensors = _ALL_TENSORS
        kind = type(cache_key)
        # This test only decides whether the exact checks can be left out; most calls pass it.
        if not (
            (kind is CacheKeyByIdAndIndex or (kind is CacheKey and self._pulls_by_key))
            and cache_key._pullable
            and cache_key._cluster_id != self._cluster_id
            and type(cache) is Cache
            and not cache._is_blocks_cache
            and type(batch_index) is int
            and 0 <= batch_index <= UINT32_MAX
            and type(size) is int
            and (size == -1 or 0 < size <= INT64_MAX)
        ):
            tensors = check_pull_of_slot(cache_key, cache, batch_index, size, kwargs, self._slot_keys, self._cluster_id)
        elif kwargs:
            tensors = check_tensor_ranges(kwargs, cache)
        cache_id = cache._cache_id if cache._manager is self else CPU_CACHE_ID
        self._engine.pull_cache(
            cache_key._cluster_id, cache_key._name, cache_id, batch_index, size, *tensors, 0, 0, True
        )

    def pull_blocks(
        self,
        src_cache_key: BlocksCacheKey | CacheKey | CacheKeyByIdAndIndex,
        dst_cache: Cache,
        src_blocks: BlockList = (),
        dst_blocks: BlockList = (),
        *,
        token: BlocksToken | None = None,
        **kwargs: Any,
    ) -> None:
        """Copy remote blocks, or a remote slot in pieces, into blocks of a local cache.

        With a BlocksCacheKey block ``src_blocks[i]`` goes into block ``dst_blocks[i]``, and the key stays bound. With
        another key the remote slot is cut into blocks of the local size, and piece i goes into block ``dst_blocks[i]``;
        on success a CacheKey of an allocated cache is released at its owner. Every tensor takes part, or those of the
        given layers. Returns when the bytes are there.

        Parameters
        ----------
        src_cache_key : BlocksCacheKey, CacheKey or CacheKeyByIdAndIndex
            Remote blocks cache or slot; its cluster chooses the link.
        dst_cache : Cache
            Local blocks cache, of either placement.
        src_blocks, dst_blocks : list or tuple of int, or one-dimensional array of integers
            Block table of the transfer: equally many, at least one; no source blocks for a slot.
        token : bytes, optional
            What `publish_blocks` gave there for these blocks: the pull fails if they are no longer the ones that were
            meant. An addition to the documented interface.
        **kwargs
            Others than these are ignored:

            src_layer_range, dst_layer_range : range or None
                Layers of the remote and of the local cache, step 1; None and an empty range mean all.
            tensor_num_per_layer : int
                Tensors that make one layer, by default 2; divides the number of tensors if a range is given.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A block number or a number of the key is no uint64.
        LLMException
            LLM_PARAM_INVALID: plain cache, the own cluster, empty or unequal lists, source blocks beside the key of a
            slot, or blocks or tensors that do not exist or do not fit. LLM_KV_CACHE_NOT_EXIST: there is no such key, a
            block of the token was retired or published anew, or the local cache is deallocated. LLM_NOT_YET_LINK: no
            link. LLM_LINK_BUSY: the link is in use. LLM_TIMEOUT: not finished within sync_kv_timeout, or the peer is
            gone.
        """
        blocks: tuple[Any, Any, Any, Any] = (src_blocks, dst_blocks, None, None)
        # As in pull_cache. The engine unpacks the block numbers, so it is left to it to find a wrong one.
        if not (
            type(src_cache_key) is BlocksCacheKey
            and src_cache_key._usable
            and src_cache_key._cluster_id != self._cluster_id
            and type(dst_cache) is Cache
            and dst_cache._is_blocks_cache
            and type(src_blocks) is list
            and type(dst_blocks) is list
            and src_blocks
            and len(src_blocks) == len(dst_blocks)
            and (token is None or type(token) is bytes)
        ):
            blocks = check_pull_into_blocks(
                src_cache_key, dst_cache, src_blocks, dst_blocks, token, kwargs, self._cluster_id
            )
        cache_id = dst_cache._cache_id if dst_cache._manager is self else CPU_CACHE_ID
        try:
            if kwargs:
                blocks = (*blocks[:2], *check_tensor_ranges(kwargs, dst_cache))
            self._engine.pull_blocks(src_cache_key._cluster_id, src_cache_key._name, cache_id, *blocks, token)
        except (TypeError, ValueError):
            # Of several wrong arguments the first in the documented order counts.
            check_pull_into_blocks(src_cache_key, dst_cache, src_blocks, dst_blocks, token, kwargs, self._cluster_id)
            raise

    # ---- inside

    def _give_up(self, cache: Cache) -> None:
        if not cache._held:
            return
        if cache._is_registered:
            self._engine.unregister(self._engine_id(cache))
        else:
            self._engine.deallocate(self._engine_id(cache))
        cache._mark_deallocated()
