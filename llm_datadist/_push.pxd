from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._core cimport DirectoryEntry, Found
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._outcome cimport Outcome
from llm_datadist._pull cimport PeerSource


# What is pushed: tensors of a local cache, and of each of them a slot, blocks, or a slot in blocks.
cdef struct Source:
    uint64_t first
    uint64_t tensors
    uint64_t base             # offset of block 0 in a tensor
    uint64_t block            # bytes


cdef Outcome check_source(
    Source *wanted, LocalCache source, uint64_t slot, BlockPairs pairs, uint64_t block_nbytes
) noexcept nogil
cdef Outcome check_target(
    const DirectoryEntry *entry, const Source *wanted, uint64_t slot, uint64_t first, bint by_blocks,
    uint64_t max_target,
) noexcept nogil


cdef class PeerTarget(PeerSource):
    cdef uint64_t _last_found   # where the last address was found: the next one mostly lies in the same cache

    cdef Outcome _push_to_addresses(
        self, const Source *wanted, LocalCache source, BlockPairs pairs, uint64_t *plan, const Gate *gate
    ) noexcept nogil
    cdef Outcome _move(
        self, const Source *wanted, LocalCache source, BlockPairs pairs, uint64_t target_base, uint64_t *sources,
        const uint64_t *targets, uint64_t tensors, uint64_t skip, const Found *found, const Gate *gate,
    ) noexcept nogil
    cdef Outcome _resolve_all(
        self, const Source *wanted, bint by_blocks, uint64_t max_target, uint64_t *targets, Found *claims,
        uint64_t *claimed, uint64_t *claim_of, const Gate *gate,
    ) noexcept nogil
    cdef Outcome _resolve(
        self, uint64_t *address, uint64_t needed, Found *claims, uint64_t *claimed, uint64_t *claim, const Gate *gate
    ) noexcept nogil
    cdef Outcome _translate(self, const DirectoryEntry *entry, uint64_t *address, uint64_t needed) noexcept nogil
    cdef bint _holds(self, const DirectoryEntry *entry, uint64_t address, uint64_t needed) noexcept nogil
