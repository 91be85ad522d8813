from libc.stdint cimport uint64_t


cdef class LocalCache:
    cdef readonly uint64_t cache_id
    cdef readonly uint64_t address        # of the first tensor
    cdef readonly uint64_t step
    cdef readonly uint64_t tensor_nbytes
    cdef readonly uint64_t stride
    cdef readonly uint64_t tensors
    cdef readonly uint64_t slots
    cdef uint64_t *_addresses             # of each tensor; NULL if they follow each other
    cdef uint64_t _pins                   # transfers that run on the memory
    cdef uint64_t _released               # the id was given up: no new transfer may start

    cdef inline uint64_t tensor_at(self, uint64_t index) noexcept nogil:
        return self.address + index * self.step if self._addresses == NULL else self._addresses[index]

    cdef bint pin(self) noexcept nogil
    cdef void unpin(self) noexcept nogil


cdef class BlockPairs:
    cdef readonly uint64_t count
    cdef readonly uint64_t max_source
    cdef readonly uint64_t max_target
    cdef uint64_t *_sources
    cdef uint64_t *_targets
