"""One-sided pushes: find the caches that addresses or a key of the peer name, claim them, copy, let them go.

Every address of a push is resolved and claimed before the first byte is written: an address that lies in no cache of
the peer, or bytes that would run over the end of a tensor, fail the whole push.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport load_acquire, load_relaxed
from llm_datadist._copy cimport Gate, Plan, Run, join_run
from llm_datadist._core cimport CACHE_ID, HAZARDS, HIDDEN, PRIVATE, SCATTERED, DirectoryEntry, Found
from llm_datadist._outcome cimport (
    BLOCK_SIZE, CACHE_RELEASED, DONE, KEY_UNKNOWN, NO_MEMORY, SLOT_UNKNOWN, SOURCE_BLOCK, SOURCE_TENSORS,
    TARGET_ADDRESS, TARGET_BLOCK, TARGET_RANGE, TARGET_TENSORS, Outcome,
)
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._pull cimport PeerSource

from llm_datadist._outcome import TransferFault


cdef class PeerTarget(PeerSource):
    """A linked peer that this process pushes into, as well as pulls from; for pushes its pool is mapped writable."""

    def push(
        self, LocalCache source not None, uint64_t source_first, list addresses not None, uint64_t source_slot,
        BlockPairs pairs, uint64_t block_nbytes, uint64_t deadline_ns,
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
            Slot that is copied; ignored if blocks of a blocks cache are.
        pairs : BlockPairs or None
            Source block i goes to the address + target block i times the size of a block.
        block_nbytes : int
            0: blocks are slots of the source. Else the slot `source_slot` is cut into blocks of so many bytes.
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        TransferFault
            SLOT_UNKNOWN, SOURCE_BLOCK, SOURCE_TENSORS: about the local cache. TARGET_ADDRESS: nothing was written.
            CACHE_RELEASED: the local cache was deallocated. TIMED_OUT, PEER_DEAD, REVOKED, LINK_CLOSED, MEMORY_FAULT,
            MEMORY_DENIED, TARGET_READ_ONLY.
        """
        cdef uint64_t tensors = <uint64_t>len(addresses)
        cdef uint64_t *plan = <uint64_t *>malloc((3 * tensors + 1) * sizeof(uint64_t))
        cdef uint64_t i
        cdef Source wanted
        cdef Gate gate
        cdef Outcome outcome
        if plan == NULL:
            raise MemoryError()
        try:
            for i in range(tensors):
                plan[tensors + i] = addresses[i]
            wanted.first, wanted.tensors = source_first, tensors
            with nogil:
                outcome = self._enter(deadline_ns)
                if outcome == DONE:
                    gate = self._gate(deadline_ns)
                    outcome = check_source(&wanted, source, source_slot, pairs, block_nbytes)
                    if outcome == DONE:
                        outcome = self._push_to_addresses(&wanted, source, pairs, plan, &gate)
                    self._leave()
        finally:
            free(plan)
        if outcome != DONE:
            raise TransferFault(<int>outcome)

    def push_to_key(
        self, LocalCache source not None, uint64_t source_first, uint64_t tensors, uint64_t source_slot,
        uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot, uint64_t target_first,
        BlockPairs pairs, uint64_t block_nbytes, uint64_t deadline_ns,
    ):
        """Copy slots or blocks of local tensors into a cache of the peer that a key names.

        Parameters
        ----------
        source, source_first, source_slot, pairs, block_nbytes, deadline_ns
            As in `push`; a block has the size of a slot of the peer's cache.
        tensors : int
            Number of tensors.
        kind, key_id, model_id, remote_slot : int
            ``(CACHE_ID, cache_id, 0, slot)``, without pairs; or ``(BLOCKS_KEY, 0, model_id, 0)``, with pairs.
        target_first : int
            First tensor there.

        Raises
        ------
        TransferFault
            As `push`. About the cache of the peer: KEY_UNKNOWN, TARGET_BLOCK, TARGET_RANGE, TARGET_TENSORS, BLOCK_SIZE.
        """
        cdef uint64_t *plan = <uint64_t *>malloc((2 * tensors + 1) * sizeof(uint64_t))
        cdef Source wanted
        cdef Gate gate
        cdef Found found
        cdef Outcome outcome
        if plan == NULL:
            raise MemoryError()
        wanted.first, wanted.tensors = source_first, tensors
        found.entry.tensors = found.entry.slots = found.entry.stride = 0
        with nogil:
            outcome = self._enter(deadline_ns)
            if outcome == DONE:
                gate = self._gate(deadline_ns)
                outcome = check_source(&wanted, source, source_slot, pairs, block_nbytes)
                if outcome == DONE:
                    outcome = self._claim_key(kind, key_id, model_id, &gate, &found)
                if outcome == DONE:
                    outcome = check_target(
                        &found.entry, &wanted, remote_slot, target_first, pairs is not None,
                        pairs.max_target if pairs is not None else 0,
                    )
                    if outcome == DONE:
                        outcome = self._addresses(&found.entry, target_first, tensors, plan + tensors)
                    if outcome == DONE:
                        outcome = self._move(
                            &wanted, source, pairs, 0 if pairs is not None else remote_slot * found.entry.stride,
                            plan, plan + tensors, tensors, 0, &found, &gate,
                        )
                    self._drop_hazard(found.hazard)
                self._leave()
        free(plan)
        if outcome != DONE:
            raise TransferFault(<int>outcome, found.entry.tensors, found.entry.slots, found.entry.stride)

    cdef Outcome _push_to_addresses(
        self, const Source *wanted, LocalCache source, BlockPairs pairs, uint64_t *plan, const Gate *gate
    ) noexcept nogil:
        """Translate the target addresses, claim the caches that they lie in, and copy.

        The plan has room for the source addresses, then come the target addresses, then room for a word about each:
        which of the claims it lies in.
        """
        cdef Found claims[HAZARDS]
        cdef uint64_t claimed = 0
        cdef uint64_t tensors = wanted.tensors
        cdef uint64_t *targets = plan + tensors
        cdef uint64_t *claim_of = plan + 2 * tensors
        cdef uint64_t i, first
        cdef Outcome outcome = self._resolve_all(
            wanted, pairs is not None, pairs.max_target if pairs is not None else 0, targets, claims, &claimed,
            claim_of, gate,
        )
        first = 0
        while outcome == DONE and first < tensors:
            i = first + 1
            while i < tensors and claim_of[i] == claim_of[first]:
                i += 1
            outcome = self._move(
                wanted, source, pairs, 0, plan, targets + first, i - first, first, &claims[claim_of[first]], gate
            )
            first = i
        for i in range(claimed):
            self._drop_hazard(claims[i].hazard)
        return outcome

    cdef Outcome _move(
        self, const Source *wanted, LocalCache source, BlockPairs pairs, uint64_t target_base, uint64_t *sources,
        const uint64_t *targets, uint64_t tensors, uint64_t skip, const Found *found, const Gate *gate,
    ) noexcept nogil:
        """Copy to tensors of a cache that is claimed; `skip` tensors of the source come before them."""
        cdef uint64_t used = 0
        cdef uint64_t i
        cdef Plan plan
        cdef Outcome outcome
        cdef Run *runs = <Run *>malloc((pairs.count if pairs is not None else 1) * sizeof(Run) + 1)
        if runs == NULL:
            return NO_MEMORY
        if pairs is None:
            used = join_run(runs, 0, wanted.base, target_base, wanted.block)
        else:
            for i in range(pairs.count):
                used = join_run(
                    runs, used, wanted.base + pairs._sources[i] * wanted.block, pairs._targets[i] * wanted.block,
                    wanted.block,
                )
        if not source.pin():
            outcome = CACHE_RELEASED
        else:
            for i in range(tensors):
                sources[i] = source.tensor_at(wanted.first + skip + i)
            plan.sources = sources
            plan.targets = targets
            plan.tensors = tensors
            plan.runs = runs
            plan.num_runs = used
            outcome = self._carry(&plan, found, True, gate)
            source.unpin()
        free(runs)
        return outcome

    # ---- addresses of the peer

    cdef Outcome _resolve_all(
        self, const Source *wanted, bint by_blocks, uint64_t max_target, uint64_t *targets, Found *claims,
        uint64_t *claimed, uint64_t *claim_of, const Gate *gate,
    ) noexcept nogil:
        """Translate target addresses and claim the caches that they lie in; the caller drops the claims."""
        cdef uint64_t needed = wanted.block
        cdef uint64_t i
        cdef Outcome outcome
        claimed[0] = 0
        if by_blocks:
            if wanted.block == 0 or max_target >= (<uint64_t>1 << 62) // wanted.block:
                return TARGET_ADDRESS
            needed = (max_target + 1) * wanted.block
        for i in range(wanted.tensors):
            outcome = self._resolve(&targets[i], needed, claims, claimed, &claim_of[i], gate)
            if outcome != DONE:
                return outcome
        return DONE

    cdef Outcome _resolve(
        self, uint64_t *address, uint64_t needed, Found *claims, uint64_t *claimed, uint64_t *claim, const Gate *gate
    ) noexcept nogil:
        """Claim the cache that an address of the peer lies in, and turn it into one of the mapped pool if it is there.
        """
        cdef uint64_t high_water = load_acquire(&self._header.high_water)
        cdef uint64_t i
        cdef Found *found
        cdef Outcome outcome
        for i in range(claimed[0]):
            if self._holds(&claims[i].entry, address[0], needed):
                claim[0] = i
                return self._translate(&claims[i].entry, address, needed)
        if claimed[0] == HAZARDS:
            return NO_MEMORY
        if high_water > self._num_entries:
            high_water = self._num_entries
        if self._last_found >= high_water:
            self._last_found = 0
        found = &claims[claimed[0]]
        for i in range(high_water):
            found.index = (self._last_found + i) % high_water
            if self._read_entry(found.index, &found.entry) and self._holds(&found.entry, address[0], needed):
                outcome = self._claim_found(found, gate)
                if outcome == KEY_UNKNOWN:
                    continue  # deallocated in this moment
                if outcome == DONE:
                    self._last_found = found.index
                    claim[0] = claimed[0]
                    claimed[0] += 1
                    outcome = self._translate(&found.entry, address, needed)
                return outcome
        return TARGET_ADDRESS

    cdef Outcome _translate(
        self, const DirectoryEntry *entry, uint64_t *address, uint64_t needed
    ) noexcept nogil:
        cdef uint64_t offset
        if not entry.flags & PRIVATE:
            offset = address[0] - self._header.pool_address
            if offset > self._pool.size or needed > self._pool.size - offset:
                return TARGET_ADDRESS
            address[0] = self._pool.base + offset
        return DONE

    cdef bint _holds(self, const DirectoryEntry *entry, uint64_t address, uint64_t needed) noexcept nogil:
        """Whether `needed` bytes from an address of the peer lie inside one tensor of a cache."""
        cdef uint64_t within, i
        if entry.kind != CACHE_ID or entry.flags & HIDDEN:
            return False
        if entry.flags & SCATTERED:
            if not self._is_table(entry.base, entry.tensors):
                return False
            for i in range(entry.tensors):
                within = address - load_relaxed(&self._tables[entry.base // sizeof(uint64_t) + i])
                if within < entry.tensor_nbytes and needed <= entry.tensor_nbytes - within:
                    return True
            return False
        within = address - self._header.pool_address - entry.base
        if entry.tensors > 1:
            if entry.step == 0 or within // entry.step >= entry.tensors:
                return False
            within = within % entry.step
        return within < entry.tensor_nbytes and needed <= entry.tensor_nbytes - within


cdef Outcome check_source(
    Source *wanted, LocalCache source, uint64_t slot, BlockPairs pairs, uint64_t block_nbytes
) noexcept nogil:
    """Check what is pushed against the local cache, and say where its blocks begin."""
    cdef bint by_slot = pairs is None or block_nbytes != 0
    if wanted.tensors > source.tensors or wanted.first > source.tensors - wanted.tensors:
        return SOURCE_TENSORS
    if by_slot and slot >= source.slots:
        return SLOT_UNKNOWN
    wanted.base = slot * source.stride if by_slot else 0
    wanted.block = block_nbytes if block_nbytes != 0 else source.stride
    if pairs is not None and pairs.max_source >= (source.stride // wanted.block if by_slot else source.slots):
        return SOURCE_BLOCK
    return DONE


cdef Outcome check_target(
    const DirectoryEntry *entry, const Source *wanted, uint64_t slot, uint64_t first, bint by_blocks,
    uint64_t max_target,
) noexcept nogil:
    """Check what is pushed against a cache of the peer."""
    if wanted.tensors > entry.tensors or first > entry.tensors - wanted.tensors:
        return TARGET_TENSORS
    if not by_blocks:
        if slot >= entry.slots:
            return TARGET_BLOCK
        return DONE if wanted.block <= entry.stride else TARGET_RANGE
    if wanted.block != entry.stride:
        return BLOCK_SIZE
    return DONE if max_target < entry.slots else TARGET_BLOCK
