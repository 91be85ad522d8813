"""One-sided pushes: find the caches that addresses of the peer lie in, claim them, copy, let them go.

Every address of a push is resolved and claimed before the first byte is written: an address that lies in no cache of
the peer, or bytes that would run over the end of a tensor, fail the whole push.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport fence_full, fetch_sub, load_acquire
from llm_datadist._copy cimport COPIED, COPY_TIMED_OUT, CopyOutcome, Gate, Plan, Run, execute, join_run, stopped
from llm_datadist._core cimport (
    CACHE_ID, CACHE_RELEASED, DONE, HAZARDS, KEY_UNKNOWN, NO_MEMORY, SLOT_UNKNOWN, SOURCE_BLOCK, SOURCE_TENSORS,
    TARGET_ADDRESS, TIMED_OUT, Found, Outcome,
)
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._pull cimport PeerSource

from llm_datadist._core import TransferFault


cdef class PeerTarget(PeerSource):
    """A linked peer that this process pushes into, as well as pulls from; for pushes its pool is mapped writable."""

    cdef uint64_t _last_found   # where the last address was found: the next one mostly lies in the same cache

    def push(
        self, LocalCache source not None, uint64_t source_first, list addresses not None, uint64_t source_slot,
        BlockPairs pairs, uint64_t deadline_ns,
    ):
        """Copy slots or blocks of local tensors to addresses in the peer's process.

        Parameters
        ----------
        source : LocalCache
            Local cache.
        source_first : int
            First tensor; as many follow as there are addresses.
        addresses : list of int
            Where each tensor goes, in the peer's process.
        source_slot : int
            Slot that is copied; ignored if `pairs` is given.
        pairs : BlockPairs or None
            Source block i goes to the address + target block i times the block size.
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        TransferFault
            SLOT_UNKNOWN, SOURCE_BLOCK, SOURCE_TENSORS: about the local cache. TARGET_ADDRESS: nothing was written.
            CACHE_RELEASED: the local cache was deallocated. TIMED_OUT, PEER_DEAD, REVOKED, LINK_CLOSED.
        """
        cdef uint64_t tensors = <uint64_t>len(addresses)
        cdef uint64_t *plan = <uint64_t *>malloc((2 * tensors + 1) * sizeof(uint64_t))
        cdef uint64_t i
        cdef Outcome outcome
        if plan == NULL:
            raise MemoryError()
        try:
            for i in range(tensors):
                plan[tensors + i] = addresses[i]
            with nogil:
                outcome = self._enter()
                if outcome == DONE:
                    outcome = self._push(source, source_first, tensors, plan, source_slot, pairs, deadline_ns)
                    fetch_sub(&self._running, 1)
        finally:
            free(plan)
        if outcome != DONE:
            raise TransferFault(<int>outcome)

    cdef Outcome _push(
        self, LocalCache source, uint64_t source_first, uint64_t tensors, uint64_t *plan, uint64_t source_slot,
        BlockPairs pairs, uint64_t deadline_ns,
    ) noexcept nogil:
        cdef Gate gate = self._gate(deadline_ns)
        cdef uint64_t count = pairs.count if pairs is not None else 1
        cdef uint64_t stride = source.stride
        cdef uint64_t used = 0
        cdef uint64_t i
        cdef uint64_t needed = stride
        cdef Run *runs
        cdef Outcome outcome
        if tensors > source.tensors or source_first > source.tensors - tensors:
            return SOURCE_TENSORS
        if pairs is None:
            if source_slot >= source.slots:
                return SLOT_UNKNOWN
        elif pairs.max_source >= source.slots:
            return SOURCE_BLOCK
        elif pairs.max_target >= self._pool.size // stride:
            return TARGET_ADDRESS
        else:
            needed = (pairs.max_target + 1) * stride
        runs = <Run *>malloc(count * sizeof(Run))
        if runs == NULL:
            return NO_MEMORY
        if pairs is None:
            used = join_run(runs, 0, source_slot * stride, 0, stride)
        else:
            for i in range(count):
                used = join_run(runs, used, pairs._sources[i] * stride, pairs._targets[i] * stride, stride)
        if not source.pin():
            outcome = CACHE_RELEASED
        else:
            for i in range(tensors):
                plan[i] = source.address + (source_first + i) * source.step
            outcome = self._copy_claimed(plan, tensors, runs, used, needed, &gate)
            source.unpin()
        free(runs)
        return outcome

    cdef Outcome _copy_claimed(
        self, uint64_t *addresses, uint64_t tensors, const Run *runs, uint64_t num_runs, uint64_t needed,
        const Gate *gate,
    ) noexcept nogil:
        """Translate the target addresses, claim the caches that they lie in, and copy."""
        cdef Found claims[HAZARDS]
        cdef uint64_t claimed = 0
        cdef uint64_t i
        cdef Plan plan
        cdef CopyOutcome copied
        cdef Outcome outcome = DONE
        for i in range(tensors):
            outcome = self._resolve(&addresses[tensors + i], needed, claims, &claimed, gate)
            if outcome != DONE:
                break
        if outcome == DONE:
            plan.sources = addresses
            plan.targets = addresses + tensors
            plan.tensors = tensors
            plan.runs = runs
            plan.num_runs = num_runs
            copied = execute(&plan, gate)
            # The peer revokes before it reuses memory, so a copy that ended before that is good.
            fence_full()
            if copied == COPY_TIMED_OUT:
                outcome = TIMED_OUT
            elif copied != COPIED or stopped(gate):
                outcome = self._why_stopped()
        for i in range(claimed):
            self._drop_hazard(claims[i].hazard)
        return outcome

    cdef Outcome _resolve(
        self, uint64_t *address, uint64_t needed, Found *claims, uint64_t *claimed, const Gate *gate
    ) noexcept nogil:
        """Turn an address of the peer into one of the mapped pool, with a claim on the cache that it lies in."""
        cdef uint64_t offset = address[0] - load_acquire(&self._header.pool_address)
        cdef uint64_t high_water = load_acquire(&self._header.high_water)
        cdef uint64_t i
        cdef Outcome outcome
        if offset >= self._pool.size:
            return TARGET_ADDRESS
        address[0] = self._pool.base + offset
        for i in range(claimed[0]):
            if self._holds(&claims[i], offset, needed):
                return DONE
        if claimed[0] == HAZARDS:
            return NO_MEMORY
        if high_water > self._num_entries:
            high_water = self._num_entries
        if self._last_found >= high_water:
            self._last_found = 0
        for i in range(high_water):
            claims[claimed[0]].index = (self._last_found + i) % high_water
            if self._read_entry(claims[claimed[0]].index, &claims[claimed[0]].entry):
                if self._holds(&claims[claimed[0]], offset, needed):
                    outcome = self._claim_found(&claims[claimed[0]], gate)
                    if outcome == KEY_UNKNOWN:
                        continue  # deallocated in this moment
                    if outcome == DONE:
                        self._last_found = claims[claimed[0]].index
                        claimed[0] += 1
                    return outcome
        return TARGET_ADDRESS

    cdef bint _holds(self, const Found *found, uint64_t offset, uint64_t needed) noexcept nogil:
        """Whether `needed` bytes from an offset of the pool lie inside one tensor of a cache."""
        cdef uint64_t within
        if found.entry.kind != CACHE_ID or offset < found.entry.base:
            return False
        within = offset - found.entry.base
        if found.entry.tensors > 1:
            if found.entry.step == 0 or within // found.entry.step >= found.entry.tensors:
                return False
            within = within % found.entry.step
        return within < found.entry.tensor_nbytes and needed <= found.entry.tensor_nbytes - within
