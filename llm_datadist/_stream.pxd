# Bytes on a stream socket that does not block, under a gate: in and out of scattered memory, without a copy in between.

from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate

cdef enum StreamEnd:
    STREAM_OK = 0
    STREAM_CLOSED = 1         # by the other end, or it broke
    STREAM_LATE = 2           # the deadline passed, or the gate closed
    STREAM_FAULT = 3          # memory is not mapped
    STREAM_SPOILT = 4         # what came is not what was sent, so it is not known where anything begins

cdef struct Range:
    uint64_t address          # from the beginning of the tensor; with one tensor at 0, an address
    uint64_t nbytes

# What goes over a stream, and how much of it has gone: a head, the same ranges of each tensor, a tail.
cdef struct Flow:
    const void *head
    uint64_t head_nbytes
    const uint64_t *tensors   # addresses
    uint64_t num_tensors
    const Range *ranges
    uint64_t num_ranges
    const void *tail
    uint64_t tail_nbytes
    bint summed               # whether `checksum` is to be the CRC-32C of what lies between head and tail
    uint64_t checksum
    uint64_t left             # bytes of all
    uint64_t head_done
    uint64_t tensor           # where the next byte lies
    uint64_t range
    uint64_t range_done
    uint64_t tail_done

cdef uint64_t sum_bytes(uint64_t crc, const void *bytes, uint64_t nbytes) noexcept nogil
cdef void start_flow(Flow *flow) noexcept nogil

# `gate` may be NULL: then only the end of the stream ends the wait.
cdef StreamEnd send_flow(int fd, Flow *flow, const Gate *gate, bint more) noexcept nogil
cdef StreamEnd receive_flow(int fd, Flow *flow, const Gate *gate) noexcept nogil
cdef StreamEnd receive_some(int fd, Flow *flow, const Gate *gate) noexcept nogil
cdef StreamEnd send_bytes(int fd, const void *bytes, uint64_t nbytes, const Gate *gate, bint more) noexcept nogil
cdef StreamEnd receive_bytes(int fd, void *bytes, uint64_t nbytes, const Gate *gate) noexcept nogil
cdef StreamEnd send_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil
cdef StreamEnd receive_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil
cdef StreamEnd send_zeros(int fd, uint64_t nbytes, const Gate *gate) noexcept nogil
cdef StreamEnd discard(int fd, uint64_t nbytes, const Gate *gate) noexcept nogil
