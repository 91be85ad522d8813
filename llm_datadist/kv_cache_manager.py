"""What a process does with caches: allocate, release, read, pull, transfer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llm_datadist.allocation_arguments import blocks_model, check_num_tensors, check_tensor_nbytes, key_names
from llm_datadist.arguments import INT64_MAX, UINT32_MAX, check_int32, check_isinstance
from llm_datadist.cache_desc import CacheDesc, Placement
from llm_datadist.cache_handle import CPU_CACHE_ID
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.cache_kinds import check_device_cache
from llm_datadist.kv_cache import KvCache
from llm_datadist.layer_range import TensorRanges
from llm_datadist.local_copy_calls import LocalCopyCalls
from llm_datadist.pull_arguments import (
    PullCacheArguments,
    check_pull_blocks,
    check_pull_cache,
    check_pull_cache_keywords,
    check_tensor_ranges,
)
from llm_datadist.roles import LLMRole
from llm_datadist.sealed_blocks import BlocksToken, SealedBlocks
from llm_datadist.status import InvalidArgument
from llm_datadist.tensor import Tensor, TensorDesc
from llm_datadist.transfer_call import TransferCall

if TYPE_CHECKING:
    from llm_datadist._local import BlockList
    from llm_datadist.engine.engine import Engine
    from llm_datadist.engine.several_devices import SeveralDevices

# Names of the hot calls.
_DECODER = LLMRole.DECODER
_DEVICE = Placement.DEVICE
_WHOLE_SLOT = PullCacheArguments(None, None, 0, 0, True)
_ALL_TENSORS = TensorRanges(None, None)
_ONLY_CACHE_KEYS = {CacheKey}


class KvCacheManager(LocalCopyCalls, TransferCall, SealedBlocks):
    """The caches of an initialised instance; given by `LLMDataDist.kv_cache_manager`.

    Parameters
    ----------
    llm_engine : Engine
        Engine of the instance.
    role : LLMRole
        Role of the instance.
    """

    def __init__(self, llm_engine: Engine | SeveralDevices, role: LLMRole) -> None:
        super().__init__(llm_engine)
        self._role = role
        self._initialized = True
        self._pid = os.getpid()

    def _take_role(self, role: LLMRole) -> None:
        """Enforce another role from now on."""
        self._role = role

    def is_initialized(self) -> bool:
        """Tell whether the instance is initialised; after `LLMDataDist.finalize` it is not."""
        return self._initialized

    # ---- allocation

    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: tuple[CacheKey, ...] | list[CacheKey] = ()) -> KvCache:
        """Allocate a cache on every device of the process.

        Parameters
        ----------
        cache_desc : CacheDesc
            What to allocate: at least one tensor of 1 to 31 positive dimensions, placement DEVICE.
        cache_keys : tuple or list of CacheKey
            Key `i` names slot `i`; only in the role PROMPT. A key without request and prefix leaves its slot unnamed,
            slots after the last key have none. Of equal keys the last one counts.

        Returns
        -------
        KvCache
            Held by its id until it is deallocated, and by each key until the key is pulled or removed. The contents are
            undefined.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        LLMException
            LLM_PARAM_INVALID: the description cannot be allocated, there are more keys than slots, a key is bound
            already, or the role has no keys. LLM_DEVICE_OUT_OF_MEMORY: no room; nothing is allocated, no key bound.

        Examples
        --------
        >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
        >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
        >>> datadist.init({"ge.exec.deviceId": "0"})
        >>> cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
        >>> cache.cache_id, len(cache.per_device_tensor_addrs[0])
        (1, 2)
        >>> datadist.finalize()
        """
        # This test only decides whether the exact checks can be left out; most calls pass it.
        if not (
            type(cache_desc) is CacheDesc
            and cache_desc._num_tensors
            and cache_desc._placement is _DEVICE
            and (type(cache_keys) is list or type(cache_keys) is tuple)
            and (not cache_keys or set(map(type, cache_keys)) == _ONLY_CACHE_KEYS)
        ):
            check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
            check_isinstance("cache_keys", cache_keys, [list, tuple], CacheKey, allow_none=False)
            check_num_tensors(cache_desc)
            self._check_pool(cache_desc.placement)
        if cache_keys and self._role is not LLMRole.PROMPT:
            raise InvalidArgument(f"cache_keys is not supported by {self._role.name}, only by PROMPT")
        nbytes = check_tensor_nbytes(cache_desc)
        slots = cache_desc.shape[0]
        names = key_names(cache_keys, slots)
        cache_id, addresses = self._engine.allocate(cache_desc.num_tensors, nbytes, slots, keys=names)
        return KvCache(cache_id, cache_desc, addresses, self)

    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: BlocksCacheKey | None = None) -> KvCache:
        """Allocate a cache for paged attention: dimension 0 counts the blocks.

        Parameters
        ----------
        cache_desc : CacheDesc
            What to allocate: at least one tensor of 1 to 31 positive dimensions, placement DEVICE.
        blocks_cache_key : BlocksCacheKey, optional
            Name for pulls, one cache for each model; not in the role DECODER.

        Returns
        -------
        KvCache
            Held by its id alone; the key goes with it. The contents are undefined.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A number of the key is no uint64.
        LLMException
            LLM_PARAM_INVALID: the description cannot be allocated, the model has a blocks cache already, or the role is
            DECODER and a key is given. LLM_DEVICE_OUT_OF_MEMORY: no room; nothing is allocated, no key bound.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc, allow_none=False)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_num_tensors(cache_desc)
        self._check_pool(cache_desc.placement)
        if blocks_cache_key is not None and self._role is _DECODER:
            raise InvalidArgument("blocks_cache_key is not supported by DECODER, only by PROMPT and MIX")
        model_id = blocks_model(blocks_cache_key)
        nbytes = check_tensor_nbytes(cache_desc)
        cache_id, addresses = self._engine.allocate(
            cache_desc.num_tensors, nbytes, cache_desc.shape[0], blocks_model=model_id
        )
        return KvCache(cache_id, cache_desc, addresses, self)

    def deallocate_cache(self, cache: KvCache) -> None:
        """Give up the id of a cache; its memory is freed when no key refers to it. A second call does nothing.

        Parameters
        ----------
        cache : KvCache
            An allocated cache. Its list of addresses becomes ``[]``, every use of it is LLM_KV_CACHE_NOT_EXIST.

        Raises
        ------
        AttributeError
            `cache` is None.
        TypeError
            `cache` is something else than a KvCache.
        LLMException
            LLM_PARAM_INVALID: a cache of `KvCache.create_cpu_cache`.
        """
        if not (type(cache) is KvCache and cache._cache_desc._placement is _DEVICE):
            check_device_cache("cache", cache)
        if not cache._held:
            return
        self._engine.deallocate(self._engine_id(cache))
        cache._mark_deallocated()

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbind a key, so that it can no longer be pulled; an unknown key is ignored. Role PROMPT.

        Parameters
        ----------
        cache_key : CacheKey
            The key; a key with a prefix is looked up by its prefix, its cluster does not matter.

        Raises
        ------
        TypeError
            `cache_key` is no CacheKey.
        LLMException
            LLM_PARAM_INVALID: wrong role.
        """
        if self._role is not LLMRole.PROMPT:
            raise self._wrong_role("remove_cache_key", "PROMPT")
        check_isinstance("cache_key", cache_key, CacheKey, allow_none=False)
        if not cache_key._is_placeholder:
            self._engine.remove_key(cache_key._name)

    # ---- pulls

    def pull_cache(
        self,
        cache_key: CacheKey | CacheKeyByIdAndIndex,
        kv_cache: KvCache,
        batch_index: int = 0,
        size: int = -1,
        **kwargs: Any,
    ) -> None:
        """Copy one slot of a remote cache into a slot of a local one, tensor by tensor. Role DECODER.

        Returns when the bytes are there. On success an ordinary key is released at its owner, unless an offset was
        given or tensors of it have not been pulled yet.

        Parameters
        ----------
        cache_key : CacheKey or CacheKeyByIdAndIndex
            Remote slot; its cluster chooses the link.
        kv_cache : KvCache
            Local cache.
        batch_index : int
            Local slot, uint32.
        size : int
            Bytes, or -1 for the local slot from `dst_cache_offset` to its end.
        **kwargs
            Others than these are ignored:

            src_layer_range, dst_layer_range : range or None
                Layers of the remote and of the local cache, step 1; None and an empty range mean all.
            src_cache_offset, dst_cache_offset : int or None
                First byte inside the remote and the local slot.
            tensor_num_per_layer : int
                Tensors that make one layer, by default 2; divides the number of tensors if a range is given.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An integer is out of the range of its width, or an offset is negative.
        LLMException
            LLM_PARAM_INVALID: wrong role, HOST cache, key with both or neither of request and prefix, or slots, bytes
            or tensors that do not exist or do not fit. LLM_KV_CACHE_NOT_EXIST: there is no such key, or the local cache
            is deallocated. LLM_NOT_YET_LINK: no link. LLM_LINK_BUSY: the link is in use. LLM_WAIT_PROCESS_TIMEOUT: not
            finished within sync_kv_timeout, or the peer is gone.
        """
        if self._role is not _DECODER:
            raise self._wrong_role("pull_cache", "DECODER")
        arguments = _WHOLE_SLOT
        # This test only decides whether the exact checks can be left out; most calls pass it.
        if not (
            (type(cache_key) is CacheKey or type(cache_key) is CacheKeyByIdAndIndex)
            and cache_key._pullable
            and type(kv_cache) is KvCache
            and kv_cache._cache_desc._placement is _DEVICE
            and type(batch_index) is int
            and 0 <= batch_index <= UINT32_MAX
            and type(size) is int
            and (size == -1 or 0 < size <= INT64_MAX)
        ):
            arguments = check_pull_cache(cache_key, kv_cache, batch_index, size, kwargs)
        elif kwargs:
            arguments = check_pull_cache_keywords(kwargs, kv_cache)
        cache_id = kv_cache._cache_id if kv_cache._manager is self else CPU_CACHE_ID
        self._engine.pull_cache(cache_key._cluster_id, cache_key._name, cache_id, batch_index, size, *arguments)

    def pull_blocks(
        self,
        prompt_cache_key: BlocksCacheKey,
        decoder_kv_cache: KvCache,
        prompt_blocks: BlockList,
        decoder_blocks: BlockList,
        *,
        token: BlocksToken | None = None,
        **kwargs: Any,
    ) -> None:
        """Copy block ``prompt_blocks[i]`` of a remote blocks cache into block ``decoder_blocks[i]``. Role DECODER.

        Every tensor takes part, or those of the given layers. Returns when the bytes are there. The key stays bound.

        Parameters
        ----------
        prompt_cache_key : BlocksCacheKey
            Remote blocks cache; its cluster chooses the link.
        decoder_kv_cache : KvCache
            Local cache; one of `allocate_cache` works too, its slots are the blocks.
        prompt_blocks, decoder_blocks : list of int
            Block table of the transfer: equally many, at least one. An `array` or one-dimensional NumPy array of
            integers is an addition to the documented interface.
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
            An argument of the wrong type; a tuple of blocks is one.
        ValueError
            A block number or a number of the key is no uint64.
        LLMException
            LLM_PARAM_INVALID: wrong role, HOST cache, empty or unequal lists, or blocks or tensors that do not exist or
            do not fit. LLM_KV_CACHE_NOT_EXIST: the model has no blocks cache there, a block of the token was retired or
            published anew, or the local cache is deallocated. LLM_NOT_YET_LINK: no link. LLM_LINK_BUSY: the link is in
            use. LLM_WAIT_PROCESS_TIMEOUT: not finished within sync_kv_timeout, or the peer is gone.
        """
        if self._role is not _DECODER:
            raise self._wrong_role("pull_blocks", "DECODER")
        tensors = _ALL_TENSORS
        # As in pull_cache. The engine unpacks the block numbers, so it is left to it to find a wrong one.
        if not (
            type(prompt_cache_key) is BlocksCacheKey
            and prompt_cache_key._usable
            and type(decoder_kv_cache) is KvCache
            and decoder_kv_cache._cache_desc._placement is _DEVICE
            and type(prompt_blocks) is list
            and type(decoder_blocks) is list
            and prompt_blocks
            and len(prompt_blocks) == len(decoder_blocks)
            and (token is None or type(token) is bytes)
        ):
            tensors = check_pull_blocks(
                prompt_cache_key, decoder_kv_cache, prompt_blocks, decoder_blocks, token, kwargs
            )
        cache_id = decoder_kv_cache._cache_id if decoder_kv_cache._manager is self else CPU_CACHE_ID
        try:
            if kwargs:
                tensors = check_tensor_ranges(kwargs, decoder_kv_cache)
            key = prompt_cache_key
            self._engine.pull_blocks(
                key._cluster_id, key._name, cache_id, prompt_blocks, decoder_blocks, *tensors, token
            )
        except (TypeError, ValueError):
            # Of several wrong arguments the first in the documented order counts.
            check_pull_blocks(prompt_cache_key, decoder_kv_cache, prompt_blocks, decoder_blocks, token, kwargs)
            raise

    # ---- reading

    def get_cache_tensors(self, cache: KvCache, tensor_index: int = 0) -> list[Tensor]:
        """Give one tensor of a cache, without copying it.

        Parameters
        ----------
        cache : KvCache
            An allocated cache.
        tensor_index : int
            In ``[0, num_tensors)``.

        Returns
        -------
        list of Tensor
            One for each device, over the memory of the cache: they always show its present content, and they keep
            `cache` alive. Deallocating it ends their use.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            `tensor_index` is no int32.
        LLMException
            LLM_PARAM_INVALID: `tensor_index` names no tensor. LLM_KV_CACHE_NOT_EXIST: the cache is deallocated, or one
            of `KvCache.create_cpu_cache`.

        Examples
        --------
        >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
        >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
        >>> datadist.init({"ge.exec.deviceId": "0"})
        >>> cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
        >>> tensor = datadist.kv_cache_manager.get_cache_tensors(cache, tensor_index=1)[0]
        >>> tensor.numpy().shape
        (4, 128)
        >>> del tensor
        >>> datadist.finalize()
        """
        check_isinstance("cache", cache, KvCache, allow_none=False)
        check_int32("tensor_index", tensor_index)
        desc = cache.cache_desc
        if not 0 <= tensor_index < desc.num_tensors:
            raise InvalidArgument(f"tensor_index {tensor_index} is out of range, should be in [0, {desc.num_tensors})")
        tensor_desc = TensorDesc(desc.data_type, desc.shape)
        return [Tensor._over(memory, tensor_desc, cache) for memory in self._tensor_contents(cache, tensor_index)]

    # ---- for the instance and the handles

    def _close(self) -> None:
        """Take note that the instance is finalised."""
        self._initialized = False

    def _check_pool(self, placement: Placement) -> None:
        """Check that there is memory of a placement."""
        if placement is not _DEVICE:
            raise InvalidArgument(f"Only support allocate device cache, but placement is {placement}")

    def _drop(self, cache_id: int) -> None:
        """Give up the id of a cache whose handle has died; never blocks. A forked child owns no caches."""
        if self._initialized and self._pid == os.getpid():
            self._engine.deallocate_later(cache_id)

    def _wrong_role(self, function: str, right: str) -> InvalidArgument:
        return InvalidArgument(f"[{function}] is not supported by {self._role.name}, only by {right}")
