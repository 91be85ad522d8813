from libc.stdint cimport uint64_t

from llm_datadist._core cimport ClaimPage, DirectoryEntry, LedgerHeader, LedgerRecord
from llm_datadist._segment cimport Segment


cdef class Claims:
    cdef readonly Segment segment
    cdef ClaimPage *_page
    cdef bint _by_threads        # of this process, in the name of the peer
    cdef uint64_t _users         # these threads
    cdef int _pidfd              # of the peer's process, readable when it has ended; -1 = not known


# What the owner decides on: its private copy of the links between entries.
cdef struct Shadow:
    uint64_t generation      # 0: not published
    uint64_t kind
    uint64_t bucket
    uint64_t next            # index + 1
    uint64_t cache_id
    uint64_t last_sibling    # of a CACHE_ID entry: index of the last entry of its chain of keys
    uint64_t overflow        # offset in the overflow pool + 1, 0 = none
    uint64_t table           # of a scattered cache: offset in the tables + 1, 0 = none
    uint64_t seals           # offset in the tables + 1, 0 = none


cdef class Directory:
    cdef readonly Segment segment
    cdef readonly Segment ledger
    cdef readonly uint64_t num_entries
    cdef readonly uint64_t used_entries
    cdef uint64_t _num_buckets
    cdef uint64_t *_buckets
    cdef DirectoryEntry *_entries
    cdef LedgerHeader *_hints
    cdef uint64_t *_leaves
    cdef LedgerRecord *_records
    cdef Shadow *_shadows
    cdef uint64_t *_heads        # private copy of the bucket words
    cdef uint64_t *_free         # stack of entries that were used before
    cdef uint64_t _num_free
    cdef uint64_t _fresh         # entries from here on were never used
    cdef uint64_t _generation
    cdef object _overflow        # Pool of the ledger's overflow words
    cdef uint64_t *_tables
    cdef object _table_pool      # Pool of the tables
    cdef uint64_t _seal_generation
    cdef list _claims
    cdef list _leaving           # claims of links that are gone, whose peers may not have stopped yet

    cdef uint64_t _take_entry(self) except? 0xFFFFFFFFULL
    cdef int _link(self, uint64_t index, uint64_t kind, uint64_t key_id, uint64_t model_id) except -1
    cdef void _unlink(self, uint64_t index) noexcept
    cdef bint _is_consumed(self, uint64_t index) noexcept
    cdef void _set_head(self, uint64_t bucket, uint64_t link) noexcept
    cdef int _prepare_record(self, uint64_t index, uint64_t tensors) except -1
    cdef void _start_record(self, uint64_t index) noexcept
    cdef void _give_back(self, uint64_t index) noexcept
    cdef int _write_table(self, uint64_t index, list addresses) except -1
    cdef uint64_t *_seals_of(self, uint64_t cache_index) except NULL
