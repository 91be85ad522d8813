"""The owner's side of the key directory: publish caches and keys, see what peers claimed and consumed.

One process writes a directory, under one lock that the caller holds. The owner decides on its private shadow of each
entry and on the directory segment, which nobody else can map writable; from memory that peers can write it takes only
single bits about entries it knows (consumed or not, hazard on this cache or not).

An entry appears by its generation, written last, and goes by its generation, written first. Generations only grow, so
whatever a late reader holds of an old entry no longer matches. Entries of a cache go back to the free list together,
when its memory is given up: until then its chain of keys stays walkable for readers that claimed it.
"""

import os
import select

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport uint64_t

from llm_datadist._atomics cimport (
    exchange, fence_full, fetch_add, fetch_sub, load_acquire, lowest_bit, store_relaxed, store_release,
)
from llm_datadist._core cimport (
    BLOCKS_KEY, CACHE_ID, HEADER_BYTES, HIDDEN, LAYOUT_VERSION, MAX_ENTRIES, ORDINARY_KEY, OVERFLOW_BYTES, PRIVATE,
    RECORD_WORDS, REGISTERED, SCATTERED, TABLE_BYTES, DirectoryHeader, Seal, bucket_of, claim_magic, directory_bytes,
    directory_magic, generation_tag, leaves_offset, ledger_bytes, overflow_offset, pulled_words, records_offset,
    read_token, seal_magic, tables_offset,
)

from llm_datadist._pool import Pool, PoolExhausted


class DirectoryFull(Exception):
    """Every entry of the directory is in use, or there is no room for what belongs to an entry."""


def cache_of_token(bytes token not None):
    """Give the id of the cache whose blocks a token stands for; raises ValueError if it is no token."""
    cdef Seal seal
    read_token(token, &seal)
    return seal.cache_id


cdef class Claims:
    """Claim page of one link, seen by its owner: what that peer is reading or writing right now.

    Parameters
    ----------
    by_threads : bool
        Whether threads of this process claim in the name of the peer: these are counted, and known to end.
    """

    def __cinit__(self):
        self._pidfd = -1

    def __init__(self, bint by_threads=False):
        self._by_threads = by_threads
        self.segment = Segment.create("llm_datadist:claims", sizeof(ClaimPage), peers_may_write=True)
        self._page = <ClaimPage *>self.segment.base
        self._page.magic = claim_magic()

    @property
    def busy(self) -> bool:
        """Whether a pull of the peer is running."""
        return load_acquire(&self._page.in_use) != 0

    def holds(self, uint64_t cache_id):
        """Whether the peer reads that cache right now; ask only after the cache was unpublished and a full fence."""
        cdef uint64_t left = load_acquire(&self._page.in_use) & 0xFFFFFFFFULL
        cdef unsigned i
        while left != 0:
            i = lowest_bit(left)
            if load_acquire(&self._page.hazard[i]) == cache_id:
                return True
            left &= left - 1
        return False

    def watch(self, int pidfd):
        """Take over a descriptor of the peer's process, which tells when it has ended."""
        self._pidfd = pidfd

    def revoke(self):
        """Tell the peer that from now on its copies prove nothing: memory it reads may be reused."""
        exchange(&self._page.revoked, 1)

    def enter(self):
        """Take in that a thread of this process begins to use the page; `leave` must follow."""
        fetch_add(&self._users, 1)

    def leave(self):
        fetch_sub(&self._users, 1)

    @property
    def has_stopped(self) -> bool:
        """Whether a peer whose claims are revoked touches no memory any more."""
        if self._by_threads:
            return load_acquire(&self._users) == 0
        if not self.busy:
            return True
        if self._pidfd < 0:
            return True  # not known: as if it had ended
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def close(self):
        self.segment.close()
        if self._pidfd >= 0:
            descriptor, self._pidfd = self._pidfd, -1
            os.close(descriptor)

    def __dealloc__(self):
        if self._pidfd >= 0:
            os.close(self._pidfd)


