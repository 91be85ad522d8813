# The layout of everything that processes share, in one place. Every field is a 64-bit word at an aligned offset.
#
#   directory segment   one writer (the owner), peers map it read-only
#       DirectoryHeader, padded to a page
#       buckets[num_buckets]              version << 32 | index of the first entry + 1
#       entries[num_entries]              DirectoryEntry
#       tables                            addresses of tensors that do not follow each other; seals of blocks
#   ledger segment      written by the owner and by every linked peer
#       LedgerHeader, padded to a page    hints: which ordinary keys were pulled
#       hint leaves                       one bit an entry
#       records[num_entries]              LedgerRecord
#       overflow                          pulled-tensor words of caches with more tensors than a record has room for
#   claim page          one a link, written by the owner and by that one peer
#
# Readers never trust a word: indices and ranges are checked against the sizes of the mappings before they are followed.

from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate, Plan
from llm_datadist._link_end cimport LinkEnd
from llm_datadist._outcome cimport Outcome
from llm_datadist._segment cimport Memory, Segment

cdef enum:
    HEADER_BYTES = 4096
    LAYOUT_VERSION = 2
    MAX_ENTRIES = 1 << 18     # 64 * 64 * 64: the hints have three levels
    HAZARDS = 32              # pulls that may run on one link at the same time
    RECORD_WORDS = 7          # pulled-tensor words inside a LedgerRecord
    TENSORS_PER_WORD = 48     # the upper 16 bits of such a word tell the generation
    OVERFLOW_BYTES = 1 << 24
    TABLE_BYTES = 1 << 26     # pages are taken as tables are written

cdef enum Kind:
    ORDINARY_KEY = 1          # key_id = req_id
    PREFIX_KEY = 2            # key_id = prefix_id
    BLOCKS_KEY = 3            # key_id = 0
    CACHE_ID = 4              # key_id = cache id, model_id = 0

cdef enum EntryFlag:
    SCATTERED = 1             # base is the offset in the tables of the address of each tensor, as its owner sees it
    PRIVATE = 2               # scattered, and not all addresses are in the pool: memory of the owner alone
    REGISTERED = 4            # memory of the owner's program: a pull never releases a key
    HIDDEN = 8                # peers may not touch it

cdef struct DirectoryHeader:
    uint64_t magic
    uint64_t version
    uint64_t num_buckets
    uint64_t num_entries
    uint64_t pool_bytes
    uint64_t pool_address     # in the owner's process: addresses that it hands out are translated with it
    uint64_t high_water       # entries from here on were never used
    uint64_t ledger_bytes

cdef struct DirectoryEntry:   # 128 bytes, two cache lines
    uint64_t generation       # 0: not published. Written last when an entry appears, first when it goes
    uint64_t kind
    uint64_t key_id
    uint64_t model_id
    uint64_t next             # index of the next entry of the bucket + 1
    uint64_t cache_id
    uint64_t base             # offset of the first tensor in the pool, unless it is SCATTERED
    uint64_t step             # bytes from one tensor to the next, unless it is SCATTERED
    uint64_t tensor_nbytes
    uint64_t stride           # bytes of one slot
    uint64_t tensors
    uint64_t slots
    uint64_t slot             # slot that an ordinary or prefix key names
    uint64_t sibling          # index of the next key entry of the same cache + 1; starts at the CACHE_ID entry
    # Of an ORDINARY_KEY the offset of the pulled-tensor words in the ledger; of a CACHE_ID or BLOCKS_KEY the offset in
    # the tables of the seals of the blocks + 1, 0 = none.
    uint64_t annex
    uint64_t flags            # EntryFlag

cdef struct LedgerHeader:
    uint64_t top              # bit i: summary[i] is not zero
    uint64_t summary[64]      # bit j of word i: hint leaf 64 * i + j is not zero

cdef struct LedgerRecord:     # 64 bytes, one cache line
    uint64_t fate             # generation << 1 | pulled completely
    uint64_t pulled[RECORD_WORDS]

cdef struct ClaimPage:
    uint64_t magic
    uint64_t revoked          # the owner took the link down; bytes copied after that prove nothing
    uint64_t in_use           # bit i: hazard i belongs to a running pull
    uint64_t padding[5]
    uint64_t hazard[HAZARDS]  # id of the cache that the pull reads; ids are never used again


cdef inline uint64_t directory_magic() noexcept nogil:
    return 0x4C4C4D4444495231ULL  # "LLMDDIR1"

cdef inline uint64_t claim_magic() noexcept nogil:
    return 0x4C4C4D44434C4D31ULL  # "LLMDCLM1"

