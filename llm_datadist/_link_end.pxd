from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._outcome cimport Outcome

cdef enum:
    MAX_CHANNELS = 8          # to one peer: transfers over them that may run at the same time


cdef class LinkEnd:
    cdef uint64_t _threads                # that one copy may use
    cdef uint64_t _channels[MAX_CHANNELS]  # descriptors of free data channels + 1; 0 = none, or in use
    cdef uint64_t _num_channels           # in use or free
    cdef uint64_t _patience_ns            # how long a transfer waits when there is no channel at all
    cdef uint64_t _peer_dead
    cdef uint64_t _closing                # for good
    cdef uint64_t _undecided              # an unlink asks whether the link is in use: new transfers wait
    cdef uint64_t _running                # transfers inside this object

    cdef Outcome _enter(self, uint64_t deadline_ns) noexcept nogil
    cdef void _leave(self) noexcept nogil
    cdef Gate _gate(self, uint64_t deadline_ns) noexcept nogil
    cdef Outcome _why_stopped(self) noexcept nogil
    cdef int _close_channels(self) except -1
    cdef int _take_channel(self, const Gate *gate) noexcept nogil
    cdef void _keep_channel(self, int descriptor) noexcept nogil
    cdef void _drop_channel(self, int descriptor) noexcept nogil
