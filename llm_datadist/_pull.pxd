from libc.stdint cimport int64_t, uint64_t

from llm_datadist._copy cimport Gate, Run
from llm_datadist._core cimport DirectoryEntry, Found, PeerMemory, Seal
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._outcome cimport Outcome

# What a pull wants, and where it stands.
cdef struct Pull:
    uint64_t kind
    uint64_t key_id
    uint64_t model_id
    uint64_t slot             # of the remote cache; for CACHE_ID wanted, else found
    uint64_t source_first
    int64_t source_count      # -1 = all
    uint64_t target_first
    uint64_t target_count
    bint consume
    bint sealed
    Seal seal
    Gate gate
    Found found


cdef class PeerSource(PeerMemory):
    cdef int _report(self, const Pull *pull, Outcome outcome) except -1
    cdef Outcome _begin(self, Pull *pull, uint64_t deadline_ns) noexcept nogil
    cdef bint _releases(self, const Pull *pull) noexcept nogil
    cdef Outcome _end(self, Pull *pull, Outcome outcome) noexcept nogil
    cdef Outcome _pull_blocks(self, Pull *pull, LocalCache target, BlockPairs pairs, Run *runs) noexcept nogil
    cdef Outcome _check_blocks(
        self, const Pull *pull, uint64_t block, const uint64_t *blocks, uint64_t count, uint64_t largest, uint64_t *base
    ) noexcept nogil
    cdef Outcome _copy(self, Pull *pull, LocalCache target, const Run *runs, uint64_t num_runs) noexcept nogil
    cdef bint _key_of_slot(self, const DirectoryEntry *entry, uint64_t slot, Found *key) noexcept nogil
    cdef void _consume(self, const Found *key, uint64_t first, uint64_t count) noexcept nogil
    cdef bint _note_pulled(self, const DirectoryEntry *entry, uint64_t first, uint64_t count) noexcept nogil