cdef inline uint64_t directory_bytes(uint64_t num_buckets, uint64_t num_entries) noexcept nogil:
    return tables_offset(num_buckets, num_entries) + TABLE_BYTES

cdef inline uint64_t tables_offset(uint64_t num_buckets, uint64_t num_entries) noexcept nogil:
    return HEADER_BYTES + num_buckets * sizeof(uint64_t) + num_entries * sizeof(DirectoryEntry)

cdef inline uint64_t leaves_offset() noexcept nogil:
    return HEADER_BYTES

cdef inline uint64_t records_offset() noexcept nogil:
    return HEADER_BYTES + MAX_ENTRIES // 8

cdef inline uint64_t overflow_offset(uint64_t num_entries) noexcept nogil:
    return records_offset() + num_entries * sizeof(LedgerRecord)

cdef inline uint64_t ledger_bytes(uint64_t num_entries) noexcept nogil:
    return overflow_offset(num_entries) + OVERFLOW_BYTES

cdef inline uint64_t pulled_words(uint64_t tensors) noexcept nogil:
    return (tensors + TENSORS_PER_WORD - 1) // TENSORS_PER_WORD

cdef inline uint64_t generation_tag(uint64_t generation) noexcept nogil:
    return (generation & 0xFFFF) << TENSORS_PER_WORD

cdef inline uint64_t bucket_of(uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t num_buckets) noexcept nogil:
    # The finalizer of splitmix64 (Steele, Lea, Flood 2014); num_buckets is a power of two.
    cdef uint64_t x = key_id + kind * 0x9E3779B97F4A7C15ULL + model_id * 0xC2B2AE3D27D4EB4FULL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL
    return (x ^ (x >> 31)) & (num_buckets - 1)


# What a token of sealed blocks says; see `_directory.Directory.seal`.
cdef struct Seal:
    uint64_t magic
    uint64_t cache_id
    uint64_t generation
    uint64_t expires_ns       # monotonic clock of the owner; 0 = never


cdef inline uint64_t seal_magic() noexcept nogil:
    return 0x4C4C4D4453454C31ULL  # "LLMDSEL1"

cdef int read_token(bytes token, Seal *seal) except -1


# Where an entry was found and what was read of it in one consistent look.
cdef struct Found:
    DirectoryEntry entry
    uint64_t index
    uint64_t hazard


cdef class PeerMemory(LinkEnd):
    cdef Memory _pool
    cdef Segment _directory
    cdef Segment _ledger
    cdef Segment _claims
    cdef const DirectoryHeader *_header
    cdef const uint64_t *_buckets
    cdef const DirectoryEntry *_entries
    cdef LedgerHeader *_hints
    cdef uint64_t *_leaves
    cdef LedgerRecord *_records
    cdef ClaimPage *_claim
    cdef uint64_t _num_buckets
    cdef uint64_t _num_entries
    cdef const uint64_t *_tables
    cdef int _pid                         # of the peer; 0 = its private memory is out of reach
    cdef int _pidfd                       # readable when the peer has ended; -1 = none

    cdef int _close_pidfd(self) except -1
    cdef Outcome _claim_key(
        self, uint64_t kind, uint64_t key_id, uint64_t model_id, const Gate *gate, Found *found
    ) noexcept nogil
    cdef Outcome _claim_found(self, Found *found, const Gate *gate) noexcept nogil
    cdef Outcome _find(
        self, uint64_t kind, uint64_t key_id, uint64_t model_id, const Gate *gate, Found *found
    ) noexcept nogil
    cdef bint _read_entry(self, uint64_t index, DirectoryEntry *out) noexcept nogil
    cdef bint _is_sound(self, const DirectoryEntry *entry) noexcept nogil
    cdef bint _is_table(self, uint64_t offset, uint64_t words) noexcept nogil
    cdef Outcome _addresses(
        self, const DirectoryEntry *entry, uint64_t first, uint64_t count, uint64_t *out
    ) noexcept nogil
    cdef Outcome _carry(self, Plan *plan, const Found *found, bint writing, const Gate *gate) noexcept nogil
    cdef Outcome _carry_by_channel(
        self, Plan *plan, const Found *found, bint writing, const Gate *gate
    ) noexcept nogil
    cdef bint _peer_has_ended(self, int wait_ms) noexcept nogil
    cdef bint _is_sealed(
        self, const DirectoryEntry *entry, const Seal *seal, const uint64_t *blocks, uint64_t count
    ) noexcept nogil
    cdef bint _is_consumed(self, const Found *found) noexcept nogil
    cdef bint _take_hazard(self, uint64_t cache_id, const Gate *gate, uint64_t *hazard) noexcept nogil
    cdef void _drop_hazard(self, uint64_t hazard) noexcept nogil
