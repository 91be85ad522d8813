"""One-sided pulls: find a key in the peer's directory, claim its cache, copy, let it go.

Nothing in here talks to the peer. After the copy the claim goes, and a consumed key is marked in the ledger, where the
owner finds it with its next operation.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport compare_exchange, fence_full, fetch_or, load_acquire, load_relaxed
from llm_datadist._copy cimport Plan, Run, join_run
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._core cimport (
    BLOCKS_KEY, CACHE_ID, ORDINARY_KEY, PREFIX_KEY, REGISTERED, TENSORS_PER_WORD, DirectoryEntry, Found, PeerMemory,
    generation_tag, pulled_words, read_token,
)
from llm_datadist._outcome cimport (
    BLOCK_SIZE, CACHE_RELEASED, DONE, NO_MEMORY, SLOT_UNKNOWN, SOURCE_BLOCK, SOURCE_RANGE, SOURCE_TENSORS, STALE_BLOCKS,
    TENSOR_COUNT, Outcome,
)

from llm_datadist._outcome import TransferFault

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
        cdef Pull pull
        cdef Run run
        cdef Outcome outcome
        pull.kind, pull.key_id, pull.model_id, pull.slot = kind, key_id, model_id, remote_slot
        pull.source_first, pull.source_count = source_first, source_count
        pull.target_first, pull.target_count = target_first, target_count
        pull.consume, pull.sealed = consume, False
        pull.found.entry.tensors = pull.found.entry.slots = pull.found.entry.stride = 0
        with nogil:
            outcome = self._begin(&pull, deadline_ns)
            if outcome == DONE:
                if source_offset > pull.found.entry.stride or nbytes > pull.found.entry.stride - source_offset:
                    outcome = SOURCE_RANGE
                else:
                    run.source = pull.slot * pull.found.entry.stride + source_offset
                    run.target = local_slot * target.stride + target_offset
                    run.nbytes = nbytes
                    outcome = self._copy(&pull, target, &run, 1)
                outcome = self._end(&pull, outcome)
        self._report(&pull, outcome)

    def pull_blocks(
        self, LocalCache target not None, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        BlockPairs pairs not None, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, bytes token, uint64_t deadline_ns,
    ):
        """Copy remote blocks into blocks of a local cache, in every chosen tensor.

        Parameters
        ----------
        target : LocalCache
            Local cache; the caller has checked target tensors and target blocks.
        kind, key_id, model_id, remote_slot : int
            ``(BLOCKS_KEY, 0, model_id, 0)``: blocks of the remote blocks cache of a model. Any other key names one
            slot, as in `pull_cache`, whose source block i is its i-th part of the size of a local block; an ordinary
            key is released then.
        pairs : BlockPairs
            Source block i goes into target block i.
        token : bytes or None
            Of `Directory.seal`: the pull fails unless all source blocks are sealed under it, before and after the copy.

        Raises
        ------
        ValueError
            The token is none.
        TransferFault
            With any `Outcome` that a pull by key can have.
        """
        cdef Pull pull
        cdef Run few[STACK_RUNS]
        cdef Run *runs = few
        cdef Outcome outcome
        pull.kind, pull.key_id, pull.model_id, pull.slot = kind, key_id, model_id, remote_slot
        pull.source_first, pull.source_count = source_first, source_count
        pull.target_first, pull.target_count = target_first, target_count
        pull.consume = kind != BLOCKS_KEY
        pull.sealed = token is not None
        if token is not None:
            read_token(token, &pull.seal)
        pull.found.entry.tensors = pull.found.entry.slots = pull.found.entry.stride = 0
        with nogil:
            outcome = self._begin(&pull, deadline_ns)
            if outcome == DONE:
                if pairs.count > STACK_RUNS:
                    runs = <Run *>malloc(pairs.count * sizeof(Run))
                outcome = NO_MEMORY if runs == NULL else self._pull_blocks(&pull, target, pairs, runs)
                if runs != few:
                    free(runs)
                outcome = self._end(&pull, outcome)
        self._report(&pull, outcome)

    cdef int _report(self, const Pull *pull, Outcome outcome) except -1:
        cdef const DirectoryEntry *entry = &pull.found.entry
        if outcome != DONE:
            raise TransferFault(<int>outcome, entry.tensors, entry.slots, entry.stride)
        return 0

    # ---- one pull

    cdef Outcome _begin(self, Pull *pull, uint64_t deadline_ns) noexcept nogil:
        """Find and claim the source; with DONE, `_end` must follow."""
        cdef DirectoryEntry *entry = &pull.found.entry
        cdef uint64_t count
        cdef Outcome outcome = self._enter(deadline_ns)
        if outcome != DONE:
            return outcome
        pull.gate = self._gate(deadline_ns)
        outcome = self._claim_key(pull.kind, pull.key_id, pull.model_id, &pull.gate, &pull.found)
        if outcome != DONE:
            self._leave()
            return outcome
        if pull.kind != CACHE_ID:
            pull.slot = entry.slot
        count = entry.tensors if pull.source_count < 0 else <uint64_t>pull.source_count
        if pull.slot >= entry.slots:
            outcome = SLOT_UNKNOWN
        elif pull.source_first > entry.tensors or count > entry.tensors - pull.source_first:
            outcome = SOURCE_TENSORS
        elif count != pull.target_count:
            outcome = TENSOR_COUNT
        if outcome != DONE:
            self._drop_hazard(pull.found.hazard)
            self._leave()
        return outcome

    cdef bint _releases(self, const Pull *pull) noexcept nogil:
        """Whether a key may have to go when the pull has succeeded."""
        return pull.consume and pull.kind != PREFIX_KEY and not pull.found.entry.flags & REGISTERED

    cdef Outcome _end(self, Pull *pull, Outcome outcome) noexcept nogil:
        """Let the source go, and count it as pulled if that is what the pull is for."""
        cdef Found key
        cdef bint consume = outcome == DONE and self._releases(pull)
        if consume:
            # Which key goes is settled while the claim still holds the cache and so its chain of keys.
            key = pull.found
            consume = pull.kind == ORDINARY_KEY or self._key_of_slot(&pull.found.entry, pull.slot, &key)
        self._drop_hazard(pull.found.hazard)
        if consume:
            self._consume(&key, pull.source_first, pull.target_count)
        self._leave()
        return outcome

    cdef Outcome _pull_blocks(self, Pull *pull, LocalCache target, BlockPairs pairs, Run *runs) noexcept nogil:
        cdef const DirectoryEntry *entry = &pull.found.entry
        cdef uint64_t block = target.stride
        cdef uint64_t base = 0
        cdef uint64_t used = 0
        cdef uint64_t i
        cdef Outcome outcome = self._check_blocks(pull, block, pairs._sources, pairs.count, pairs.max_source, &base)
        if outcome != DONE:
            return outcome
        for i in range(pairs.count):
            used = join_run(runs, used, base + pairs._sources[i] * block, pairs._targets[i] * block, block)
        outcome = self._copy(pull, target, runs, used)
        if pull.sealed and outcome == DONE:
            # The owner breaks the seal and fences before it writes: who read a byte of that sees the broken seal.
            fence_full()
            if not self._is_sealed(entry, &pull.seal, pairs._sources, pairs.count):
                return STALE_BLOCKS
        return outcome

    cdef Outcome _check_blocks(
        self, const Pull *pull, uint64_t block, const uint64_t *blocks, uint64_t count, uint64_t largest, uint64_t *base
    ) noexcept nogil:
        """Check source blocks of `block` bytes, and their seals; gives where block 0 begins in a tensor."""
        cdef const DirectoryEntry *entry = &pull.found.entry
        base[0] = 0
        if pull.kind != BLOCKS_KEY:
            if pull.sealed:
                return STALE_BLOCKS  # parts of a slot are no blocks that can be sealed
            if block == 0 or largest >= entry.stride // block:
                return SOURCE_RANGE
            base[0] = pull.slot * entry.stride
        elif largest >= entry.slots:
            return SOURCE_BLOCK
        elif entry.stride != block:
            return BLOCK_SIZE
        if pull.sealed and not self._is_sealed(entry, &pull.seal, blocks, count):
            return STALE_BLOCKS
        return DONE

    cdef Outcome _copy(self, Pull *pull, LocalCache target, const Run *runs, uint64_t num_runs) noexcept nogil:
        """Carry out the runs on all chosen tensors."""
        cdef uint64_t few[2 * STACK_TENSORS]
        cdef uint64_t *addresses = few
        cdef const DirectoryEntry *entry = &pull.found.entry
        cdef uint64_t tensors = pull.target_count
        cdef uint64_t i
        cdef Plan plan
        cdef Outcome outcome
        if not target.pin():
            return CACHE_RELEASED
        if tensors > STACK_TENSORS:
            addresses = <uint64_t *>malloc(2 * tensors * sizeof(uint64_t))
            if addresses == NULL:
                target.unpin()
                return NO_MEMORY
        outcome = self._addresses(entry, pull.source_first, tensors, addresses)
        if outcome == DONE:
            for i in range(tensors):
                addresses[tensors + i] = target.tensor_at(pull.target_first + i)
            plan.sources = addresses
            plan.targets = addresses + tensors
            plan.tensors = tensors
            plan.runs = runs
            plan.num_runs = num_runs
            outcome = self._carry(&plan, &pull.found, False, &pull.gate)
        if addresses != few:
            free(addresses)
        target.unpin()
        return outcome

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
        if entry.annex > room or entry.annex & 7 or words > (room - entry.annex) // sizeof(uint64_t):
            return False
        cdef uint64_t *pulled = <uint64_t *>(self._ledger.base + entry.annex)
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
