from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Run
from llm_datadist._local cimport LocalCache


cpdef enum LocalOutcome:
    """How a copy inside the process ended."""
    DONE = 0
    CACHE_RELEASED = 1        # a cache was deallocated
    TIMED_OUT = 2
    CLOSED = 3                # the copier was closed


cdef class LocalCopier:
    cdef uint64_t _threads
    cdef uint64_t _closing    # 1: no copy may start, and running ones end
    cdef uint64_t _running    # copies

    # Carries a plan out and gives a LocalOutcome. Another kind of memory is a subclass that does this in its own way.
    cdef object _copy(
        self, const uint64_t *sources, const uint64_t *targets, uint64_t tensors, const Run *runs, uint64_t num_runs,
        bint in_order, LocalCache source, LocalCache target, uint64_t deadline_ns,
    )
    cdef object _why_released(self)