cdef class Directory:
    """Caches and keys of this process, for peers to find.

    Parameters
    ----------
    pool_bytes, pool_address : int
        Size of the pool segment that the entries refer to, and its address in this process.
    num_entries : int
        Most caches and keys that can be published at one time; a power of two up to 2**18.
    """

    def __init__(self, uint64_t pool_bytes, uint64_t pool_address, uint64_t num_entries=MAX_ENTRIES):
        if num_entries == 0 or num_entries > MAX_ENTRIES or num_entries & (num_entries - 1):
            raise ValueError(f"num_entries is {num_entries}, should be a power of two up to {MAX_ENTRIES}")
        self.num_entries = num_entries
        self._num_buckets = num_entries
        self.segment = Segment.create(
            "llm_datadist:directory", directory_bytes(self._num_buckets, num_entries), peers_may_write=False
        )
        self.ledger = Segment.create("llm_datadist:ledger", ledger_bytes(num_entries), peers_may_write=True)
        self._buckets = <uint64_t *>(self.segment.base + HEADER_BYTES)
        self._entries = <DirectoryEntry *>(
            self.segment.base + HEADER_BYTES + self._num_buckets * sizeof(uint64_t)
        )
        self._hints = <LedgerHeader *>self.ledger.base
        self._leaves = <uint64_t *>(self.ledger.base + leaves_offset())
        self._records = <LedgerRecord *>(self.ledger.base + records_offset())
        self._shadows = <Shadow *>PyMem_Calloc(num_entries, sizeof(Shadow))
        self._heads = <uint64_t *>PyMem_Calloc(self._num_buckets, sizeof(uint64_t))
        self._free = <uint64_t *>PyMem_Calloc(num_entries, sizeof(uint64_t))
        if self._shadows == NULL or self._heads == NULL or self._free == NULL:
            raise MemoryError()
        self._overflow = Pool(OVERFLOW_BYTES)
        self._tables = <uint64_t *>(self.segment.base + tables_offset(self._num_buckets, num_entries))
        self._table_pool = Pool(TABLE_BYTES)
        # A token that was given out by an earlier run of this process must not fit.
        self._seal_generation = <uint64_t>int.from_bytes(os.urandom(7), "little") + 1
        self._claims = []
        self._leaving = []
        cdef DirectoryHeader *header = <DirectoryHeader *>self.segment.base
        header.version = LAYOUT_VERSION
        header.num_buckets = self._num_buckets
        header.num_entries = num_entries
        header.pool_bytes = pool_bytes
        header.pool_address = pool_address
        header.ledger_bytes = self.ledger.size
        store_release(&header.magic, directory_magic())

    def __dealloc__(self):
        PyMem_Free(self._shadows)
        PyMem_Free(self._heads)
        PyMem_Free(self._free)

    def close(self):
        """Close both segments; may be called twice. No other method may be called afterwards."""
        for claims in self._leaving:
            claims.close()
        self._leaving.clear()
        self.segment.close()
        self.ledger.close()

    # ---- entries

    def publish_cache(
        self, uint64_t cache_id, uint64_t base, uint64_t step, uint64_t tensor_nbytes, uint64_t stride,
        uint64_t tensors, uint64_t slots, list addresses=None, *, bint private=False, bint registered=False,
        bint hidden=False,
    ):
        """Make a cache visible by its id.

        Parameters
        ----------
        cache_id : int
            Not 0, never used before in this directory.
        base, step : int
            Offset of the first tensor in the pool; bytes from one tensor to the next.
        tensor_nbytes, stride : int
            Bytes of one tensor and of one slot.
        tensors, slots : int
            Numbers of tensors and of slots, > 0.
        addresses : list of int, optional
            Address of each tensor in this process, when they do not follow each other in the pool; `base` and `step`
            are ignored then.
        private : bool
            Not all addresses are in the pool.
        registered : bool
            Pulls never release keys of the cache.
        hidden : bool
            Peers may not touch the cache.

        Returns
        -------
        int
            Index of the entry, for `publish_key`, `unpublish` and `release`.

        Raises
        ------
        DirectoryFull
            No entry is free.
        """
        cdef uint64_t index = self._take_entry()
        cdef DirectoryEntry *entry = &self._entries[index]
        cdef uint64_t flags = 0
        if addresses is not None:
            try:
                base = self._write_table(index, addresses)
            except PoolExhausted:
                self._give_back(index)
                raise DirectoryFull(f"no room for the addresses of {tensors} tensors") from None
            flags = SCATTERED | PRIVATE if private else SCATTERED
        if registered:
            flags |= REGISTERED
        if hidden:
            flags |= HIDDEN
        store_relaxed(&entry.cache_id, cache_id)
        store_relaxed(&entry.base, base)
        store_relaxed(&entry.step, step)
        store_relaxed(&entry.tensor_nbytes, tensor_nbytes)
        store_relaxed(&entry.stride, stride)
        store_relaxed(&entry.tensors, tensors)
        store_relaxed(&entry.slots, slots)
        store_relaxed(&entry.slot, 0)
        store_relaxed(&entry.annex, 0)
        store_relaxed(&entry.flags, flags)
        self._shadows[index].cache_id = cache_id
        self._shadows[index].last_sibling = index
        self._link(index, CACHE_ID, cache_id, 0)
        return index

    def publish_key(self, uint64_t cache_index, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t slot):
        """Give the cache of entry `cache_index` a key; the caller has made sure that the key is not bound.

        Returns the index of the key's entry. Raises `DirectoryFull`.
        """
        cdef uint64_t index = self._take_entry()
        cdef DirectoryEntry *entry = &self._entries[index]
        cdef DirectoryEntry *cache = &self._entries[cache_index]
        cdef Shadow *chain = &self._shadows[cache_index]
        store_relaxed(&entry.cache_id, chain.cache_id)
        store_relaxed(&entry.base, cache.base)
        store_relaxed(&entry.step, cache.step)
        store_relaxed(&entry.tensor_nbytes, cache.tensor_nbytes)
        store_relaxed(&entry.stride, cache.stride)
        store_relaxed(&entry.tensors, cache.tensors)
        store_relaxed(&entry.slots, cache.slots)
        store_relaxed(&entry.slot, slot)
        store_relaxed(&entry.annex, chain.seals)
        store_relaxed(&entry.flags, cache.flags)
        self._shadows[index].cache_id = chain.cache_id
        if kind == ORDINARY_KEY:
            try:
                self._prepare_record(index, cache.tensors)
            except PoolExhausted:
                self._give_back(index)
                raise DirectoryFull(f"no room to note which of {cache.tensors} tensors were pulled") from None
        self._link(index, kind, key_id, model_id)
        store_release(&self._entries[chain.last_sibling].sibling, index + 1)
        chain.last_sibling = index
        return index

    def unpublish(self, uint64_t index):
        """Hide an entry: no claim that starts from now on can find it. It stays reserved until `release`."""
        if self._shadows[index].generation == 0:
            raise ValueError(f"entry {index} is not published")
        store_release(&self._entries[index].generation, 0)
        store_release(&self._records[index].fate, 0)
        self._shadows[index].generation = 0
        self._unlink(index)

    def release(self, uint64_t index):
        """Make an unpublished entry available again; for all entries of a cache, when its memory is given up."""
        if self._shadows[index].generation != 0:
            raise ValueError(f"entry {index} is still published")
        if self._shadows[index].overflow != 0:
            self._overflow.free(self._shadows[index].overflow - 1)
            self._shadows[index].overflow = 0
        if self._shadows[index].table != 0:
            self._table_pool.free(self._shadows[index].table - 1)
            self._shadows[index].table = 0
        if self._shadows[index].seals != 0:
            self._table_pool.free(self._shadows[index].seals - 1)
            self._shadows[index].seals = 0
        self._give_back(index)

    cdef int _write_table(self, uint64_t index, list addresses) except -1:
        """Write the addresses of tensors down; returns the offset of the table."""
        cdef uint64_t offset = self._table_pool.allocate((len(addresses) + 1) * sizeof(uint64_t))
        cdef uint64_t *table = self._tables + offset // sizeof(uint64_t)
        cdef Py_ssize_t i
        self._shadows[index].table = offset + 1
        for i in range(len(addresses)):
            store_relaxed(&table[i], addresses[i])
        return offset

    # ---- seals

    def seal(self, uint64_t cache_index, list blocks not None, uint64_t expires_ns):
        """Seal blocks of a cache under a new generation; seals that they had before are broken.

        Parameters
        ----------
        cache_index : int
            Entry of the cache's id.
        blocks : list of int
            Blocks of the cache, which must exist.
        expires_ns : int
            When the seals break by themselves, on the clock of ``time.monotonic_ns``; 0 = never.

        Returns
        -------
        bytes
            Token for pulls; the seals are broken with it.

        Raises
        ------
        DirectoryFull
            No room for the seals.
        """
        cdef uint64_t *seals = self._seals_of(cache_index)
        cdef uint64_t slots = self._entries[cache_index].slots
        cdef uint64_t block
        cdef Seal token
        for block in blocks:
            if block >= slots:
                raise ValueError(f"block {block} is out of range, the cache has {slots} blocks")
        self._seal_generation += 1
        for block in blocks:
            store_release(&seals[block], self._seal_generation)
        token.magic = seal_magic()
        token.cache_id = self._shadows[cache_index].cache_id
        token.generation = self._seal_generation
        token.expires_ns = expires_ns
        return PyBytes_FromStringAndSize(<char *>&token, sizeof(Seal))

    def break_seals(self, uint64_t cache_index, list blocks not None, bytes token not None):
        """Break the seals that a token stands for; blocks that were sealed anew keep their new ones.

        When it returns no pull with the token that reads a later content of the blocks can succeed.

        Returns
        -------
        list of int
            Blocks whose seals were broken.
        """
        cdef list broken = []
        cdef uint64_t *seals = self._seals_of(cache_index)
        cdef uint64_t block
        cdef Seal seal
        read_token(token, &seal)
        for block in blocks:
            if seals[block] == seal.generation:
                store_release(&seals[block], 0)
                broken.append(block)
        fence_full()
        return broken

    cdef uint64_t *_seals_of(self, uint64_t cache_index) except NULL:
        """Give the seals of a published cache; makes them, all broken, for its first token."""
        cdef Shadow *shadow = &self._shadows[cache_index]
        cdef uint64_t slots = self._entries[cache_index].slots
        cdef uint64_t link, i
        cdef uint64_t *seals
        if shadow.seals == 0:
            try:
                shadow.seals = self._table_pool.allocate(slots * sizeof(uint64_t)) + 1
            except PoolExhausted:
                raise DirectoryFull(f"no room for the seals of {slots} blocks") from None
            seals = self._tables + (shadow.seals - 1) // sizeof(uint64_t)
            for i in range(slots):
                store_relaxed(&seals[i], 0)
            link = cache_index + 1
            while link != 0:
                if self._shadows[link - 1].kind == CACHE_ID or self._shadows[link - 1].kind == BLOCKS_KEY:
                    store_release(&self._entries[link - 1].annex, shadow.seals)
                link = self._entries[link - 1].sibling
        return self._tables + (shadow.seals - 1) // sizeof(uint64_t)

    cdef uint64_t _take_entry(self) except? 0xFFFFFFFFULL:
        cdef uint64_t index
        if self._num_free != 0:
            self._num_free -= 1
            index = self._free[self._num_free]
        elif self._fresh < self.num_entries:
            index = self._fresh
            self._fresh += 1
            store_release(&(<DirectoryHeader *>self.segment.base).high_water, self._fresh)
        else:
            raise DirectoryFull(f"all {self.num_entries} entries of the key directory are in use")
        self.used_entries += 1
        store_relaxed(&self._entries[index].sibling, 0)
        return index

    cdef void _give_back(self, uint64_t index) noexcept:
        self._free[self._num_free] = index
        self._num_free += 1
        self.used_entries -= 1

    cdef int _link(self, uint64_t index, uint64_t kind, uint64_t key_id, uint64_t model_id) except -1:
        """Publish a filled entry at the head of its bucket."""
        cdef DirectoryEntry *entry = &self._entries[index]
        cdef Shadow *shadow = &self._shadows[index]
        cdef uint64_t bucket = bucket_of(kind, key_id, model_id, self._num_buckets)
        cdef uint64_t head = self._heads[bucket]
        self._generation += 1
        shadow.generation = self._generation
        shadow.kind = kind
        shadow.bucket = bucket
        shadow.next = head & 0xFFFFFFFFULL
        store_relaxed(&entry.kind, kind)
        store_relaxed(&entry.key_id, key_id)
        store_relaxed(&entry.model_id, model_id)
        store_relaxed(&entry.next, shadow.next)
        if kind == ORDINARY_KEY:
            self._start_record(index)
        store_release(&entry.generation, self._generation)
        self._set_head(bucket, index + 1)
        return 0

    cdef void _unlink(self, uint64_t index) noexcept:
        cdef uint64_t bucket = self._shadows[index].bucket
        cdef uint64_t after = self._shadows[index].next
        cdef uint64_t head = self._heads[bucket] & 0xFFFFFFFFULL
        cdef uint64_t link
        if head == index + 1:
            self._set_head(bucket, after)
            return
        link = head - 1
        while self._shadows[link].next != index + 1:
            link = self._shadows[link].next - 1
        self._shadows[link].next = after
        store_release(&self._entries[link].next, after)
        self._set_head(bucket, head)

    cdef void _set_head(self, uint64_t bucket, uint64_t link) noexcept:
        # The version in the upper half tells a reader that found nothing whether the chain changed under it.
        self._heads[bucket] = ((self._heads[bucket] >> 32) + 1) << 32 | link
        store_release(&self._buckets[bucket], self._heads[bucket])

    # ---- what peers did

    cdef int _prepare_record(self, uint64_t index, uint64_t tensors) except -1:
        cdef uint64_t words = pulled_words(tensors)
        cdef uint64_t offset = records_offset() + index * sizeof(LedgerRecord) + sizeof(uint64_t)
        if words > RECORD_WORDS:
            offset = self._overflow.allocate(words * sizeof(uint64_t))
            self._shadows[index].overflow = offset + 1
            offset += overflow_offset(self.num_entries)
        store_relaxed(&self._entries[index].annex, offset)
        return 0

    cdef void _start_record(self, uint64_t index) noexcept:
        cdef DirectoryEntry *entry = &self._entries[index]
        cdef uint64_t *pulled = <uint64_t *>(self.ledger.base + entry.annex)
        cdef uint64_t i
        for i in range(pulled_words(entry.tensors)):
            store_relaxed(&pulled[i], generation_tag(self._generation))
        store_relaxed(&self._records[index].fate, self._generation << 1)

    cdef bint _is_consumed(self, uint64_t index) noexcept:
        cdef uint64_t generation = self._shadows[index].generation
        if generation == 0 or self._shadows[index].kind != ORDINARY_KEY:
            return False
        return load_acquire(&self._records[index].fate) == (generation << 1 | 1)

    def is_consumed(self, uint64_t index):
        """Whether a peer has pulled the ordinary key of that entry completely."""
        return self._is_consumed(index)

    @property
    def has_hints(self) -> bool:
        """Whether a peer consumed a key since the last `take_consumed`."""
        return load_acquire(&self._hints.top) != 0

    def take_consumed(self):
        """List the entries of keys that were consumed since the last call, as the peers' hints tell."""
        cdef list found = []
        cdef uint64_t top, summary, leaf, i, j, index
        if load_acquire(&self._hints.top) == 0:
            return found
        top = exchange(&self._hints.top, 0)
        while top != 0:
            i = lowest_bit(top)
            top &= top - 1
            summary = exchange(&self._hints.summary[i], 0)
            while summary != 0:
                j = lowest_bit(summary)
                summary &= summary - 1
                leaf = exchange(&self._leaves[i * 64 + j], 0)
                while leaf != 0:
                    index = (i * 64 + j) * 64 + lowest_bit(leaf)
                    leaf &= leaf - 1
                    if index < self._fresh and self._is_consumed(index):
                        found.append(index)
        return found

    def scan_consumed(self):
        """List the entries of all consumed keys; for after the death of a peer that may not have left its hint."""
        cdef uint64_t index
        return [index for index in range(self._fresh) if self._is_consumed(index)]

    def add_claims(self, Claims claims not None):
        """Honour the claims of a linked peer."""
        self._claims.append(claims)

    def drop_claims(self, Claims claims not None):
        """Forget the claims of a peer whose link is gone; they are revoked, so a living peer learns of it."""
        claims.revoke()
        self._claims.remove(claims)
        self._close_claims_that_left()
        if claims.has_stopped:
            claims.close()
        else:
            self._leaving.append(claims)  # it sees the revocation within a millisecond, if it runs

    def _close_claims_that_left(self):
        """Close the claims of peers that touch no memory any more; the next look or the next lost link comes here."""
        cdef Claims claims
        for claims in list(self._leaving):
            if claims.has_stopped:
                self._leaving.remove(claims)
                claims.close()

    def is_claimed(self, uint64_t cache_id):
        """Whether a linked peer reads that cache; all entries of the cache must be unpublished before."""
        cdef Claims claims
        # Pairs with the fence between a reader's hazard and its second look at the generation.
        fence_full()
        for claims in self._claims:
            if claims.holds(cache_id):
                return True
        self._close_claims_that_left()
        for claims in self._leaving:
            if claims.holds(cache_id):
                return True
        return False
