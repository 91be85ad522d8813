from libc.stdint cimport int64_t, uint64_t

from llm_datadist._copy cimport Gate, Run
from llm_datadist._core cimport DirectoryEntry, Found, Outcome, PeerMemory
from llm_datadist._local cimport BlockPairs, LocalCache


cdef class PeerSource(PeerMemory):
    cdef Outcome _pull_cache(
        self, LocalCache target, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        uint64_t local_slot, uint64_t nbytes, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, uint64_t source_offset, uint64_t target_offset, bint consume, uint64_t deadline_ns,
        Found *found,
    ) noexcept nogil
    cdef Outcome _pull_blocks(
        self, LocalCache target, uint64_t model_id, BlockPairs pairs, uint64_t source_first, int64_t source_count,
        uint64_t target_first, uint64_t target_count, uint64_t deadline_ns, Found *found,
    ) noexcept nogil
    cdef Outcome _copy(
        self, const DirectoryEntry *entry, uint64_t source_first, LocalCache target, uint64_t target_first,
        uint64_t tensors, const Run *runs, uint64_t num_runs, const Gate *gate,
    ) noexcept nogil
    cdef bint _key_of_slot(self, const DirectoryEntry *entry, uint64_t slot, Found *key) noexcept nogil
    cdef void _consume(self, const Found *key, uint64_t first, uint64_t count) noexcept nogil
    cdef bint _note_pulled(self, const DirectoryEntry *entry, uint64_t first, uint64_t count) noexcept nogil
