# What include/atomics.h offers: every access to memory that processes share goes through one of these.

from libc.stdint cimport uint64_t

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed(const uint64_t *word)
    uint64_t load_acquire(const uint64_t *word)
    void store_relaxed(uint64_t *word, uint64_t value)
    void store_release(uint64_t *word, uint64_t value)
    uint64_t exchange(uint64_t *word, uint64_t value)
    uint64_t fetch_add(uint64_t *word, uint64_t value)
    uint64_t fetch_sub(uint64_t *word, uint64_t value)
    uint64_t fetch_or(uint64_t *word, uint64_t bits)
    uint64_t fetch_and(uint64_t *word, uint64_t bits)
    bint compare_exchange(uint64_t *word, uint64_t expected, uint64_t desired)
    void fence_acquire()
    void fence_full()
    unsigned lowest_bit(uint64_t word)
    void relax()
    uint64_t monotonic_ns()
