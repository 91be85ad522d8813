"""What a linked peer shares, mapped into this process: find an entry of its directory, claim it, let it go.

A claim is the id of a cache in a hazard word of the link's claim page. Whoever claims writes the word, fences, and
looks at the entry again; the owner takes the entry back, fences, and looks at the words: at least one of them sees the
other, so memory is never reused under a claim that was confirmed.
"""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from llm_datadist._atomics cimport (
    compare_exchange, fence_acquire, fence_full, fetch_and, load_acquire, load_relaxed, lowest_bit, monotonic_ns, relax,
    store_release,
)
from llm_datadist._channel cimport ask
from llm_datadist._copy cimport (
    COPIED, COPY_DENIED, COPY_NO_PROCESS, COPY_TIMED_OUT, IN_PROCESS, READ_PROCESS, WRITE_PROCESS,
    CopyOutcome, Gate, Plan, Run, execute, execute_shared, stopped,
)
from llm_datadist._link_end cimport LinkEnd
from llm_datadist._outcome cimport (
    BAD_DIRECTORY, DONE, KEY_UNKNOWN, MEMORY_DENIED, MEMORY_FAULT, PEER_DEAD, TARGET_READ_ONLY, TIMED_OUT, Outcome,
)
from llm_datadist._segment cimport Memory, Segment

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *descriptors, unsigned long count, int timeout_ms)
    short POLLIN


cdef enum:
    ENDING_MS = 50            # between the closed files of a process and its end


cdef int read_token(bytes token, Seal *seal) except -1:
    """Unpack a token of sealed blocks; raises ValueError if it is none."""
    if PyBytes_GET_SIZE(token) == sizeof(Seal):
        memcpy(seal, PyBytes_AS_STRING(token), sizeof(Seal))
        if seal.magic == seal_magic():
            return 0
    raise ValueError(f"token {token[:16].hex()}... of {len(token)} bytes was not made by publish_blocks")


