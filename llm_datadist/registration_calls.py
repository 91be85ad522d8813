"""The calls of `CacheManager` about memory that the program owns."""

from __future__ import annotations

from llm_datadist.allocation_arguments import blocks_model, check_num_tensors, check_tensor_nbytes, key_names
from llm_datadist.arguments import check_int64
from llm_datadist.cache import Cache
from llm_datadist.cache_desc import CacheDesc
from llm_datadist.cache_keys import BlocksCacheKey, CacheKey
from llm_datadist.cache_manager_access import CacheManagerAccess
from llm_datadist.memory_info import MemInfo
from llm_datadist.registration_arguments import (
    accessible,
    check_addresses,
    check_registered_types,
    check_remapped,
)


class RegistrationCalls(CacheManagerAccess):
    """Base of `CacheManager`."""

    def register_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        cache_keys: tuple[CacheKey, ...] | list[CacheKey] = (),
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make memory of the program a cache, so that it can be pulled, pushed and pulled into.

        Parameters
        ----------
        cache_desc : CacheDesc
            What lies there: tensors of 1 to 31 positive dimensions, each without gaps.
        addrs : list of int
            Address of each tensor. The program keeps the memory alive until it has unregistered it. Any number of
            addresses is possible; those of `llm_datadist.pool_tensors` are recognised and move fastest.
        cache_keys : tuple or list of CacheKey
            Key i names slot i, as in `allocate_cache`. Pulls never release them.
        remote_accessible : bool, optional
            Whether peers may reach it: by default DEVICE yes and HOST no, and neither after `LLMDataDist.link`.

        Returns
        -------
        Cache
            Held until `unregister_cache`.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An address is no uint64.
        LLMException
            LLM_PARAM_INVALID: `remote_accessible` is True after `LLMDataDist.link`, there is not one address for each
            tensor, an address is 0, a shape that cannot be, more keys than slots, or a key that is given twice or bound
            already.

        Examples
        --------
        >>> import numpy as np
        >>> from llm_datadist import CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
        >>> config = LLMConfig()
        >>> config.enable_cache_manager = True
        >>> datadist = LLMDataDist(LLMRole.PROMPT, cluster_id=1)
        >>> datadist.init(config.generate_options())
        >>> tensors = [np.zeros((4, 128), np.float16) for _ in range(2)]
        >>> desc = CacheDesc(2, (4, 128), DataType.DT_FLOAT16)
        >>> cache = datadist.cache_manager.register_cache(desc, [tensor.ctypes.data for tensor in tensors])
        >>> cache.tensor_addrs == [tensor.ctypes.data for tensor in tensors]
        True
        >>> datadist.cache_manager.unregister_cache(cache.cache_id)
        >>> datadist.finalize()
        """
        check_registered_types(cache_desc, addrs, "cache_keys", cache_keys, [list, tuple], CacheKey, remote_accessible)
        reachable = accessible(cache_desc.placement, remote_accessible, self._engine.has_members)
        check_addresses(addrs, cache_desc.num_tensors)
        nbytes = check_tensor_nbytes(cache_desc)
        slots = cache_desc.shape[0]
        cache_id = self._engine.register(
            cache_desc.num_tensors,
            nbytes,
            slots,
            list(addrs),
            keys=key_names(cache_keys, slots, unique=True),
            accessible=reachable,
        )
        return Cache(cache_id, cache_desc, list(addrs), self, is_registered=True, is_blocks_cache=False)

    def register_blocks_cache(
        self,
        cache_desc: CacheDesc,
        addrs: list[int],
        blocks_cache_key: BlocksCacheKey | None = None,
        remote_accessible: bool | None = None,
    ) -> Cache:
        """Make memory of the program a blocks cache: dimension 0 counts the blocks.

        Parameters
        ----------
        cache_desc : CacheDesc
            What lies there: tensors of 1 to 31 positive dimensions, each without gaps.
        addrs : list of int
            Address of each tensor, as in `register_cache`.
        blocks_cache_key : BlocksCacheKey, optional
            Name for peers, one cache for each model.
        remote_accessible : bool, optional
            Whether peers may reach it, as in `register_cache`.

        Returns
        -------
        Cache
            Held until `unregister_cache`.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            An address or a number of the key is no uint64.
        LLMException
            LLM_PARAM_INVALID: `remote_accessible` is True after `LLMDataDist.link`, there is not one address for each
            tensor, an address is 0, a shape that cannot be, or the model has a blocks cache already.
        """
        check_registered_types(
            cache_desc, addrs, "blocks_cache_key", blocks_cache_key, BlocksCacheKey, None, remote_accessible
        )
        reachable = accessible(cache_desc.placement, remote_accessible, self._engine.has_members)
        check_addresses(addrs)
        check_num_tensors(cache_desc)
        model_id = blocks_model(blocks_cache_key)
        nbytes = check_tensor_nbytes(cache_desc)
        cache_id = self._engine.register(
            cache_desc.num_tensors,
            nbytes,
            cache_desc.shape[0],
            list(addrs),
            blocks_model=model_id,
            accessible=reachable,
        )
        return Cache(cache_id, cache_desc, list(addrs), self, is_registered=True, is_blocks_cache=True)

    def unregister_cache(self, cache_id: int) -> None:
        """Give memory back to the program: when this returns, no transfer touches it any more.

        Parameters
        ----------
        cache_id : int
            Id of a registered cache, int64; an unknown one is a success.

        Raises
        ------
        TypeError
            `cache_id` is no int.
        ValueError
            `cache_id` is no int64.
        LLMException
            LLM_TIMEOUT: a transfer did not end within sync_kv_timeout, the memory is still in use.
        """
        self._engine.unregister(check_int64("cache_id", cache_id))

    def remap_registered_memory(self, mem_infos: MemInfo | list[MemInfo]) -> None:
        """Check ranges of device memory; nothing has to be done for them on a host.

        Parameters
        ----------
        mem_infos : MemInfo or list of MemInfo
            Ranges of registered device memory.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: something else than a MemInfo, host memory, an address that is 0, or a size that is not
            positive.
        """
        check_remapped(mem_infos)
