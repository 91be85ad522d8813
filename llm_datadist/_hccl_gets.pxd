# Scattered bytes out of the memory of a peer, which takes no part in it: HcclBatchGet over a communicator of two ranks.
#
# Nothing is ever put into memory of a peer. The end that bytes are meant for copies them, also in a push, so whoever
# owns memory that is written can stop that: after the abort of its own stream no byte there changes any more, whatever
# has become of the other process.

from libc.stdint cimport uint32_t, uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._hccl cimport HCCL_MOST_DESCRIPTORS, HcclOneSideOpDesc
from llm_datadist._hccl_exchange cimport Exchange, Row
from llm_datadist._outcome cimport Outcome


# What goes into one call of HCCL, which orders nothing inside of a call; calls follow each other.
cdef struct Batch:
    HcclOneSideOpDesc descriptors[HCCL_MOST_DESCRIPTORS]
    uint32_t count
    uint64_t low              # what lies outside of these addresses overlaps nothing that is written
    uint64_t high


cdef class OneSidedExchange(Exchange):
    cdef uint64_t _peer_base      # of what the peer has bound
    cdef uint64_t _peer_size
    cdef uint64_t _doubt_ns       # when a transfer last ended without word from whoever copied; 0 = never

    # Whether all bytes of a row lie in the pool of this end, which is what its peer can reach.
    cdef bint is_reachable(self, const Row *row) noexcept nogil
    # Fills `target`, a row of this end, with the bytes of `source`, one of the peer's. The turn must be held. `fd` is
    # the connection to the peer, which closes it if it cannot go on. After TIMED_OUT and DEVICE_FAILED the communicator
    # is lost, and no byte of this side changes any more; other outcomes than DONE mean that nothing was begun.
    cdef Outcome get(self, Row *target, Row *source, int fd, const Gate *gate) noexcept nogil
    cdef Outcome _enqueue_all(self, Row *target, Row *source, const Gate *gate) noexcept nogil
    cdef Outcome _enqueue(self, Batch *batch, const Gate *gate) noexcept nogil
    cdef void _stop(self) noexcept nogil
    # A transfer has ended, and nobody has said whether the other end still copies.
    cdef void note_doubt(self) noexcept nogil
