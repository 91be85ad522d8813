"""The caches and keys of this process: who holds what, and when memory goes back to the pool.

A cache is held by its id and by each bound key. Peers see both through the directory; they may release an ordinary key
by pulling it, which this table learns from the directory's hints with its next operation. Memory that a peer or a local
transfer still uses when the last holder goes is *retired*: hidden, and freed as soon as nobody uses it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from llm_datadist._directory import Directory, DirectoryFull
from llm_datadist._local import LocalCache
from llm_datadist.devices.base import DevicePool
from llm_datadist.engine.cache_pool import CachePool, CachePoolExhausted, Extent
from llm_datadist.engine.failures import failure, invalid, no_cache
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.mode_codes import KV_MODE, ModeCodes
from llm_datadist.engine.sealed_blocks import SealedBlocks
from llm_datadist.status import LLMException

_RETIRED_POLL_SECONDS = 0.0005
_BLOCKS = int(KeyKind.BLOCKS)


class PoolStatistics(NamedTuple):
    """Level of the memory pool of this process.

    Attributes
    ----------
    capacity, used, free, largest_free : int
        Bytes; `largest_free` is the largest free range, of the size class that has it if there are several.
    caches, keys : int
        Caches whose memory is held, and keys bound to them.
    """

    capacity: int
    used: int
    free: int
    largest_free: int
    caches: int
    keys: int


class _Held:
    """One cache whose memory is not free."""

    __slots__ = ("entries", "entry", "id_held", "keys", "local", "offset")

    def __init__(self, local: LocalCache, offset: int | None, entry: int) -> None:
        self.local = local
        self.offset = offset  # in the pool; None: memory of the program
        self.entry = entry  # of the cache's id in the directory
        self.entries = [entry]  # all that go back to the directory together with the memory
        self.keys: dict[KeyName, int] = {}
        self.id_held = True


class CacheTable:
    """All caches and keys of one device.

    Parameters
    ----------
    device : DevicePool
        The device's memory; the table closes it.
    pool : CachePool
        Says where in it caches go.
    codes : ModeCodes
        Of the engine's mode.

    Attributes
    ----------
    by_id : dict of int to LocalCache
        Caches whose id is held. Read without the lock by transfers.
    lock : threading.Lock
        Guards the directory and everything in here.
    """

    def __init__(self, device: DevicePool, pool: CachePool, codes: ModeCodes = KV_MODE) -> None:
        self.device = device
        self.directory = Directory(device.capacity, device.address)
        self.lock = threading.Lock()
        self.by_id: dict[int, LocalCache] = {}
        self._codes = codes
        self._pool = pool
        self._seals = SealedBlocks(self.directory)
        self._held: dict[int, _Held] = {}
        self._keys: dict[KeyName, _Held] = {}
        self._key_of_entry: dict[int, KeyName] = {}
        self._retired: list[_Held] = []
        self._dropped: deque[int] = deque()  # ids given up by destructors
        self._released: deque[int] = deque()  # offsets of memory of the program given up by destructors
        self._last_id = 0

    # ---- holders

    def allocate(
        self,
        tensors: int,
        tensor_nbytes: int,
        slots: int,
        keys: dict[KeyName, int],
        timeout_s: float,
        cache_id: int = 0,
        on_host: bool = False,
    ) -> tuple[int, range]:
        """Allocate a cache and bind its keys, all or nothing.

        Parameters
        ----------
        tensors, tensor_nbytes, slots : int
            Number of tensors, bytes of each, slots of each; all > 0.
        keys : dict of KeyName to int
            Key and the slot that it names.
        timeout_s : float
            How long to wait for retired memory.
        cache_id : int
            Id of the cache, above all earlier ones; 0 = the next one.
        on_host : bool
            In the pool for the placement HOST.

        Returns
        -------
        cache_id : int
        addresses : range
            One a tensor.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a key is bound already. The mode's code for no memory: no room.
        """
        with self.lock:
            self._settle()
            for key in keys:
                if key in self._keys:
                    raise _key_is_bound(key)
            cache_id = self._last_id = cache_id or self._last_id + 1
            offset, step = self._take(tensors, tensor_nbytes, timeout_s, on_host)
            first = self.device.address_of(offset)
            local = LocalCache(cache_id, first, step, tensor_nbytes, tensor_nbytes // slots, tensors, slots)
            try:
                self.device.prepare(offset, step * tensors)
                self._publish(local, offset, keys, self._scattered(local))
            except (DirectoryFull, OSError) as error:
                self._pool.free(offset)
                raise failure("allocation", self._codes.out_of_memory, str(error)) from error
        return cache_id, range(first, first + tensors * step, step)

    def register(
        self,
        tensors: int,
        tensor_nbytes: int,
        slots: int,
        addresses: list[int],
        keys: dict[KeyName, int],
        accessible: bool,
    ) -> int:
        """Take memory of the program as a cache and bind its keys, all or nothing; gives the id.

        Parameters
        ----------
        tensors, tensor_nbytes, slots : int
            Number of tensors, bytes of each, slots of each; all > 0.
        addresses : list of int
            One a tensor, in the pool or anywhere else in the process.
        keys : dict of KeyName to int
            Key and the slot that it names; pulls never release them.
        accessible : bool
            Whether peers may touch the cache.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a key is bound already. The mode's code for no memory: too many caches.
        """
        with self.lock:
            self._settle()
            for key in keys:
                if key in self._keys:
                    raise _key_is_bound(key)
            cache_id = self._last_id = self._last_id + 1
            local = LocalCache(cache_id, 0, 0, tensor_nbytes, tensor_nbytes // slots, tensors, slots, addresses)
            try:
                self._publish(local, None, keys, addresses, accessible, registered=True)
            except DirectoryFull as error:
                raise failure("register", self._codes.out_of_memory, str(error)) from error
        return cache_id

    def unregister(self, cache_id: int, deadline: float) -> None:
        """Give memory back to the program: when this returns, no transfer touches it. Unknown ids are ignored.

        Raises
        ------
        LLMException
            The mode's code for a timeout: a peer still uses the memory. The cache is hidden, another call waits again.
        """
        with self.lock:
            held = self._held.get(cache_id)
            if held is not None and held.offset is None:
                for key in list(held.keys):
                    self._unbind(key)
                self._give_up_id(cache_id)
        while self._is_retired(cache_id):
            if time.monotonic() >= deadline:
                reason = f"a peer or a transfer still uses the memory of cache {cache_id}: unlink, or call again"
                raise failure("unregister_cache", self._codes.timeout, reason)
            time.sleep(_RETIRED_POLL_SECONDS)

    def _is_retired(self, cache_id: int) -> bool:
        with self.lock:
            self._settle()
            return any(held.local.cache_id == cache_id for held in self._retired)

    # ---- memory of the pool for tensors of the program

    def reserve(self, nbytes: int, timeout_s: float, on_host: bool) -> int:
        """Give a range of the pool to the program; gives its address. Raises as `allocate` for no room."""
        with self.lock:
            self._settle()
            offset, _ = self._take(1, nbytes, timeout_s, on_host)
            try:
                self.device.prepare(offset, nbytes)
            except OSError as error:
                self._pool.free(offset)
                raise failure("reserve_memory", self._codes.out_of_memory, str(error)) from error
            return self.device.address_of(offset)

    def release_later(self, address: int) -> None:
        """Take back what `reserve` gave; caches that were registered in it must be unregistered before.

        From a destructor, as `deallocate_later`.
        """
        self._released.append(self.device.offset_of(address))
        self._settle_if_free()

    # ---- seals

    def seal_blocks(self, cache_id: int, blocks: list[int], lease_s: float | None) -> bytes:
        """Seal blocks of a cache whose id is held; see `SealedBlocks.seal`."""
        with self.lock:
            held = self._held.get(cache_id)
            if held is None or not held.id_held:
                raise no_cache("publish_blocks", cache_id)
            try:
                return self._seals.seal(cache_id, held.entry, blocks, lease_s)
            except DirectoryFull as error:
                raise failure("publish_blocks", self._codes.out_of_memory, str(error)) from error

    def break_seals(self, token: bytes) -> None:
        """Break the seals that a token stands for; see `SealedBlocks.retire`."""
        with self.lock:
            self._seals.retire(token)

    def break_expired_seals(self, cache_id: int) -> list[int]:
        """Break the seals whose lease has run out; gives the blocks. See `SealedBlocks.retire_expired`."""
        with self.lock:
            return self._seals.retire_expired(cache_id)

    def deallocate(self, cache_id: int) -> bool:
        """Give up the id of a cache; False if it was not held."""
        with self.lock:
            known = self._give_up_id(cache_id)
            self._settle()
        return known

    def deallocate_later(self, cache_id: int) -> None:
        """Give up an id from a destructor: at once if the lock is free, else with the next operation."""
        self._dropped.append(cache_id)
        self._settle_if_free()

    def _settle_if_free(self) -> None:
        # A destructor may run anywhere, also in the thread that holds the lock.
        if self.lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self.lock.release()

    def remove_key(self, key: KeyName) -> bool:
        """Unbind a key; False if it was not bound."""
        with self.lock:
            self._settle()
            if key not in self._keys:
                return False
            self._unbind(key)
        return True

    def forget_peer(self) -> None:
        """After a link ended: pick up keys that its peer consumed without leaving a hint, and memory that it held."""
        with self.lock:
            for entry in self.directory.scan_consumed():
                self._unbind(self._key_of_entry[entry])
            self._settle()

    def statistics(self) -> PoolStatistics:
        """Tell the level of the pool, after everything that peers released was picked up."""
        with self.lock:
            self._settle()
            pool = self._pool
            return PoolStatistics(
                pool.capacity, pool.used, pool.available, pool.largest_free, len(self._held), len(self._keys)
            )

    def tensor_range(self, cache_id: int, tensor_index: int) -> tuple[int, int] | None:
        """Address and bytes of one tensor; None if the id is not held."""
        local = self.by_id.get(cache_id)
        if local is None:
            return None
        return local.tensor_address(tensor_index), local.tensor_nbytes

    def close(self) -> None:
        """Drop everything; no transfer may be running. May be called twice."""
        with self.lock:
            for local in self.by_id.values():
                local.release()
            self.by_id.clear()
            self._held.clear()
            self._keys.clear()
            self.directory.close()
            self.device.close()

    # ---- with the lock held

    def _publish(
        self,
        local: LocalCache,
        offset: int | None,
        keys: dict[KeyName, int],
        addresses: list[int] | None = None,
        accessible: bool = True,
        registered: bool = False,
    ) -> None:
        directory = self.directory
        entry = directory.publish_cache(
            local.cache_id,
            offset or 0,
            local.step,
            local.tensor_nbytes,
            local.stride,
            local.tensors,
            local.slots,
            addresses,
            private=addresses is not None and not self._are_in_pool(addresses, local.tensor_nbytes),
            registered=registered,
            hidden=not accessible,
        )
        held = _Held(local, offset, entry)
        try:
            for key, slot in keys.items():
                kind, number, model_id = key
                key_entry = directory.publish_key(entry, kind, number, model_id, slot)
                held.keys[key] = key_entry
                held.entries.append(key_entry)
        except DirectoryFull:
            for index in held.entries:
                directory.unpublish(index)
                directory.release(index)
            raise
        for key, index in held.keys.items():
            self._keys[key] = held
            self._key_of_entry[index] = key
        self._held[local.cache_id] = held
        self.by_id[local.cache_id] = local

    def _scattered(self, local: LocalCache) -> list[int] | None:
        """Give the addresses of the tensors of an allocated cache, if it is not in the memory of the device."""
        if 0 <= local.address - self.device.address < self.device.capacity:
            return None
        return [local.tensor_address(index) for index in range(local.tensors)]

    def _are_in_pool(self, addresses: list[int], nbytes: int) -> bool:
        first, end = self.device.address, self.device.address + self.device.capacity
        return all(first <= address and address + nbytes <= end for address in addresses)

    def _take(self, tensors: int, tensor_nbytes: int, timeout_s: float, on_host: bool) -> Extent:
        give_up: float | None = None
        while True:
            try:
                return self._pool.allocate(tensors, tensor_nbytes, on_host)
            except CachePoolExhausted as error:
                now = time.monotonic()
                give_up = now + timeout_s if give_up is None else give_up
                if error.hopeless or not self._retired or now >= give_up:
                    raise failure("allocation", self._codes.out_of_memory, str(error)) from None
            # Peers finish their copies within moments; they take no lock of ours.
            time.sleep(_RETIRED_POLL_SECONDS)
            self._settle()

    def _settle(self) -> None:
        """Take in what happened without this table: destructors, consumed keys, ended transfers."""
        while self._dropped:
            self._give_up_id(self._dropped.popleft())
        while self._released:
            self._pool.free(self._released.popleft())
        if self.directory.has_hints:
            for entry in self.directory.take_consumed():
                self._unbind(self._key_of_entry[entry])
        if self._retired:
            retired, self._retired = self._retired, []
            for held in retired:
                self._free_or_retire(held)

    def _give_up_id(self, cache_id: int) -> bool:
        local = self.by_id.pop(cache_id, None)
        if local is None:
            return False
        local.release()
        held = self._held[cache_id]
        held.id_held = False
        self._seals.forget(cache_id)
        if held.keys:
            for key in list(held.keys):
                if key[0] == _BLOCKS:  # a blocks key goes with the id
                    self._unbind(key)
        self._free_if_unheld(held)
        return True

    def _unbind(self, key: KeyName) -> None:
        held = self._keys.pop(key)
        entry = held.keys.pop(key)
        del self._key_of_entry[entry]
        self.directory.unpublish(entry)
        self._free_if_unheld(held)

    def _free_if_unheld(self, held: _Held) -> None:
        cache_id = held.local.cache_id
        if held.id_held or held.keys or cache_id not in self._held:
            return
        del self._held[cache_id]
        self.directory.unpublish(held.entry)
        self._free_or_retire(held)

    def _free_or_retire(self, held: _Held) -> None:
        if self.directory.is_claimed(held.local.cache_id) or held.local.pinned:
            self._retired.append(held)
            return
        if held.offset is not None:
            self._pool.free(held.offset)
        for entry in held.entries:
            self.directory.release(entry)


def _key_is_bound(key: KeyName) -> LLMException:
    kind, number, model_id = key
    name = f"{KeyKind(kind).name.lower()} key {number} of model {model_id}"
    return invalid("allocation", f"{name} is bound already, remove it first")


def slots_of_keys(keys: Sequence[KeyName | None]) -> dict[KeyName, int]:
    """Map each key to the slot that it names; of equal keys the last one wins, None names nothing."""
    return {key: slot for slot, key in enumerate(keys) if key is not None}
