# What goes over a data channel: a stream between a puller or pusher and the data server of the owner. Words are 64 bits
# in the byte order of the machine; both ends are on it.
#
#   initiator: Request, then `count` of Range, whose addresses are those of the owner's process
#   server:    Reply
#   reading    server: the bytes of all ranges, one after the other
#   writing    initiator: the bytes of all ranges; server: a second Reply
#
# An end that cannot go on closes the stream: half a transfer is never taken for a whole one.

from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate, Plan

cdef enum:
    MAX_RANGES = 1024         # in one request; larger plans are several requests

cdef enum Operation:
    READ_RANGES = 1
    WRITE_RANGES = 2

cdef struct Request:
    uint64_t magic
    uint64_t operation
    uint64_t index            # of the directory entry that the initiator has claimed
    uint64_t generation       # that it had
    uint64_t count
    uint64_t nbytes           # of all ranges together

cdef struct Reply:
    uint64_t magic
    uint64_t outcome          # Outcome


cdef inline uint64_t channel_magic() noexcept nogil:
    return 0x4C4C4D4443484E31ULL  # "LLMDCHN1"

cdef int ask(
    int fd, const Plan *plan, bint writing, uint64_t index, uint64_t generation, const Gate *gate, bint *whole
) noexcept nogil
