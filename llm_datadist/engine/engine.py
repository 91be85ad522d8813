"""The engine: everything that one initialised instance owns, behind calls that take plain, checked values."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from llm_datadist._copy import enter_workers, leave_workers
from llm_datadist.arguments import UINT64_MAX
from llm_datadist.control.loop import ControlLoop
from llm_datadist.devices.base import SynchronizeLayer
from llm_datadist.engine.cache_pool import CachePool, Placed
from llm_datadist.engine.caches import CacheTable, PoolStatistics, slots_of_keys
from llm_datadist.engine.copy_threads import copy_threads
from llm_datadist.engine.device_choice import DeviceKind, choose_device, hccl_device, open_device
from llm_datadist.engine.failures import check_device_index, failure, invalid, no_cache
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link import ClusterAddress, Identity
from llm_datadist.engine.link_calls import LinkCalls, LinkResult
from llm_datadist.engine.link_client import LinkClient
from llm_datadist.engine.link_listener import LinkListener
from llm_datadist.engine.link_table import LinkDescription, LinkTable
from llm_datadist.engine.local_copies import LocalCopies
from llm_datadist.engine.members import Members
from llm_datadist.engine.mode_codes import CACHE_MANAGER_MODE, KV_MODE
from llm_datadist.engine.network import network
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from llm_datadist.engine.peer_link_calls import PeerLinkCalls
from llm_datadist.engine.process_mark import ProcessMark
from llm_datadist.engine.transfer_failures import TransferFailures
from llm_datadist.engine.transfer_job import LayerTransfer, TransferJob, TransferJobs
from llm_datadist.engine.transfers import Transfers
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode
from llm_datadist.transports.private_memory import let_peers_in
from llm_datadist.transports.rendezvous import host_identity

_SERVICE_SECONDS = 5.0  # for the threads of the data server, which end with their sockets
DEFAULT_POOL_BYTES = 1 << 30  # when ge.flowGraphMemMaxSize is not given; pages are taken only as caches need them


class Engine(Transfers):
    """One device's caches and this process's links.

    Parameters
    ----------
    options : EngineOptions
        Checked options.

    Raises
    ------
    LLMException
        The mode's code for no memory: the pool cannot be reserved. LLM_FAILED: the listen address cannot be bound.
        Nothing is left open.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.role = options.role
        self.is_open = True
        self._process = ProcessMark.current
        self._codes = KV_MODE if options.cache_manager is None else CACHE_MANAGER_MODE
        self._remote_access = options.cache_manager is not None and options.cache_manager.remote_access
        self._timeout_ms = options.sync_kv_timeout_ms
        self._timeout_s = options.sync_kv_timeout_ms / 1000
        self._timeout_ns = options.sync_kv_timeout_ms * 1_000_000
        self._failures = TransferFailures(self._codes, options.sync_kv_timeout_ms)
        self._jobs = TransferJobs(self._codes.timeout)
        self._copy_threads = copy_threads(options.copy_threads)
        kind = choose_device(options.device_backend)
        in_manager_mode = options.cache_manager is not None
        settings = network(options.network, on_ascend=kind is not DeviceKind.HOST, cache_manager=in_manager_mode)
        self._caches = _open_caches(options, kind)
        try:
            hccl = hccl_device(self._caches.device, self._timeout_ms, settings.transports)
            self._loop = ControlLoop()
        except BaseException:
            self._caches.close()
            raise
        enter_workers()
        if options.cache_manager is not None:
            let_peers_in()
        device = self._caches.device
        self._grants = Grants(self._caches, options.cache_manager is not None, summed=settings.summed, hccl=hccl)
        copier = device.copier(self._copy_threads)
        self._copies = LocalCopies(
            self._caches, self._timeout_ms, copier, self._codes.timeout, self._codes.out_of_memory
        )
        cache_manager = options.cache_manager
        identity = Identity(options.cluster_id, secrets.token_bytes(16), host_identity(), cache_manager is not None)
        self._links = LinkTable(self._loop, self._caches.forget_peer, identity, self._copy_threads)
        client = LinkClient(self._loop, identity, self._grants, settings)
        self._calls = LinkCalls(self._links, client)
        self._peer_calls = PeerLinkCalls(self._links, client, identity, cache_manager) if cache_manager else None
        members_options = cache_manager or CacheManagerOptions()
        self._members = Members(self._loop, identity, self._grants, self._links, members_options, settings)
        self._listener = LinkListener(self._loop, identity, self._grants, self._links, settings)
        self._may_switch = options.enable_switch_role
        self._may_move = cache_manager is None or not cache_manager.has_backend
        try:
            for address in options.listen:
                self._listener.listen(address)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End links, listening, caches and keys; may be called twice. Running calls end in an error."""
        if not self.is_open:
            return
        self.is_open = False
        if self._process is not ProcessMark.current:
            return  # a forked child: threads and sockets are the parent's
        self._jobs.close(self._timeout_s)  # no push takes longer
        self._loop.stop()
        self._listener.close()
        self._members.close()
        self._links.close()
        served = self._grants.close(_SERVICE_SECONDS)
        if self._copies.close() and served:
            self._caches.close()
            leave_workers()

    # ---- caches

    def allocate(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        keys: Sequence[KeyName | None] = (),
        blocks_model: int | None = None,
        cache_id: int = 0,
        host: bool = False,
    ) -> tuple[int, list[range]]:
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
        host : bool
            In the pool of host memory, in cache-manager mode.

        Returns
        -------
        cache_id : int
            From 1 on, never used again.
        addresses : list of range
            One range a device, one address a tensor.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a key is bound, or more keys than slots. The mode's code for no memory: no room.
        """
        call = "allocate_cache"
        self._require_open(call)
        bound = _bound(call, keys, slots, blocks_model)
        cache_id, addresses = self._caches.allocate(
            num_tensors, tensor_nbytes, slots, bound, self._timeout_s, cache_id, host
        )
        return cache_id, [addresses]

    def register(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        addresses: list[int],
        keys: Sequence[KeyName | None] = (),
        blocks_model: int | None = None,
        accessible: bool = True,
    ) -> int:
        """Take memory of the program as a cache; gives its id. Pulls never release its keys.

        Parameters
        ----------
        num_tensors, tensor_nbytes, slots, keys, blocks_model
            As in `allocate`.
        addresses : list of int
            One a tensor. Memory in a pool of the engine is recognised.
        accessible : bool
            Whether peers may touch the cache, when remote access is on; else they always may.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: not one address a tensor, an address that cannot be, a key that is bound, or more keys
            than slots. LLM_OUT_OF_MEMORY: too many caches.
        """
        call = "register_cache"
        self._require_open(call)
        if len(addresses) != num_tensors:
            raise invalid(call, f"{len(addresses)} addrs for {num_tensors} tensors, the numbers should be equal")
        for address in addresses:
            if not 0 < address <= UINT64_MAX - tensor_nbytes:
                raise invalid(call, f"address {address} is out of range, {tensor_nbytes} bytes do not lie there")
        bound = _bound(call, keys, slots, blocks_model)
        visible = accessible or not self._remote_access
        return self._caches.register(num_tensors, tensor_nbytes, slots, addresses, bound, visible)

    def unregister(self, cache_id: int) -> None:
        """Give registered memory back to the program; see `CacheTable.unregister`."""
        self._require_open("unregister_cache")
        self._caches.unregister(cache_id, time.monotonic() + self._timeout_s)

    def deallocate(self, cache_id: int) -> None:
        """Give up the id of a cache; its memory goes when no key and no transfer needs it."""
        self._require_open("deallocate_cache")
        self._caches.deallocate(cache_id)

    def deallocate_later(self, cache_id: int) -> None:
        """Give up an id from a destructor: never blocks, never raises."""
        if self.is_open and self._process is ProcessMark.current:
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
        return [self.memory(*found)]

    def tensor_contents(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        """Give what one tensor holds: its memory if the host can see it, else a copy; one view a device.

        Raises
        ------
        LLMException
            LLM_KV_CACHE_NOT_EXIST; the mode's code for a timeout, or LLM_FAILED: the device does not let it be copied.
        """
        self._require_open("get_cache_tensors")
        found = self._caches.tensor_range(cache_id, tensor_index)
        if found is None:
            raise no_cache("get_cache_tensors", cache_id)
        copied = self._caches.device.contents(*found, time.monotonic_ns() + self._timeout_ns)
        return [self.memory(*found) if copied is None else copied]

    def memory(self, address: int, nbytes: int) -> memoryview:
        """Give memory of this process as writable bytes; see `DevicePool.view`."""
        return self._caches.device.view(address, nbytes)

    def reserve_memory(self, nbytes: int, host: bool = False) -> int:
        """Give a range of the pool to the program; gives its address, a multiple of 512.

        Raises
        ------
        LLMException
            The mode's code for no memory: no room.
        """
        self._require_open("reserve_memory")
        return self._caches.reserve(nbytes, self._timeout_s, host)

    def release_memory(self, address: int) -> None:
        """Take back what `reserve_memory` gave; nothing happens once the engine is finalized."""
        if self.is_open and self._process is ProcessMark.current:
            self._caches.release_later(address)

    # ---- sealed blocks

    def publish_blocks(self, cache_id: int, blocks: list[int], lease_s: float | None = None) -> bytes:
        """Seal blocks of a cache under a new token; see `SealedBlocks.seal`. Raises LLM_KV_CACHE_NOT_EXIST too."""
        self._require_open("publish_blocks")
        return self._caches.seal_blocks(cache_id, blocks, lease_s)

    def retire_blocks(self, token: bytes) -> None:
        """Break the seals of a token: no pull with it succeeds that reads what is written from now on."""
        self._require_open("retire_blocks")
        self._caches.break_seals(token)

    def retire_expired(self, cache_id: int) -> list[int]:
        """Break the seals of a cache whose lease has run out; gives the blocks."""
        self._require_open("retire_expired")
        return self._caches.break_expired_seals(cache_id)

    def statistics(self) -> PoolStatistics:
        """Tell the level of the pool."""
        self._require_open("statistics")
        return self._caches.statistics()

    # ---- layer-wise transfers

    def transfer(self, transfer: LayerTransfer, synchronize_layer: SynchronizeLayer, source: object) -> TransferJob:
        """Begin to send a cache layer by layer in the background; see ``KvCacheManager.transfer_cache_async``.

        `source` is the handle of the cache; it is kept alive until the transfer has ended.
        """
        self._require_open("transfer_cache_async")
        synchronize_layer = self._caches.device.in_order(synchronize_layer, self._timeout_s)
        return self._jobs.start(transfer, synchronize_layer, self.push_layer, source)

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

    def copy_range(
        self,
        call: str,
        cache_id: int,
        tensor_index: int,
        device_index: int,
        offset: int,
        host: int,
        nbytes: int,
        into_cache: bool,
    ) -> None:
        """Copy bytes between a tensor on the one device and host memory; see `LocalCopies.copy_range`."""
        self._require_open(call)
        check_device_index(call, device_index, 1)
        self._copies.copy_range(call, cache_id, tensor_index, offset, host, nbytes, into_cache)

    # ---- links

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int) -> LinkResult:
        """Link to remote clusters; see ``LLMDataDist.link_clusters``."""
        self._require_open("link_clusters")
        if self._peer_calls is not None:
            return self._peer_calls.link(clusters, timeout_ms, self.role)
        return self._calls.link(clusters, timeout_ms, self.role, num_devices=1)

    def unlink(self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool) -> LinkResult:
        """Take links down; see ``LLMDataDist.unlink_clusters``."""
        self._require_open("unlink_clusters")
        if self._peer_calls is not None:
            return self._peer_calls.unlink(clusters, timeout_ms, force)
        return self._calls.unlink(clusters, timeout_ms, force, self.role, num_devices=1)

    def switch_role(self, role: LLMRole, listen: tuple[str, int] | None) -> None:
        """Take another role; caches and keys stay. See ``LLMDataDist.switch_role``.

        Parameters
        ----------
        role : LLMRole
            Another one than now; in cache-manager mode any.
        listen : (str, int) or None
            Where to listen from now on: a PROMPT, or any role in cache-manager mode.

        Raises
        ------
        LLMException
            LLM_FEATURE_NOT_ENABLED, LLM_EXIST_LINK, LLM_PROCESSING_LINK; LLM_FAILED: the address cannot be bound. The
            role stays as it was then.
        """
        call = "switch_role"
        self._require_open(call)
        if self._peer_calls is not None:
            self._listener.move(call, listen, may_change=self._may_move)
            self.role = role
            return
        if not self._may_switch:
            reason = "set enable_switch_role (llm.EnableSwitchRole) at init"
            raise failure(call, LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)
        self._calls.exclude(call, lambda: self._listener.move(call, listen))
        self.role = role

    def check_link(self, remote_cluster_id: int) -> None:
        """Ask the peer whether a link is whole; see ``LLMDataDist.check_link_status``."""
        call = "check_link_status"
        self._require_open(call)
        if self.role is not LLMRole.DECODER:
            raise invalid(call, f"[{call}] is not supported by {self.role}")
        self._calls.check(remote_cluster_id, self._timeout_ms)

    def link_members(self, name: str, members: dict[int, int], rank_table: str) -> int:
        """Join a communicator of clusters and their ranks; gives its id at once. See `Members.link`."""
        self._require_open("link")
        return self._members.link(name, members, rank_table)

    def member_status(self, communicator: int) -> int:
        """Tell how far a communicator is: 0 complete, 1 preparing, 2 failed. See `Members.status`."""
        self._require_open("query_register_mem_status")
        return int(self._members.status(communicator))

    def unlink_members(self, communicator: int) -> None:
        """Leave a communicator. See `Members.unlink`."""
        self._require_open("unlink")
        self._members.unlink(communicator)

    @property
    def has_members(self) -> bool:
        """Whether this process was ever a member of a communicator."""
        return self._members.were_linked

    def describe_links(self) -> list[LinkDescription]:
        """List all links."""
        self._require_open("describe_links")
        return self._links.describe()

    def _require_open(self, call: str) -> None:
        if not self.is_open or self._process is not ProcessMark.current:
            reason = "the engine is finalized" if not self.is_open else "the engine belongs to the process that forked"
            raise failure(call, LLMStatusCode.LLM_FAILED, reason)


