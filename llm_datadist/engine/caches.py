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
from llm_datadist.devices.host import HostPool
from llm_datadist.engine.cache_pool import CachePool, CachePoolExhausted, Extent
from llm_datadist.engine.failures import failure, invalid
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.options import SizeClass
from llm_datadist.status import LLMException, LLMStatusCode

_RETIRED_POLL_SECONDS = 0.0005


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

    def __init__(self, local: LocalCache, offset: int, entry: int) -> None:
        self.local = local
        self.offset = offset
        self.entry = entry  # of the cache's id in the directory
        self.entries = [entry]  # all that go back to the directory together with the memory
        self.keys: dict[KeyName, int] = {}
        self.id_held = True


class CacheTable:
    """All caches and keys of one device.

    Parameters
    ----------
    pool : HostPool
        The device's memory; the table closes it.
    classes : sequence of SizeClass
        Size classes that the pool is cut into; empty for none.

    Attributes
    ----------
    by_id : dict of int to LocalCache
        Caches whose id is held. Read without the lock by transfers.
    lock : threading.Lock
        Guards the directory and everything in here.
    """

    def __init__(self, pool: HostPool, classes: Sequence[SizeClass] = ()) -> None:
        self.device = pool
        self.directory = Directory(pool.capacity, pool.address)
        self.lock = threading.Lock()
        self.by_id: dict[int, LocalCache] = {}
        self._pool = CachePool(pool.capacity, classes)
        self._held: dict[int, _Held] = {}
        self._keys: dict[KeyName, _Held] = {}
        self._key_of_entry: dict[int, KeyName] = {}
        self._retired: list[_Held] = []
        self._dropped: deque[int] = deque()  # ids given up by destructors
        self._last_id = 0

    # ---- holders

    def allocate(
        self, tensors: int, tensor_nbytes: int, slots: int, keys: dict[KeyName, int], deadline: float, cache_id: int = 0
    ) -> tuple[int, list[int]]:
        """Allocate a cache and bind its keys, all or nothing.

        Parameters
        ----------
        tensors, tensor_nbytes, slots : int
            Number of tensors, bytes of each, slots of each; all > 0.
        keys : dict of KeyName to int
            Key and the slot that it names.
        deadline : float
            How long to wait for retired memory, on the clock of ``time.monotonic``.
        cache_id : int
            Id of the cache, above all earlier ones; 0 = the next one.

        Returns
        -------
        cache_id : int
        addresses : list of int
            One a tensor.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a key is bound already. LLM_DEVICE_OUT_OF_MEMORY: no room.
        """
        with self.lock:
            self._settle()
            for key in keys:
                if key in self._keys:
                    raise _key_is_bound(key)
            cache_id = self._last_id = cache_id or self._last_id + 1
            offset, step = self._take(tensors, tensor_nbytes, deadline)
            try:
                self.device.prepare(offset, step * tensors)
                held = self._publish(cache_id, offset, step, tensor_nbytes, tensors, slots, keys)
            except (DirectoryFull, OSError) as error:
                self._pool.free(offset)
                code = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
                raise failure("allocation", code, str(error)) from error
            self.by_id[cache_id] = held.local
        first = self.device.address + offset
        return cache_id, [first + index * step for index in range(tensors)]

    def deallocate(self, cache_id: int) -> bool:
        """Give up the id of a cache; False if it was not held."""
        with self.lock:
            known = self._give_up_id(cache_id)
            self._settle()
        return known

    def deallocate_later(self, cache_id: int) -> None:
        """Give up an id from a destructor: at once if the lock is free, else with the next operation."""
        self._dropped.append(cache_id)
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
        """Offset in the pool and bytes of one tensor; None if the id is not held."""
        local = self.by_id.get(cache_id)
        if local is None:
            return None
        return local.address - self.device.address + tensor_index * local.step, local.tensor_nbytes

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
        cache_id: int,
        offset: int,
        step: int,
        tensor_nbytes: int,
        tensors: int,
        slots: int,
        keys: dict[KeyName, int],
    ) -> _Held:
        stride = tensor_nbytes // slots
        directory = self.directory
        entry = directory.publish_cache(cache_id, offset, step, tensor_nbytes, stride, tensors, slots)
        local = LocalCache(cache_id, self.device.address + offset, step, tensor_nbytes, stride, tensors, slots)
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
        self._held[cache_id] = held
        return held

    def _take(self, tensors: int, tensor_nbytes: int, deadline: float) -> Extent:
        while True:
            try:
                return self._pool.allocate(tensors, tensor_nbytes)
            except CachePoolExhausted as error:
                if error.hopeless or not self._retired or time.monotonic() >= deadline:
                    raise failure("allocation", LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY, str(error)) from None
            # Peers finish their copies within moments; they take no lock of ours.
            time.sleep(_RETIRED_POLL_SECONDS)
            self._settle()

    def _settle(self) -> None:
        """Take in what happened without this table: destructors, consumed keys, ended transfers."""
        while self._dropped:
            self._give_up_id(self._dropped.popleft())
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
        for key in list(held.keys):
            if key[0] == KeyKind.BLOCKS:  # a blocks key goes with the id
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