cdef class PeerMemory(LinkEnd):
    """The pool, directory, ledger and claim page of a linked peer, mapped into this process.

    Parameters
    ----------
    pool : Memory
        Writable where this process may push into it.
    directory : Segment
        Mapped read-only.
    ledger, claims : Segment
        Mapped writable.

    Raises
    ------
    ValueError
        The segments do not fit together or have another layout version. The caller keeps owning them then; else the
        object owns and closes them.
    """

    def __cinit__(self):
        self._pidfd = -1

    def __init__(
        self, Memory pool not None, Segment directory not None, Segment ledger not None, Segment claims not None
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
        self._tables = <const uint64_t *>(directory.base + tables_offset(buckets, entries))
        self._hints = <LedgerHeader *>ledger.base
        self._leaves = <uint64_t *>(ledger.base + leaves_offset())
        self._records = <LedgerRecord *>(ledger.base + records_offset())
        self._claim = <ClaimPage *>claims.base

    def __dealloc__(self):
        self._close_pidfd()

    cdef int _close_pidfd(self) except -1:
        if self._pidfd >= 0:
            descriptor, self._pidfd = self._pidfd, -1
            os.close(descriptor)
        return 0

    # ---- private memory

    def watch_process(self, int pidfd):
        """Take over a descriptor of the peer's process, which tells when it has ended; -1 = none is to be had."""
        self._close_pidfd()
        self._pidfd = pidfd

    def reach_process(self, int pid):
        """Try to read memory of the peer's process through the kernel, and go that way from now on if it may be done.

        Parameters
        ----------
        pid : int
            The process, as this one sees it; > 0.

        Returns
        -------
        bool
            False if the kernel denies it, or the peer is gone.
        """
        cdef uint64_t word = 0
        cdef uint64_t source = self._header.pool_address
        cdef uint64_t target = <uint64_t>&word
        cdef Run run = Run(source=0, target=0, nbytes=sizeof(uint64_t))
        cdef Gate gate = self._gate(0)
        cdef Plan plan = Plan(
            sources=&source, targets=&target, tensors=1, runs=&run, num_runs=1, carrier=READ_PROCESS, pid=pid
        )
        if execute(&plan, &gate) != COPIED or self._peer_has_ended(0):
            return False
        self._pid = pid
        return True

    cdef bint _peer_has_ended(self, int wait_ms) noexcept nogil:
        cdef pollfd watched
        if self._pidfd < 0:
            return load_acquire(&self._peer_dead) != 0
        watched.fd = self._pidfd
        watched.events = POLLIN
        watched.revents = 0
        return poll(&watched, 1, wait_ms) > 0

    cdef Gate _gate(self, uint64_t deadline_ns) noexcept nogil:
        cdef Gate gate = LinkEnd._gate(self, deadline_ns)
        gate.revoked = &self._claim.revoked
        return gate

    def _release(self):
        for segment in (self._pool, self._directory, self._ledger, self._claims):
            if segment is not None:
                segment.close()
        self._close_pidfd()

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
                    if entry.flags & HIDDEN or kind == ORDINARY_KEY and self._is_consumed(found):
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
        if entry.tensors == 0 or entry.slots == 0 or entry.stride == 0:
            return False
        if entry.slots > entry.tensor_nbytes // entry.stride:
            return False
        if entry.flags & SCATTERED:
            return self._is_table(entry.base, entry.tensors)
        if entry.base > room or entry.tensor_nbytes > room - entry.base:
            return False
        room -= entry.base + entry.tensor_nbytes
        return entry.tensors == 1 or (entry.step != 0 and entry.tensors - 1 <= room // entry.step)

    cdef bint _is_table(self, uint64_t offset, uint64_t words) noexcept nogil:
        """Whether so many words from an offset lie inside the tables."""
        return offset % sizeof(uint64_t) == 0 and offset <= TABLE_BYTES and (
            words <= (TABLE_BYTES - offset) // sizeof(uint64_t)
        )

    cdef Outcome _addresses(
        self, const DirectoryEntry *entry, uint64_t first, uint64_t count, uint64_t *out
    ) noexcept nogil:
        """Give addresses of tensors of a claimed, sound entry: here, or in the peer if its memory is private."""
        cdef const uint64_t *table
        cdef uint64_t i, offset
        if not entry.flags & SCATTERED:
            for i in range(count):
                out[i] = self._pool.base + entry.base + (first + i) * entry.step
            return DONE
        table = &self._tables[entry.base // sizeof(uint64_t) + first]
        for i in range(count):
            out[i] = load_relaxed(&table[i])
            if not entry.flags & PRIVATE:
                offset = out[i] - self._header.pool_address
                if offset > self._pool.size or entry.tensor_nbytes > self._pool.size - offset:
                    return BAD_DIRECTORY
                out[i] = self._pool.base + offset
        return DONE

    cdef bint _is_sealed(
        self, const DirectoryEntry *entry, const Seal *seal, const uint64_t *blocks, uint64_t count
    ) noexcept nogil:
        """Whether all these blocks, which exist, are still what a token was given out for."""
        cdef const uint64_t *seals
        cdef uint64_t i
        if entry.cache_id != seal.cache_id or entry.annex == 0 or not self._is_table(entry.annex - 1, entry.slots):
            return False
        if seal.expires_ns != 0 and monotonic_ns() >= seal.expires_ns:
            return False
        seals = &self._tables[(entry.annex - 1) // sizeof(uint64_t)]
        for i in range(count):
            if load_acquire(&seals[blocks[i]]) != seal.generation:
                return False
        return True

    # ---- bytes

    cdef Outcome _carry(self, Plan *plan, const Found *found, bint writing, const Gate *gate) noexcept nogil:
        """Move the bytes of a plan; they count only if the link was whole until the end.

        The remote side of the plan, its targets when `writing`, lies in the claimed cache `found`; if that is private,
        it has addresses of the peer's process.
        """
        cdef bint private = found.entry.flags & PRIVATE != 0
        cdef CopyOutcome copied
        plan.carrier = IN_PROCESS
        plan.pid = self._pid
        if private:
            if self._pid == 0:
                return self._carry_by_channel(plan, found, writing, gate)
            plan.carrier = WRITE_PROCESS if writing else READ_PROCESS
        elif writing and not self._pool.writable:
            return TARGET_READ_ONLY
        copied = execute_shared(plan, gate, self._threads, False)
        # The owner revokes before it reuses memory, so a copy that ended before that is good.
        fence_full()
        if stopped(gate):
            return self._why_stopped()
        if copied == COPY_TIMED_OUT:
            return TIMED_OUT
        if copied == COPY_NO_PROCESS or private and self._peer_has_ended(0):
            return PEER_DEAD  # and its number may be that of another process by now
        if copied == COPY_DENIED:
            return MEMORY_DENIED
        return DONE if copied == COPIED else MEMORY_FAULT

    cdef Outcome _carry_by_channel(
        self, Plan *plan, const Found *found, bint writing, const Gate *gate
    ) noexcept nogil:
        """Have the data server of the peer move the bytes."""
        cdef bint whole = True
        cdef Outcome outcome
        cdef int descriptor = self._take_channel(gate)
        if descriptor < 0:
            if stopped(gate):
                return self._why_stopped()
            return MEMORY_DENIED if load_acquire(&self._num_channels) == 0 else TIMED_OUT
        outcome = <Outcome>ask(descriptor, plan, writing, found.index, found.entry.generation, gate, &whole)
        if whole:
            self._keep_channel(descriptor)
        else:
            self._drop_channel(descriptor)
        fence_full()
        if stopped(gate):
            return self._why_stopped()
        # The server closes the stream when it comes to memory that is not there. A process that ends closes it too, a
        # moment before it counts as ended.
        if outcome == PEER_DEAD and not self._peer_has_ended(ENDING_MS):
            return MEMORY_FAULT
        return outcome

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