def _open_caches(options: EngineOptions, kind: DeviceKind) -> CacheTable:
    """Reserve the memory of an engine, with nothing in it."""
    mode = options.cache_manager
    if mode is None:
        nbytes, host_nbytes = DEFAULT_POOL_BYTES if options.pool_bytes is None else options.pool_bytes, 0
        pool = CachePool(nbytes, options.buf_pool_classes)
        writable = options.role is LLMRole.DECODER or options.enable_switch_role
    else:
        nbytes, host_nbytes = mode.device_pool_bytes, mode.host_pool_bytes
        device = Placed(nbytes, mode.device_page_bytes)
        host = Placed(host_nbytes, mode.host_page_bytes)
        pool = CachePool(max(nbytes + host_nbytes, 1), device=device, host=host)
        writable = True
    codes = KV_MODE if mode is None else CACHE_MANAGER_MODE
    try:
        device_pool = open_device(kind, options.device_ids[0], nbytes, host_nbytes, peers_write=writable)
    except LLMException as error:
        if error.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY:
            raise failure("init", codes.out_of_memory, str(error)) from error
        raise
    try:
        return CacheTable(device_pool, pool, codes)
    except BaseException:
        device_pool.close()
        raise


def _bound(call: str, keys: Sequence[KeyName | None], slots: int, blocks_model: int | None) -> dict[KeyName, int]:
    """Say which keys a new cache is bound to, and the slot that each names."""
    if len(keys) > slots:
        raise invalid(call, f"{len(keys)} cache_keys for {slots} slots, at most one key a slot")
    bound = slots_of_keys(keys) if keys else {}
    if blocks_model is not None:
        bound[(int(KeyKind.BLOCKS), 0, blocks_model)] = 0
    return bound
