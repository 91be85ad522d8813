# One copy at a time between memories of which a device has at least one: a stream, and buffers for memory of the host
# that the device cannot reach by itself.

from libc.stdint cimport int32_t, uint8_t, uint64_t

from llm_datadist._acl cimport AclFailure, Device, Event, PinnedMemory, Stream, aclError
from llm_datadist._copy cimport CopyOutcome, Gate, Plan, Run

cdef enum:
    BOUNCE_BYTES = 4 << 20    # of each of two buffers: long enough that what a task costs does not show
    MOST_PIECES = 256         # ranges in a buffer
    MOST_TASKS = 512          # on the stream; its room is limited, and what a full one does is the vendor's choice
    SYNCHRONOUS_BYTES = 16 << 20  # of one call that cannot be ended early

# How the bytes of a tensor go.
cdef enum Way:
    ON_HOST = 0               # both sides are memory of the host
    ON_DEVICE = 1
    IN_DIRECTLY = 2           # from pinned memory of the host to the device
    OUT_DIRECTLY = 3
    IN_BOUNCED = 4            # through the buffers
    OUT_BOUNCED = 5

cdef struct Piece:
    uint64_t host
    uint64_t device
    uint64_t offset           # in the buffer
    uint64_t nbytes


cdef class Bounce:
    cdef PinnedMemory _memory
    cdef Event _event
    cdef Piece _pieces[MOST_PIECES]
    cdef Run _runs[MOST_PIECES]
    cdef uint64_t _count
    cdef uint64_t _used       # bytes
    cdef bint _is_full
    cdef bint _on_the_way     # its tasks are on the stream, followed by the event

    cdef Piece *_add(self, uint64_t host, uint64_t device, uint64_t nbytes) noexcept nogil
    cdef CopyOutcome _move(self, bint inward, bint in_order, uint64_t threads, const Gate *gate) noexcept nogil


cdef class Lane:
    cdef Device _device
    cdef Stream _stream
    cdef Bounce _first
    cdef Bounce _second
    cdef bint _second_next    # which buffer is filled next; the other one is older
    cdef uint64_t _tasks      # enqueued and not waited for
    # Of the copy that runs:
    cdef const Gate *_gate
    cdef AclFailure *_failure
    cdef uint64_t _threads
    cdef bint _in_order
    cdef bint _inward

    # Says how each tensor goes; gives whether a buffer is needed.
    cdef int find_ways(self, const Plan *plan, uint8_t *ways, bint *bounced) except -1
    cdef int make_buffers(self) except -1
    # Carries a plan out. After anything but COPIED the lane is of no more use; COPY_FAULT fills `failure`. `lost`
    # becomes true if tasks could not be ended: then what they touch must stay as it is, and the lane too.
    cdef CopyOutcome carry(
        self, const Plan *plan, const uint8_t *ways, bint in_order, uint64_t threads, const Gate *gate,
        AclFailure *failure, bint *lost,
    ) noexcept nogil
    cdef CopyOutcome _carry_tensors(self, const Plan *plan, const uint8_t *ways) noexcept nogil
    cdef CopyOutcome _carry_tensor(self, const Plan *plan, uint64_t tensor, Way way) noexcept nogil
    cdef CopyOutcome _inside_device(self, uint64_t target, uint64_t source, uint64_t nbytes) noexcept nogil
    cdef CopyOutcome _wait_and_copy(self, uint64_t target, uint64_t source, uint64_t nbytes) noexcept nogil
    cdef CopyOutcome _bounce(self, uint64_t host, uint64_t device, uint64_t nbytes) noexcept nogil
    cdef CopyOutcome _add_piece(self, Bounce bounce, uint64_t host, uint64_t device, uint64_t *nbytes) noexcept nogil
    cdef CopyOutcome _send_off(self, Bounce bounce) noexcept nogil
    cdef CopyOutcome _settle(self, Bounce bounce) noexcept nogil
    cdef CopyOutcome _finish(self) noexcept nogil
    cdef CopyOutcome _enqueue(self, uint64_t target, uint64_t source, uint64_t nbytes, int32_t kind) noexcept nogil
    cdef CopyOutcome _wait(self) noexcept nogil
    cdef CopyOutcome _look(self) noexcept nogil
    cdef CopyOutcome _judge(self, const char *function, aclError code) noexcept nogil
