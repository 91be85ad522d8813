"""The initiator's end of a data channel: private memory of a peer, moved by the data server of its owner.

The way for memory that can neither be mapped nor be reached through the kernel. The initiator has claimed the cache
before it asks; the server checks every range against its own directory all the same.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._copy cimport Gate, Plan
from llm_datadist._outcome cimport BAD_DIRECTORY, DONE, MEMORY_FAULT, NO_MEMORY, PEER_DEAD, TARGET_RANGE, TIMED_OUT
from llm_datadist._stream cimport (
    STREAM_CLOSED, STREAM_FAULT, STREAM_LATE, STREAM_OK, Range, StreamEnd, receive_bytes, receive_ranges, send_ranges,
)


cdef int ask(
    int fd, const Plan *plan, bint writing, uint64_t index, uint64_t generation, const Gate *gate, bint *whole
) noexcept nogil:
    """Carry a plan out over a channel; gives an Outcome.

    `whole` tells whether the stream can be used again. The remote side of the plan, its targets when `writing`, has
    addresses of the owner's process, in the cache of a directory entry that is claimed.
    """
    cdef Range *remote = <Range *>malloc(2 * MAX_RANGES * sizeof(Range))
    cdef Range *local = remote + MAX_RANGES
    cdef uint64_t count = 0
    cdef uint64_t t, r, source, target
    cdef int outcome = DONE
    whole[0] = True
    if remote == NULL:
        return NO_MEMORY
    for t in range(plan.tensors):
        for r in range(plan.num_runs):
            source = plan.sources[t] + plan.runs[r].source
            target = plan.targets[t] + plan.runs[r].target
            local[count].address = source if writing else target
            remote[count].address = target if writing else source
            local[count].nbytes = remote[count].nbytes = plan.runs[r].nbytes
            count += 1
            if count == MAX_RANGES and outcome == DONE:
                outcome = _ask_once(fd, local, remote, count, writing, index, generation, gate, whole)
                count = 0
            if outcome != DONE:
                break
        if outcome != DONE:
            break
    if outcome == DONE and count != 0:
        outcome = _ask_once(fd, local, remote, count, writing, index, generation, gate, whole)
    free(remote)
    return outcome


cdef int _ask_once(
    int fd, const Range *local, const Range *remote, uint64_t count, bint writing, uint64_t index, uint64_t generation,
    const Gate *gate, bint *whole,
) noexcept nogil:
    cdef Request request
    cdef Reply reply
    cdef Range parts[2]
    cdef uint64_t i
    cdef StreamEnd end
    request.magic = channel_magic()
    request.operation = WRITE_RANGES if writing else READ_RANGES
    request.index = index
    request.generation = generation
    request.count = count
    request.nbytes = 0
    for i in range(count):
        request.nbytes += remote[i].nbytes
    parts[0].address, parts[0].nbytes = <uint64_t>&request, sizeof(Request)
    parts[1].address, parts[1].nbytes = <uint64_t>remote, count * sizeof(Range)
    end = send_ranges(fd, parts, 2, gate)
    if end == STREAM_OK:
        end = _receive_reply(fd, &reply, gate)
    if end == STREAM_OK and reply.outcome != DONE:
        return <int>reply.outcome if reply.outcome <= TARGET_RANGE else BAD_DIRECTORY
    if end == STREAM_OK:
        end = send_ranges(fd, local, count, gate) if writing else receive_ranges(fd, local, count, gate)
    if end == STREAM_OK and writing:
        end = _receive_reply(fd, &reply, gate)
        if end == STREAM_OK and reply.outcome != DONE:
            return <int>reply.outcome if reply.outcome <= TARGET_RANGE else BAD_DIRECTORY
    whole[0] = end == STREAM_OK
    if end == STREAM_LATE:
        return TIMED_OUT
    if end == STREAM_FAULT:
        return MEMORY_FAULT
    return DONE if end == STREAM_OK else PEER_DEAD


cdef StreamEnd _receive_reply(int fd, Reply *reply, const Gate *gate) noexcept nogil:
    cdef StreamEnd end = receive_bytes(fd, reply, sizeof(Reply), gate)
    if end == STREAM_OK and reply.magic != channel_magic():
        return STREAM_CLOSED
    return end
