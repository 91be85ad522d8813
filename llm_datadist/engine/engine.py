"""The engine: everything that one initialised instance owns, behind calls that take plain, checked values."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence

from llm_datadist._core import TransferFault
from llm_datadist._local import block_pairs
from llm_datadist.control.loop import ControlLoop
from llm_datadist.devices.host import HostPool
from llm_datadist.engine.caches import CacheTable, PoolStatistics, slots_of_keys
from llm_datadist.engine.failures import failure, invalid, no_cache, push_failure, transfer_failure
from llm_datadist.engine.geometry import TensorRange, local_blocks, local_slot, local_tensors, slot_bytes
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.link_calls import LinkCalls, LinkResult
from llm_datadist.engine.link_client import Identity, LinkClient
from llm_datadist.engine.link_server import LinkServer
from llm_datadist.engine.link_table import LinkDescription, LinkTable
from llm_datadist.engine.local_copies import LocalCopies
from llm_datadist.engine.options import EngineOptions
from llm_datadist.engine.transfer_job import LayerTransfer, SynchronizeLayer, TransferJob, TransferJobs
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports.rendezvous import host_identity
from llm_datadist.transports.shared_memory import SharedMemoryGrant

DEFAULT_POOL_BYTES = 1 << 30  # when ge.flowGraphMemMaxSize is not given; pages are taken only as caches need them

_ALL = -1  # a count of remote tensors: the puller takes as many as there are


class Engine:
    """One device's caches and this process's links.

    Parameters
    ----------
    options : EngineOptions
        Checked options.

    Raises
    ------
    LLMException
        LLM_DEVICE_OUT_OF_MEMORY: the pool cannot be reserved. LLM_FAILED: the listen address cannot be bound.
        Nothing is left open.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.role = options.role
        self.is_open = True
        self._pid = os.getpid()
        self._timeout_ms = options.sync_kv_timeout_ms
        self._timeout_s = options.sync_kv_timeout_ms / 1000
        self._timeout_ns = options.sync_kv_timeout_ms * 1_000_000
        self._transfers = TransferJobs()
        pool = HostPool(
            DEFAULT_POOL_BYTES if options.pool_bytes is None else options.pool_bytes,
            peers_may_write=options.role is LLMRole.DECODER or options.enable_switch_role,
        )
        try:
            self._caches = CacheTable(pool, options.buf_pool_classes)
        except BaseException:
            pool.close()
            raise
        try:
            self._loop = ControlLoop()
        except BaseException:
            self._caches.close()
            raise
        self._copies = LocalCopies(self._caches, self._timeout_ms)
        identity = Identity(options.cluster_id, secrets.token_bytes(16), host_identity())
        self._links = LinkTable(self._loop, self._caches.forget_peer)
        self._calls = LinkCalls(self._links, LinkClient(self._loop.context, identity, self._grant))
        self._identity = identity
        self._may_switch = options.enable_switch_role
        self._server: LinkServer | None = None
        try:
            for host, port in options.listen:
                self._server = self._listen(host, port)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End links, listening, caches and keys; may be called twice. Running calls end in an error."""
        if not self.is_open:
            return
        self.is_open = False
        if os.getpid() != self._pid:
            return  # a forked child: threads and sockets are the parent's
        self._transfers.close(self._timeout_s)  # no push takes longer
        self._loop.stop()
        if self._server is not None:
            self._server.close()
        self._links.close()
        if self._copies.close():
            self._caches.close()

    # ---- caches

    def allocate(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        keys: Sequence[KeyName | None] = (),
        blocks_model: int | None = None,
        cache_id: int = 0,
    ) -> tuple[int, list[list[int]]]:
        """Allocate a cache and bind its keys, all or nothing.

        Parameters
        ----------
        num_tensors, tensor_nbytes, slots : int
            Number of tensors, bytes of each, slots of each; all > 0.
        keys : sequence of KeyName or None
            Key of each slot.
        blocks_model : int or None
            Model whose blocks cache this is; None for a cache without that key.
        cache_id : int
            Id of the cache, above all earlier ones; 0 = the next one.

        Returns
        -------
        cache_id : int
            From 1 on, never used again.
        addresses : list of list of int
            One list a device, one address a tensor.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a key is bound, or more keys than slots. LLM_DEVICE_OUT_OF_MEMORY: no room.
        """
        self._require_open("allocate_cache")
        if len(keys) > slots:
            raise invalid("allocate_cache", f"{len(keys)} cache_keys for {slots} slots, at most one key a slot")
        bound = slots_of_keys(keys)
        if blocks_model is not None:
            bound[(int(KeyKind.BLOCKS), 0, blocks_model)] = 0
        deadline = time.monotonic() + self._timeout_s
        cache_id, addresses = self._caches.allocate(num_tensors, tensor_nbytes, slots, bound, deadline, cache_id)
        return cache_id, [addresses]

    def deallocate(self, cache_id: int) -> None:
        """Give up the id of a cache; its memory goes when no key and no transfer needs it."""
        self._require_open("deallocate_cache")
        self._caches.deallocate(cache_id)

    def deallocate_later(self, cache_id: int) -> None:
        """Give up an id from a destructor: never blocks, never raises."""
        if self.is_open and os.getpid() == self._pid:
            self._caches.deallocate_later(cache_id)

    def remove_key(self, key: KeyName) -> None:
        """Unbind a key; unknown keys are ignored."""
        self._require_open("remove_cache_key")
        self._caches.remove_key(key)

    def tensor_memory(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        """Give one tensor as writable bytes, one view a device; raises LLM_KV_CACHE_NOT_EXIST."""
        self._require_open("get_cache_tensors")
        found = self._caches.tensor_range(cache_id, tensor_index)
        if found is None:
            raise no_cache("get_cache_tensors", cache_id)
        return [self._caches.device.memory(*found)]

    def statistics(self) -> PoolStatistics:
        """Tell the level of the pool."""
        self._require_open("statistics")
        return self._caches.statistics()

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
        cache = self._caches.by_id.get(cache_id)
        if cache is None:
            raise no_cache(call, cache_id)
        local_slot(call, cache, batch_index)
        dst_first, dst_count = local_tensors(call, cache, dst_tensors)
        size = slot_bytes(call, cache, dst_offset, size)
        puller = self._links.puller(call, cluster_id)
        kind, number, third = key
        by_id = kind == KeyKind.CACHE
        src_first, src_count = (0, _ALL) if src_tensors is None else src_tensors
        try:
            puller.pull_cache(
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
            raise transfer_failure(call, cluster_id, _key_text(key), cache, fault, self._timeout_ms) from None

    def pull_blocks(
        self,
        cluster_id: int,
        model_id: int,
        cache_id: int,
        src_blocks: list[int],
        dst_blocks: list[int],
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
    ) -> None:
        """Copy block ``src_blocks[i]`` of a remote blocks cache into block ``dst_blocks[i]`` of a local cache.

        Raises
        ------
        ValueError
            A block number is negative or beyond uint64.
        LLMException
            The codes of ``KvCacheManager.pull_blocks``.
        """
        call = "pull_blocks"
        self._require_open(call)
        pairs = block_pairs(src_blocks, dst_blocks)
        cache = self._caches.by_id.get(cache_id)
        if cache is None:
            raise no_cache(call, cache_id)
        local_blocks(call, cache, pairs)
        dst_first, dst_count = local_tensors(call, cache, dst_tensors)
        puller = self._links.puller(call, cluster_id)
        src_first, src_count = (0, _ALL) if src_tensors is None else src_tensors
        try:
            puller.pull_blocks(
                cache,
                model_id,
                pairs,
                src_first,
                src_count,
                dst_first,
                dst_count,
                time.monotonic_ns() + self._timeout_ns,
            )
        except TransferFault as fault:
            key = f"the blocks key of model {model_id}"
            raise transfer_failure(call, cluster_id, key, cache, fault, self._timeout_ms) from None

    # ---- pushes

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
    ) -> None:
        """Copy the tensors of one layer to addresses in a decoder's process.

        Parameters
        ----------
        cluster_id : int
            The decoder, which has linked to this process.
        cache_id : int
            Local cache.
        tensors : (int, int)
            First tensor and number of tensors.
        addresses : list of int
            One a tensor: where its slot goes, or where the destination's tensor starts when blocks are given.
        src_slot : int or None
            Local slot; not used when blocks are given.
        src_blocks, dst_blocks : list of int or None
            Block table: both or none.
        block_nbytes : int
            Bytes of a destination block; 0 = those of a source block.

        Raises
        ------
        LLMException
            LLM_KV_CACHE_NOT_EXIST, LLM_PARAM_INVALID, LLM_NOT_YET_LINK, LLM_WAIT_PROCESS_TIMEOUT.
        """
        call = "transfer_cache_async"
        self._require_open(call)
        pairs = None if src_blocks is None or dst_blocks is None else block_pairs(src_blocks, dst_blocks)
        cache = self._caches.by_id.get(cache_id)
        if cache is None:
            raise no_cache(call, cache_id)
        if pairs is not None and block_nbytes not in (0, cache.stride):
            reason = f"dst_block_memory_size is {block_nbytes}, a source block has {cache.stride} bytes"
            raise invalid(call, reason)
        pusher = self._links.pusher(call, cluster_id)
        deadline_ns = time.monotonic_ns() + self._timeout_ns
        try:
            first, count = tensors
            if count != len(addresses):
                raise invalid(call, f"{len(addresses)} addresses for {count} tensors")
            pusher.push(cache, first, addresses, src_slot or 0, pairs, deadline_ns)
        except TransferFault as fault:
            raise push_failure(call, cluster_id, cache, fault, self._timeout_ms) from None

    def transfer(self, transfer: LayerTransfer, synchronize_layer: SynchronizeLayer, source: object) -> TransferJob:
        """Begin to send a cache layer by layer in the background; see ``KvCacheManager.transfer_cache_async``.

        `source` is the handle of the cache; it is kept alive until the transfer has ended.
        """
        self._require_open("transfer_cache_async")
        return self._transfers.start(transfer, synchronize_layer, self.push_layer, source)

    # ---- copies inside the process

    def copy_cache(
        self, dst_cache_id: int, src_cache_id: int, dst_slot: int, src_slot: int, offset: int, size: int
    ) -> None:
        """Copy one slot, or a part of it, into a slot of a local cache; see `LocalCopies.copy_cache`."""
        self._require_open("copy_cache")
        self._copies.copy_cache(dst_cache_id, src_cache_id, dst_slot, src_slot, offset, size)

    def copy_blocks(self, cache_id: int, src_blocks: list[int], dst_blocks: list[int]) -> None:
        """Copy blocks inside a local cache, one pair after the other; see `LocalCopies.copy_blocks`."""
        self._require_open("copy_blocks")
        self._copies.copy_blocks(cache_id, src_blocks, dst_blocks)

    def swap_blocks(
        self,
        cache_id: int,
        host_addresses: list[list[int]],
        block_nbytes: int,
        src_blocks: list[int],
        dst_blocks: list[int],
        swap_in: bool,
    ) -> None:
        """Copy blocks between a local cache and host memory; see `LocalCopies.swap_blocks`.

        `host_addresses` has one list, for the one device.
        """
        self._require_open("swap_blocks")
        self._copies.swap_blocks(cache_id, host_addresses[0], block_nbytes, src_blocks, dst_blocks, swap_in)

    # ---- links

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int) -> LinkResult:
        """Link to remote clusters; see ``LLMDataDist.link_clusters``."""
        self._require_open("link_clusters")
        return self._calls.link(clusters, timeout_ms, self.role, num_devices=1)

    def unlink(self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool) -> LinkResult:
        """Take links down; see ``LLMDataDist.unlink_clusters``."""
        self._require_open("unlink_clusters")
        return self._calls.unlink(clusters, timeout_ms, force, self.role, num_devices=1)

    def switch_role(self, role: LLMRole, listen: tuple[str, int] | None) -> None:
        """Take another role; caches and keys stay. See ``LLMDataDist.switch_role``.

        Parameters
        ----------
        role : LLMRole
            Another one than now.
        listen : (str, int) or None
            Where a PROMPT listens.

        Raises
        ------
        LLMException
            LLM_FEATURE_NOT_ENABLED, LLM_EXIST_LINK, LLM_PROCESSING_LINK; LLM_FAILED: the address cannot be bound. The
            role stays as it was then.
        """
        call = "switch_role"
        self._require_open(call)
        if not self._may_switch:
            reason = "set enable_switch_role (llm.EnableSwitchRole) at init"
            raise failure(call, LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)
        self._calls.exclude(call, lambda: self._switch(call, role, listen))

    def _switch(self, call: str, role: LLMRole, listen: tuple[str, int] | None) -> None:
        # Links are accepted in the control thread: seen from there, none can appear between the look and the switch.
        def leave() -> None:
            if len(self._links):
                reason = f"{len(self._links)} links exist, unlink them all first"
                raise failure(call, LLMStatusCode.LLM_EXIST_LINK, reason)
            if self._server is not None:
                self._server.close()

        try:
            self._loop.ask(leave)
        except TimeoutError as error:
            raise failure(call, LLMStatusCode.LLM_FAILED, str(error)) from error
        if self._server is not None:
            self._server.wait_until_closed()
            self._server = None
        if listen is not None:
            self._server = self._listen(*listen)
        self.role = role

    def _listen(self, host: str, port: int) -> LinkServer:
        server = LinkServer(self._loop, self._identity, self._grant, self._links)
        server.start(host, port)
        return server

    def check_link(self, remote_cluster_id: int) -> None:
        """Ask the peer whether a link is whole; see ``LLMDataDist.check_link_status``."""
        call = "check_link_status"
        self._require_open(call)
        if self.role is not LLMRole.DECODER:
            raise invalid(call, f"[{call}] is not supported by {self.role}")
        self._calls.check(remote_cluster_id, self._timeout_ms)

    def describe_links(self) -> list[LinkDescription]:
        """List all links."""
        self._require_open("describe_links")
        return self._links.describe()

    def _grant(self, peer_writes: bool) -> SharedMemoryGrant:
        caches = self._caches
        return SharedMemoryGrant(caches.device.segment, caches.directory, caches.lock, peer_writes=peer_writes)

    def _require_open(self, call: str) -> None:
        if not self.is_open or os.getpid() != self._pid:
            reason = "the engine is finalized" if not self.is_open else "the engine belongs to the process that forked"
            raise failure(call, LLMStatusCode.LLM_FAILED, reason)


def _key_text(key: KeyName) -> str:
    kind, number, third = key
    if kind == KeyKind.CACHE:
        return f"cache id {number}, batch index {third}"
    return f"{KeyKind(kind).name.lower()} key {number} of model {third}"
