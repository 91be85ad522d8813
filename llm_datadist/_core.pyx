"""One-sided pulls: read a peer's directory, claim what it names, copy it, release it.

Nothing in here talks to the peer. A pull looks the key up in the peer's directory, writes the cache's id into a hazard
word of the link's claim page, and looks again: if the entry is still the same, the owner will see the hazard before it
reuses the memory (each side writes its word, then a full fence, then reads the other's word). After the copy the
hazard goes, and a consumed key is marked in the ledger, where the owner finds it with its next operation.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport (
    compare_exchange, exchange, fence_acquire, fence_full, fetch_add, fetch_and, fetch_or, fetch_sub, load_acquire,
    load_relaxed, lowest_bit, monotonic_ns, relax, store_release,
)
from llm_datadist._copy cimport COPIED, COPY_TIMED_OUT, CopyOutcome, Gate, Plan, Run, execute, join_run, stopped
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._segment cimport Segment

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    STACK_TENSORS = 128   # addresses of so many tensors fit on the stack
    STACK_RUNS = 64


cpdef enum Outcome:
    """How a one-sided transfer ended; `TransferFault.outcome` holds every one but `DONE`."""
    DONE = 0
    KEY_UNKNOWN = 1
    SLOT_UNKNOWN = 2
    SOURCE_RANGE = 3          # offset + size beyond the remote slot
    SOURCE_TENSORS = 4        # remote tensor indices do not exist
    TENSOR_COUNT = 5          # numbers of tensors differ
    BLOCK_SIZE = 6            # strides differ
    SOURCE_BLOCK = 7          # remote block index does not exist
    CACHE_RELEASED = 8        # the local cache was deallocated
    TIMED_OUT = 9
    PEER_DEAD = 10
    REVOKED = 11              # the peer took the link down while the bytes moved
    LINK_CLOSED = 12
    BAD_DIRECTORY = 13        # the peer's directory points outside of its pool
    NO_MEMORY = 14


class TransferFault(Exception):
    """A one-sided transfer failed; tells how, and what the remote cache looks like if it was found."""

    def __init__(self, outcome, remote_tensors=0, remote_slots=0, remote_stride=0):
        super().__init__(outcome)
        self.outcome = outcome
        self.remote_tensors = remote_tensors
        self.remote_slots = remote_slots
        self.remote_stride = remote_stride


# Where an entry was found and what was read of it in one consistent look.
cdef struct Found:
    DirectoryEntry entry
    uint64_t index
    uint64_t hazard


cdef class PeerMemory:
    """The pool, directory, ledger and claim page of a linked peer, mapped into this process.

    Parameters
    ----------
    pool, directory : Segment
        Mapped read-only.
    ledger, claims : Segment
        Mapped writable.

    Raises
    ------
    ValueError
        The segments do not fit together or have another layout version. The caller keeps owning them then; else the
        object owns and closes them.
    """

    cdef Segment _pool
    cdef Segment _directory
    cdef Segment _ledger
    cdef Segment _claims
    cdef const uint64_t *_buckets
    cdef const DirectoryEntry *_entries
    cdef LedgerHeader *_hints
    cdef uint64_t *_leaves
    cdef LedgerRecord *_records
    cdef ClaimPage *_claim
    cdef uint64_t _num_buckets
    cdef uint64_t _num_entries
    cdef uint64_t _peer_dead
    cdef uint64_t _closing
    cdef uint64_t _running                # transfers inside this object

    def __init__(
        self, Segment pool not None, Segment directory not None, Segment ledger not None, Segment claims not None
    ):
        cdef const DirectoryHeader *header = <const DirectoryHeader *>directory.base
        if directory.size < HEADER_BYTES or header.magic != directory_magic() or header.version != LAYOUT_VERSION:
            raise ValueError("the directory of the peer has an unknown layout")
        cdef uint64_t buckets = header.num_buckets
        cdef uint64_t entries = header.num_entries
        if (
            entries == 0 or entries > MAX_ENTRIES or buckets == 0 or buckets > MAX_ENTRIES or buckets & (buckets - 1)
            or directory.size < directory_bytes(buckets, entries) or ledger.size < ledger_bytes(entries)
            or pool.size < header.pool_bytes or claims.size < sizeof(ClaimPage)
        ):
            raise ValueError(
                f"segments of the peer do not fit together: {buckets} buckets, {entries} entries, pool {pool.size},"
                f" directory {directory.size}, ledger {ledger.size}, claim page {claims.size} bytes"
            )
        if (<ClaimPage *>claims.base).magic != claim_magic():
            raise ValueError("the claim page of the peer has an unknown layout")
        if not ledger.writable or not claims.writable:
            raise ValueError("ledger and claim page must be mapped writable")
        self._pool, self._directory, self._ledger, self._claims = pool, directory, ledger, claims
        self._num_buckets = buckets
        self._num_entries = entries
        self._buckets = <const uint64_t *>(directory.base + HEADER_BYTES)
        self._entries = <const DirectoryEntry *>(directory.base + HEADER_BYTES + buckets * sizeof(uint64_t))
        self._hints = <LedgerHeader *>ledger.base
        self._leaves = <uint64_t *>(ledger.base + leaves_offset())
        self._records = <LedgerRecord *>(ledger.base + records_offset())
        self._claim = <ClaimPage *>claims.base

    # ---- life

    def mark_dead(self):
        """The peer died or closed the link: running and later pulls fail at once."""
        exchange(&self._peer_dead, 1)

    @property
    def dead(self) -> bool:
        return load_acquire(&self._peer_dead) != 0

    @property
    def busy(self) -> bool:
        """Whether a pull is running."""
        return load_acquire(&self._running) != 0

    def begin_close(self):
        """Let no new pull start; False, and nothing changed, if one is running."""
        exchange(&self._closing, 1)
        if load_acquire(&self._running) != 0:
            exchange(&self._closing, 0)
            return False
        return True

    def reopen(self):
        """Take `begin_close` back."""
        exchange(&self._closing, 0)

    def close(self, uint64_t deadline_ns):
        """End running pulls with `LINK_CLOSED` and unmap everything; tells whether that was done by the deadline.

        The object may be closed again later; mappings also go with its last reference.
        """
        cdef bint idle
        exchange(&self._closing, 1)
        with nogil:
            while True:
                idle = load_acquire(&self._running) == 0
                if idle or monotonic_ns() > deadline_ns:
                    break
                usleep(20)
        if idle:
            self._close_segments()
        return idle

    def _close_segments(self):
        for segment in (self._pool, self._directory, self._ledger, self._claims):
            if segment is not None:
                segment.close()

    # ---- pulls

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
            raise TransferFault(Outcome(outcome), found.entry.tensors, found.entry.slots, found.entry.stride)

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
            raise TransferFault(Outcome(outcome), found.entry.tensors, found.entry.slots, found.entry.stride)

    cdef Outcome _enter(self) noexcept nogil:
        fetch_add(&self._running, 1)
        if load_acquire(&self._closing) != 0:
            fetch_sub(&self._running, 1)
            return LINK_CLOSED
        return DONE

    cdef Gate _gate(self, uint64_t deadline_ns) noexcept nogil:
        cdef Gate gate
        gate.deadline_ns = deadline_ns
        gate.peer_dead = &self._peer_dead
        gate.revoked = &self._claim.revoked
        gate.closing = &self._closing
        return gate

    cdef Outcome _why_stopped(self) noexcept nogil:
        if load_acquire(&self._closing) != 0:
            return LINK_CLOSED
        if load_acquire(&self._peer_dead) != 0:
            return PEER_DEAD
        return REVOKED

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
        cdef Outcome outcome = self._claim_entry(kind, key_id, model_id, &gate, found)
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
        cdef Outcome outcome = self._claim_entry(BLOCKS_KEY, 0, model_id, &gate, found)
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

    # ---- the directory

    cdef Outcome _claim_entry(
        self, uint64_t kind, uint64_t key_id, uint64_t model_id, const Gate *gate, Found *found
    ) noexcept nogil:
        """Find an entry and put a hazard on its cache; with DONE the memory stays until the hazard is dropped."""
        cdef Outcome outcome
        while True:
            if stopped(gate):
                return self._why_stopped()
            outcome = self._find(kind, key_id, model_id, gate, found)
            if outcome != DONE:
                return outcome
            if not self._is_sound(&found.entry):
                return BAD_DIRECTORY
            if not self._take_hazard(found.entry.cache_id, gate, &found.hazard):
                return self._why_stopped() if stopped(gate) else TIMED_OUT
            fence_full()
            if load_acquire(&self._entries[found.index].generation) == found.entry.generation:
                if kind != ORDINARY_KEY or not self._is_consumed(found):
                    return DONE
            self._drop_hazard(found.hazard)
            if monotonic_ns() > gate.deadline_ns:
                return TIMED_OUT

    cdef Outcome _find(
        self, uint64_t kind, uint64_t key_id, uint64_t model_id, const Gate *gate, Found *found
    ) noexcept nogil:
        cdef const uint64_t *bucket = &self._buckets[bucket_of(kind, key_id, model_id, self._num_buckets)]
        cdef DirectoryEntry *entry = &found.entry
        cdef uint64_t head, link, steps
        while True:
            head = load_acquire(bucket)
            link = head & 0xFFFFFFFFULL
            steps = 0
            while link != 0 and link <= self._num_entries and steps <= self._num_entries:
                if not self._read_entry(link - 1, entry):
                    break  # the owner is changing this chain
                if entry.kind == kind and entry.key_id == key_id and entry.model_id == model_id:
                    found.index = link - 1
                    if kind == ORDINARY_KEY and self._is_consumed(found):
                        return KEY_UNKNOWN
                    return DONE
                link = entry.next
                steps += 1
            if link == 0 and load_acquire(bucket) == head:
                return KEY_UNKNOWN
            if stopped(gate):
                return self._why_stopped()
            if monotonic_ns() > gate.deadline_ns:
                return TIMED_OUT
            relax()

    cdef bint _read_entry(self, uint64_t index, DirectoryEntry *out) noexcept nogil:
        """Copy an entry in one consistent look; False if it is not published or changed meanwhile."""
        cdef const uint64_t *words = <const uint64_t *>&self._entries[index]
        cdef uint64_t *copy = <uint64_t *>out
        cdef uint64_t generation = load_acquire(&words[0])
        cdef uint64_t i
        if generation == 0:
            return False
        for i in range(1, sizeof(DirectoryEntry) // sizeof(uint64_t)):
            copy[i] = load_relaxed(&words[i])
        fence_acquire()
        copy[0] = generation
        return load_relaxed(&words[0]) == generation

    cdef bint _is_sound(self, const DirectoryEntry *entry) noexcept nogil:
        """Whether every byte that the entry names lies inside the mapped pool."""
        cdef uint64_t room = self._pool.size
        if entry.tensors == 0 or entry.slots == 0 or entry.stride == 0 or entry.base > room:
            return False
        room -= entry.base
        if entry.tensor_nbytes > room or entry.slots > entry.tensor_nbytes // entry.stride:
            return False
        room -= entry.tensor_nbytes
        return entry.tensors == 1 or (entry.step != 0 and entry.tensors - 1 <= room // entry.step)

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

    # ---- claims

    cdef bint _take_hazard(self, uint64_t cache_id, const Gate *gate, uint64_t *hazard) noexcept nogil:
        cdef uint64_t taken, free_bits
        while True:
            taken = load_acquire(&self._claim.in_use)
            free_bits = ~taken & 0xFFFFFFFFULL
            if free_bits != 0:
                hazard[0] = lowest_bit(free_bits)
                if compare_exchange(&self._claim.in_use, taken, taken | (<uint64_t>1 << hazard[0])):
                    store_release(&self._claim.hazard[hazard[0]], cache_id)
                    return True
            elif stopped(gate) or monotonic_ns() > gate.deadline_ns:
                return False
            relax()

    cdef void _drop_hazard(self, uint64_t hazard) noexcept nogil:
        store_release(&self._claim.hazard[hazard], 0)
        fetch_and(&self._claim.in_use, ~(<uint64_t>1 << hazard))

    # ---- the ledger

    cdef bint _is_consumed(self, const Found *found) noexcept nogil:
        return load_acquire(&self._records[found.index].fate) == (found.entry.generation << 1 | 1)

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
