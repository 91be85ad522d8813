"""The call of `KvCacheManager` that sends a cache to decoders layer by layer."""

from __future__ import annotations

from llm_datadist.cache_task import CacheTask
from llm_datadist.engine.transfer_job import LayerTransfer
from llm_datadist.engine_access import EngineAccess
from llm_datadist.kv_cache import KvCache
from llm_datadist.layer_synchronizer import LayerSynchronizer
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument
from llm_datadist.transfer_arguments import check_transfer
from llm_datadist.transfer_config import TransferConfig


class TransferCall(EngineAccess):
    """Base of `KvCacheManager`, which sets the role."""

    _role: LLMRole

    def transfer_cache_async(
        self,
        src_cache: KvCache,
        layer_synchronizer: LayerSynchronizer,
        transfer_configs: list[TransferConfig] | tuple[TransferConfig, ...],
        src_block_indices: list[int] | tuple[int, ...] | None = None,
        dst_block_indices: list[int] | tuple[int, ...] | None = None,
        dst_block_memory_size: int | None = None,
    ) -> CacheTask:
        """Send a cache to decoders layer by layer, each layer as soon as the model has computed it. Role PROMPT.

        Returns at once. A thread asks the synchronizer for each layer that a config wants, in ascending order, and
        copies the layer to the addresses of these configs, in their order. The first failure ends the transfer. Keys
        are not touched, and decoders are not told.

        Parameters
        ----------
        src_cache : KvCache
            Cache to send: two tensors for each layer.
        layer_synchronizer : LayerSynchronizer
            Waits for the layers of the model.
        transfer_configs : list or tuple of TransferConfig
            Destinations, each with two addresses for each of its layers. A layer range that is None becomes the range
            of all layers.
        src_block_indices, dst_block_indices : list or tuple of int, optional
            Block table, uint64, equally many: block ``src_block_indices[i]`` goes to block ``dst_block_indices[i]``
            behind each address. Without them the slot `src_batch_index` of each config is sent.
        dst_block_memory_size : int, optional
            Bytes of a block at the destination, uint64; None and 0 mean those of the source, which it must be equal to.

        Returns
        -------
        CacheTask
            Gives one result for each config. LLM_SUCCESS: all its layers have arrived. LLM_PARAM_INVALID: the
            synchronizer reported a failure; the slot or a block does not exist; an address lies in no tensor of an
            allocated cache of the decoder, or bytes would run over its end; the block sizes differ.
            LLM_KV_CACHE_NOT_EXIST: the source is deallocated or in host memory. LLM_NOT_YET_LINK: no link.
            LLM_LINK_BUSY: the link is in use. LLM_WAIT_PROCESS_TIMEOUT: a layer was not sent within sync_kv_timeout, or
            the decoder is gone. LLM_FEATURE_NOT_ENABLED: several devices. LLM_FAILED: the synchronizer raised, or the
            instance was finalised. None: the transfer ended before.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A block number or the block size is no uint64.
        LLMException
            LLM_PARAM_INVALID: wrong role; blocks on one side only, or not equally many; a block size without blocks; an
            odd number of tensors; a config whose layers do not exist, whose number of addresses is wrong, or that names
            a slot beside blocks.
        """
        if self._role is not LLMRole.PROMPT:
            raise InvalidArgument(f"[transfer_cache_async] is not supported by {self._role.name}, only by PROMPT")
        destinations = check_transfer(
            src_cache, layer_synchronizer, transfer_configs, src_block_indices, dst_block_indices, dst_block_memory_size
        )
        transfer = LayerTransfer(
            self._engine_id(src_cache),
            destinations,
            list(src_block_indices) if src_block_indices else None,
            list(dst_block_indices) if dst_block_indices else None,
            dst_block_memory_size or 0,
        )
        return CacheTask(self._engine.transfer(transfer, layer_synchronizer.synchronize_layer, src_cache))
