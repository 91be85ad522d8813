"""The call of `CacheManager` that sends a cache to peers layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.cache import Cache
from llm_datadist.cache_manager_access import CacheManagerAccess
from llm_datadist.cache_task import CacheTask
from llm_datadist.cache_transfer_arguments import check_cache_transfer
from llm_datadist.engine.transfer_job import LayerTransfer
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.transfer_config import TransferConfig, TransferWithCacheKeyConfig


class CacheTransferCall(CacheManagerAccess):
    """Base of `CacheManager`."""

    def transfer_cache_async(
        self,
        src_cache: Cache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: Sequence[TransferConfig] | Sequence[TransferWithCacheKeyConfig],
        src_block_indices: list[int] | tuple[int, ...] | None = None,
        dst_block_indices: list[int] | tuple[int, ...] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Send a cache to peers layer by layer, each layer as soon as the model has computed it.

        Returns at once. A thread asks the synchronizer for each layer that a config wants, in ascending order, and
        copies the layer to the destinations of these configs, in their order. The first failure ends the transfer.
        Source keys are not touched, and peers are not told.

        Parameters
        ----------
        src_cache : Cache
            Device cache to send: two tensors for each layer.
        layer_synchronizer : LayerSynchronizer
            Waits for the layers of the model.
        transfer_configs : list or tuple
            Destinations. With ``enable_remote_cache_accessible`` of type TransferWithCacheKeyConfig: layer i of
            `src_layer_range` goes to layer i of `dst_layer_range` of the cache that the key names. Without it of type
            TransferConfig: each has two addresses for each of its layers, and a layer range that is None becomes the
            range of all layers.
        src_block_indices, dst_block_indices : list or tuple of int, optional
            Block table, uint64, equally many: block ``src_block_indices[i]`` goes to block ``dst_block_indices[i]`` of
            the cache of a BlocksCacheKey, or behind each address. Without source blocks the slot `src_batch_index` of
            each config is sent: as it is, or, with destination blocks, cut into blocks of `dst_block_memory_size`.
        dst_block_memory_size : int, optional
            Bytes of a block at the destination, uint64. With source blocks None and 0 mean those of the source, which
            it must be equal to.

        Returns
        -------
        CacheTask
            Gives one result for each config, as described in `KvCacheManager.transfer_cache_async`, with LLM_TIMEOUT
            for a layer that was not sent within sync_kv_timeout and for a task that still runs.
            LLM_KV_CACHE_NOT_EXIST: also a key that names no cache that peers may reach.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A block number, the block size or a number of a key is no uint64.
        LLMException
            LLM_PARAM_INVALID: HOST cache; source blocks alone, or not equally many; no block size for a slot that is to
            be cut, or one without blocks; an odd number of tensors; a config whose layers do not exist or are not
            equally many, whose number of addresses is wrong, that names a slot beside blocks, or whose key is of the
            wrong kind.
        """
        destinations = check_cache_transfer(
            src_cache,
            layer_synchronizer,
            transfer_configs,
            src_block_indices,
            dst_block_indices,
            dst_block_memory_size,
            by_key=self._remote_access,
        )
        transfer = LayerTransfer(
            self._engine_id(src_cache),
            destinations,
            list(src_block_indices) if src_block_indices else None,
            list(dst_block_indices) if dst_block_indices else None,
            dst_block_memory_size or 0,
        )
        return CacheTask(self._engine.transfer(transfer, layer_synchronizer.synchronize_layer, src_cache))
