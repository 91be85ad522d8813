"""The initiator's end of a data channel: private memory of a peer, moved by the data server of its owner.

The way for memory that can neither be mapped nor be reached through the kernel. The initiator has claimed the cache
before it asks; the server checks every range against its own directory all the same.
"""

from libc.errno cimport EAGAIN, EFAULT, EINTR, errno
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._copy cimport Gate, Plan, stopped
from llm_datadist._core cimport BAD_DIRECTORY, DONE, MEMORY_FAULT, NO_MEMORY, PEER_DEAD, TARGET_RANGE, TIMED_OUT

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    int MSG_NOSIGNAL, MSG_DONTWAIT

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *descriptors, unsigned long count, int timeout_ms)
    short POLLIN, POLLOUT

cdef extern from "string.h" nogil:
    void *memset(void *target, int value, size_t nbytes)

cdef enum:
    VECTORS = 64
    LOOK_MS = 2               # how often a wait looks at the gate


cdef StreamEnd send_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil:
    """Send the bytes of memory ranges of this process."""
    return _move_ranges(fd, ranges, count, gate, True)


cdef StreamEnd receive_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil:
    """Receive bytes into memory ranges of this process."""
    return _move_ranges(fd, ranges, count, gate, False)


cdef StreamEnd _move_ranges(
    int fd, const Range *ranges, uint64_t count, const Gate *gate, bint sending
) noexcept nogil:
    cdef iovec vectors[VECTORS]
    cdef msghdr message
    cdef uint64_t at = 0
    cdef uint64_t done = 0    # bytes of ranges[at]
    cdef uint64_t i
    cdef ssize_t moved
    cdef StreamEnd end
    memset(&message, 0, sizeof(message))
    message.msg_iov = vectors
    while at < count:
        message.msg_iovlen = min(count - at, <uint64_t>VECTORS)
        for i in range(message.msg_iovlen):
            vectors[i].iov_base = <void *>ranges[at + i].address
            vectors[i].iov_len = ranges[at + i].nbytes
        vectors[0].iov_base = <void *>(ranges[at].address + done)
        vectors[0].iov_len = ranges[at].nbytes - done
        if sending:
            moved = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        else:
            moved = recvmsg(fd, &message, MSG_DONTWAIT)
        if moved > 0:
            done += <uint64_t>moved
            while at < count and done >= ranges[at].nbytes:
                done -= ranges[at].nbytes
                at += 1
            if gate != NULL and at < count and (stopped(gate) or monotonic_ns() > gate.deadline_ns):
                return STREAM_LATE
        elif moved == 0:
            return STREAM_CLOSED
        elif errno == EFAULT:
            return STREAM_FAULT
        elif errno == EAGAIN:
            end = _wait(fd, POLLOUT if sending else POLLIN, gate)
            if end != STREAM_OK:
                return end
        elif errno != EINTR:
            return STREAM_CLOSED
    return STREAM_OK


cdef StreamEnd _wait(int fd, short events, const Gate *gate) noexcept nogil:
    """Wait until the stream can be moved on, or is at its end."""
    cdef pollfd watched
    watched.fd = fd
    watched.events = events
    while True:
        watched.revents = 0
        if poll(&watched, 1, -1 if gate == NULL else LOOK_MS) > 0:
            return STREAM_OK
        if gate != NULL and (stopped(gate) or monotonic_ns() > gate.deadline_ns):
            return STREAM_LATE


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
    cdef Range part
    cdef StreamEnd end
    part.address, part.nbytes = <uint64_t>reply, sizeof(Reply)
    end = receive_ranges(fd, &part, 1, gate)
    if end == STREAM_OK and reply.magic != channel_magic():
        return STREAM_CLOSED
    return end
