from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef enum:
    ALIGNMENT = 512           # bytes; every offset and every block size is a multiple
    SUBCLASSES_LOG2 = 5
    SUBCLASSES = 1 << SUBCLASSES_LOG2
    LEVELS = 64               # more than a capacity of 2**63 bytes needs

cdef enum:                    # answers of `place` and `give_back` that are no offset
    POOL_FULL = -1
    POOL_NO_MEMORY = -2
    POOL_UNKNOWN_OFFSET = -3

cdef struct Block:
    int64_t offset            # in units of ALIGNMENT, as is size
    int64_t size
    int32_t left              # neighbours in the segment
    int32_t right
    int32_t previous          # neighbours in the list of free blocks of its class; `next` chains unused records too
    int32_t next
    bint free


cdef class Pool:
    cdef readonly int64_t capacity      # bytes, as the next three
    cdef readonly int64_t used
    cdef readonly int64_t allocations
    cdef Block *_blocks                 # records; indices, not pointers, refer to them because the array grows
    cdef int32_t _num_blocks
    cdef int32_t _unused                # first record that stands for no block
    cdef int32_t *_table                # allocated blocks by offset: open addressing, linear probing
    cdef uint32_t _table_log2
    cdef uint64_t _level_map            # bit i: _class_map[i] is not zero
    cdef uint32_t _class_map[LEVELS]    # bit j of word i: _heads[i][j] is not empty
    cdef int32_t _heads[LEVELS][SUBCLASSES]

    # For native callers. The caller holds the lock that guards the pool.
    cdef int64_t place(self, int64_t nbytes) noexcept nogil       # an offset, POOL_FULL or POOL_NO_MEMORY; nbytes > 0
    cdef int64_t give_back(self, int64_t offset) noexcept nogil   # bytes freed, or POOL_UNKNOWN_OFFSET
    cdef int64_t largest(self) noexcept nogil                     # bytes

    cdef int32_t _find(self, int64_t size) noexcept nogil
    cdef void _cut(self, int32_t index, int64_t size) noexcept nogil
    cdef void _absorb_right(self, int32_t index) noexcept nogil
    cdef void _insert_free(self, int32_t index) noexcept nogil
    cdef void _remove_free(self, int32_t index) noexcept nogil
    cdef int32_t _take_record(self) noexcept nogil
    cdef void _drop_record(self, int32_t index) noexcept nogil
    cdef int _reserve_records(self) noexcept nogil
    cdef uint64_t _slot_of(self, int64_t offset) noexcept nogil
    cdef void _table_add(self, int32_t index) noexcept nogil
    cdef int32_t _table_take(self, int64_t offset) noexcept nogil
    cdef int _reserve_table(self) noexcept nogil
