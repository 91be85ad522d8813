"""What a linked peer shares, mapped into this process: find an entry of its directory, claim it, let it go.

A claim is the id of a cache in a hazard word of the link's claim page. Whoever claims writes the word, fences, and
looks at the entry again; the owner takes the entry back, fences, and looks at the words: at least one of them sees the
other, so memory is never reused under a claim that was confirmed.
"""

from libc.stdint cimport uint64_t

from llm_datadist._atomics cimport (
    compare_exchange, exchange, fence_acquire, fence_full, fetch_add, fetch_and, fetch_sub, load_acquire, load_relaxed,
    lowest_bit, monotonic_ns, relax, store_release,
)
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._segment cimport Segment

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)


class TransferFault(Exception):
    """A one-sided transfer failed; tells how, and what the remote cache looks like if it was found."""

    def __init__(self, outcome, remote_tensors=0, remote_slots=0, remote_stride=0):
        self.outcome = Outcome(outcome)
        super().__init__(self.outcome)
        self.remote_tensors = remote_tensors
        self.remote_slots = remote_slots
        self.remote_stride = remote_stride


cdef class PeerMemory:
    """The pool, directory, ledger and claim page of a linked peer, mapped into this process.

    Parameters
    ----------
    pool, directory : Segment
        The directory is mapped read-only; the pool writable where this process may push into it.
    ledger, claims : Segment
        Mapped writable.

    Raises
    ------
    ValueError
        The segments do not fit together or have another layout version. The caller keeps owning them then; else the
        object owns and closes them.
    """

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
        self._header = header
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

    # ---- transfers

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

    # ---- the directory

    cdef Outcome _claim_key(
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
            outcome = self._claim_found(found, gate)
            if outcome != KEY_UNKNOWN:
                return outcome
            if monotonic_ns() > gate.deadline_ns:
                return TIMED_OUT

    cdef Outcome _claim_found(self, Found *found, const Gate *gate) noexcept nogil:
        """Put a hazard on the cache of an entry that was read; KEY_UNKNOWN if the entry has gone meanwhile."""
        if not self._is_sound(&found.entry):
            return BAD_DIRECTORY
        if not self._take_hazard(found.entry.cache_id, gate, &found.hazard):
            return self._why_stopped() if stopped(gate) else TIMED_OUT
        # Pairs with the fence of the owner between unpublishing an entry and looking at the hazards.
        fence_full()
        if load_acquire(&self._entries[found.index].generation) == found.entry.generation:
            if found.entry.kind != ORDINARY_KEY or not self._is_consumed(found):
                return DONE
        self._drop_hazard(found.hazard)
        return KEY_UNKNOWN

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

    cdef bint _is_consumed(self, const Found *found) noexcept nogil:
        return load_acquire(&self._records[found.index].fate) == (found.entry.generation << 1 | 1)
