"""One-sided pulls: find a key in the peer's directory, claim its cache, copy, let it go.

Nothing in here talks to the peer. After the copy the claim goes, and a consumed key is marked in the ledger, where the
owner finds it with its next operation.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport compare_exchange, fence_full, fetch_or, fetch_sub, load_acquire, load_relaxed
from llm_datadist._copy cimport COPIED, COPY_TIMED_OUT, CopyOutcome, Gate, Plan, Run, execute, join_run, stopped
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._core cimport (
    BLOCKS_KEY, BLOCK_SIZE, CACHE_ID, CACHE_RELEASED, DONE, NO_MEMORY, ORDINARY_KEY, PREFIX_KEY, SLOT_UNKNOWN,
    SOURCE_BLOCK, SOURCE_RANGE, SOURCE_TENSORS, TENSORS_PER_WORD, TENSOR_COUNT, TIMED_OUT, DirectoryEntry, Found,
    Outcome, PeerMemory, generation_tag, pulled_words,
)

from llm_datadist._core import TransferFault

cdef enum:
    STACK_TENSORS = 128   # addresses of so many tensors fit on the stack
    STACK_RUNS = 64


cdef class PeerSource(PeerMemory):
    """A linked peer that this process pulls from."""

    def pull_cache(
        self, LocalCache target not None, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        uint64_t local_slot, uint64_t nbytes, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, uint64_t source_offset, uint64_t target_offset, bint consume, uint64_t deadline_ns,
    ):
        """Copy bytes of one remote slot into one local slot, tensor by tensor.

        Parameters
        ----------
        target : LocalCache
            Local cache; the caller has checked `local_slot`, the target tensors and `target_offset + nbytes`.
        kind, key_id, model_id : int
            Key of the remote cache, or ``(CACHE_ID, cache_id, 0)``; then `remote_slot` is the slot, else it is ignored.
        source_first, source_count : int
            Range of remote tensors; a count of -1 means all of them.
        consume : bool
            Whether an ordinary key counts the tensors as pulled and is released when all of them were.
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        TransferFault
            With any `Outcome` that a pull by key can have.
        """
        cdef Found found
        cdef Outcome outcome
        found.entry.tensors = found.entry.slots = found.entry.stride = 0
        with nogil:
            outcome = self._enter()
            if outcome == DONE:
                outcome = self._pull_cache(
                    target, kind, key_id, model_id, remote_slot, local_slot, nbytes, source_first, source_count,
                    target_first, target_count, source_offset, target_offset, consume, deadline_ns, &found,
                )
                fetch_sub(&self._running, 1)
        if outcome != DONE:
            raise TransferFault(<int>outcome, found.entry.tensors, found.entry.slots, found.entry.stride)

    def pull_blocks(
        self, LocalCache target not None, uint64_t model_id, BlockPairs pairs not None, uint64_t source_first,
        int64_t source_count, uint64_t target_first, uint64_t target_count, uint64_t deadline_ns,
    ):
        """Copy blocks of the remote blocks cache of a model into blocks of a local cache, in every chosen tensor.

        The caller has checked target tensors and target blocks. Raises `TransferFault`.
        """
        cdef Found found
        cdef Outcome outcome
        found.entry.tensors = found.entry.slots = found.entry.stride = 0
        with nogil:
            outcome = self._enter()
            if outcome == DONE:
                outcome = self._pull_blocks(
                    target, model_id, pairs, source_first, source_count, target_first, target_count, deadline_ns, &found
                )
                fetch_sub(&self._running, 1)
        if outcome != DONE:
            raise TransferFault(<int>outcome, found.entry.tensors, found.entry.slots, found.entry.stride)

    cdef Outcome _pull_cache(
        self, LocalCache target, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        uint64_t local_slot, uint64_t nbytes, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, uint64_t source_offset, uint64_t target_offset, bint consume, uint64_t deadline_ns,
        Found *found,
    ) noexcept nogil:
        cdef Gate gate = self._gate(deadline_ns)
        cdef Found key
        cdef Run run
        cdef uint64_t slot
        cdef uint64_t count
        cdef Outcome outcome = self._claim_key(kind, key_id, model_id, &gate, found)
        if outcome != DONE:
            return outcome
        cdef DirectoryEntry *entry = &found.entry
        slot = remote_slot if kind == CACHE_ID else entry.slot
        count = entry.tensors if source_count < 0 else <uint64_t>source_count
        if slot >= entry.slots:
            outcome = SLOT_UNKNOWN
        elif source_offset > entry.stride or nbytes > entry.stride - source_offset:
            outcome = SOURCE_RANGE
        elif source_first > entry.tensors or count > entry.tensors - source_first:
            outcome = SOURCE_TENSORS
        elif count != target_count:
            outcome = TENSOR_COUNT
        else:
            run.source = slot * entry.stride + source_offset
            run.target = local_slot * target.stride + target_offset
            run.nbytes = nbytes
            outcome = self._copy(entry, source_first, target, target_first, count, &run, 1, &gate)
        if outcome == DONE and consume and kind != PREFIX_KEY:
            # Which key goes is settled while the claim still holds the cache and so its chain of keys.
            key = found[0]
            consume = kind == ORDINARY_KEY or self._key_of_slot(entry, slot, &key)
        self._drop_hazard(found.hazard)
        if outcome == DONE and consume and kind != PREFIX_KEY:
            self._consume(&key, source_first, count)
        return outcome

    cdef Outcome _pull_blocks(
        self, LocalCache target, uint64_t model_id, BlockPairs pairs, uint64_t source_first, int64_t source_count,
        uint64_t target_first, uint64_t target_count, uint64_t deadline_ns, Found *found,
    ) noexcept nogil:
        cdef Gate gate = self._gate(deadline_ns)
        cdef Run few[STACK_RUNS]
        cdef Run *runs = few
        cdef uint64_t i, count
        cdef uint64_t used = 0
        cdef Outcome outcome = self._claim_key(BLOCKS_KEY, 0, model_id, &gate, found)
        if outcome != DONE:
            return outcome
        cdef DirectoryEntry *entry = &found.entry
        cdef uint64_t stride = entry.stride
        count = entry.tensors if source_count < 0 else <uint64_t>source_count
        if pairs.max_source >= entry.slots:
            outcome = SOURCE_BLOCK
        elif stride != target.stride:
            outcome = BLOCK_SIZE
        elif source_first > entry.tensors or count > entry.tensors - source_first:
            outcome = SOURCE_TENSORS
        elif count != target_count:
            outcome = TENSOR_COUNT
        else:
            if pairs.count > STACK_RUNS:
                runs = <Run *>malloc(pairs.count * sizeof(Run))
            if runs == NULL:
                outcome = NO_MEMORY
            else:
                for i in range(pairs.count):
                    used = join_run(runs, used, pairs._sources[i] * stride, pairs._targets[i] * stride, stride)
                outcome = self._copy(entry, source_first, target, target_first, count, runs, used, &gate)
            if runs != few:
                free(runs)
        self._drop_hazard(found.hazard)
        return outcome

    cdef Outcome _copy(
        self, const DirectoryEntry *entry, uint64_t source_first, LocalCache target, uint64_t target_first,
        uint64_t tensors, const Run *runs, uint64_t num_runs, const Gate *gate,
    ) noexcept nogil:
        """Carry out the runs on `tensors` tensors; the bytes count only if the link was whole until the end."""
        cdef uint64_t few[2 * STACK_TENSORS]
        cdef uint64_t *addresses = few
        cdef uint64_t i
        cdef Plan plan
        cdef CopyOutcome copied
        if not target.pin():
            return CACHE_RELEASED
        if tensors > STACK_TENSORS:
            addresses = <uint64_t *>malloc(2 * tensors * sizeof(uint64_t))
            if addresses == NULL:
                target.unpin()
                return NO_MEMORY
        for i in range(tensors):
            addresses[i] = self._pool.base + entry.base + (source_first + i) * entry.step
            addresses[tensors + i] = target.address + (target_first + i) * target.step
        plan.sources = addresses
        plan.targets = addresses + tensors
        plan.tensors = tensors
        plan.runs = runs
        plan.num_runs = num_runs
        copied = execute(&plan, gate)
        if addresses != few:
            free(addresses)
        target.unpin()
        # The owner revokes before it reuses memory, so a copy that ended before that is good.
        fence_full()
        if copied == COPY_TIMED_OUT:
            return TIMED_OUT
        if copied != COPIED or stopped(gate):
            return self._why_stopped()
        return DONE

    cdef bint _key_of_slot(self, const DirectoryEntry *entry, uint64_t slot, Found *key) noexcept nogil:
        """Find the ordinary key of a claimed cache that names `slot`."""
        cdef uint64_t link = entry.sibling
        cdef uint64_t steps = 0
        while link != 0 and link <= self._num_entries and steps < self._num_entries:
            key.index = link - 1
            if self._read_entry(key.index, &key.entry):
                if key.entry.cache_id != entry.cache_id:
                    return False
                if key.entry.kind == ORDINARY_KEY and key.entry.slot == slot:
                    return True
            # The link of an unpublished key stays readable as long as its cache is held.
            link = load_relaxed(&self._entries[key.index].sibling)
            steps += 1
        return False

    # ---- the ledger

    cdef void _consume(self, const Found *key, uint64_t first, uint64_t count) noexcept nogil:
        """Count tensors as pulled, and mark the key as consumed when none is left."""
        cdef uint64_t generation = key.entry.generation
        if count < key.entry.tensors and not self._note_pulled(&key.entry, first, count):
            return
        if compare_exchange(&self._records[key.index].fate, generation << 1, generation << 1 | 1):
            fetch_or(&self._leaves[key.index >> 6], <uint64_t>1 << (key.index & 63))
            fetch_or(&self._hints.summary[key.index >> 12], <uint64_t>1 << ((key.index >> 6) & 63))
            fetch_or(&self._hints.top, <uint64_t>1 << (key.index >> 12))

    cdef bint _note_pulled(self, const DirectoryEntry *entry, uint64_t first, uint64_t count) noexcept nogil:
        """Mark a range of tensors; True when every tensor of the key has been pulled at least once."""
        cdef uint64_t words = pulled_words(entry.tensors)
        cdef uint64_t room = self._ledger.size
        if entry.pulled_at > room or entry.pulled_at & 7 or words > (room - entry.pulled_at) // sizeof(uint64_t):
            return False
        cdef uint64_t *pulled = <uint64_t *>(self._ledger.base + entry.pulled_at)
        cdef uint64_t tag = generation_tag(entry.generation)
        cdef uint64_t payload = (<uint64_t>1 << TENSORS_PER_WORD) - 1
        cdef bint whole = True
        cdef uint64_t w, base, low, high, bits, full, old
        for w in range(words):
            base = w * TENSORS_PER_WORD
            low = first - base if first > base else 0
            high = first + count - base if first + count > base else 0
            if high > TENSORS_PER_WORD:
                high = TENSORS_PER_WORD
            bits = (((<uint64_t>1 << high) - 1) & ~((<uint64_t>1 << low) - 1)) if low < high else 0
            full = entry.tensors - base
            full = payload if full >= TENSORS_PER_WORD else (<uint64_t>1 << full) - 1
            while True:
                old = load_acquire(&pulled[w])
                if old & ~payload != tag:
                    return False  # the key is gone and its words belong to another one
                if bits & ~old == 0 or compare_exchange(&pulled[w], old, old | bits):
                    break
            if (old | bits) & full != full:
                whole = False
        return whole
