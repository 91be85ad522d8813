"""Bytes on a stream socket: straight out of scattered memory, and straight into it.

A wait looks at the gate every few milliseconds, so a deadline, a dead peer or a closing link ends it. Before it sleeps
it looks at the socket for a moment: an answer from the same rack comes sooner than a sleeping thread wakes up.
"""

from libc.errno cimport EAGAIN, EFAULT, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t

from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._copy cimport Gate, stopped

cdef extern from "crc32c.h" nogil:
    void crc32c_prepare()
    uint32_t crc32c(uint32_t crc, const void *bytes, size_t nbytes)

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
    int MSG_NOSIGNAL, MSG_DONTWAIT, MSG_MORE

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
    VECTORS = 256             # ranges in one call to the kernel, which takes 1024 (IOV_MAX)
    LOOK_MS = 2               # how often a wait looks at the gate
    SPIN_NS = 30000           # about what it costs to wake a thread

crc32c_prepare()


def checksum(const unsigned char[::1] data not None, uint32_t crc=0):
    """CRC-32C of bytes, or of more bytes that follow those whose sum is `crc`."""
    return crc32c(crc, &data[0], data.shape[0]) if data.shape[0] else crc


cdef uint64_t sum_bytes(uint64_t crc, const void *bytes, uint64_t nbytes) noexcept nogil:
    """CRC-32C of bytes that follow those whose sum is `crc`."""
    return crc32c(<uint32_t>crc, bytes, nbytes)


cdef void start_flow(Flow *flow) noexcept nogil:
    """Count the bytes of a flow whose parts are set, and go to its beginning."""
    cdef uint64_t of_tensor = 0
    cdef uint64_t i
    for i in range(flow.num_ranges):
        of_tensor += flow.ranges[i].nbytes
    flow.left = flow.head_nbytes + flow.num_tensors * of_tensor + flow.tail_nbytes
    flow.head_done = flow.tensor = flow.range = flow.range_done = flow.tail_done = flow.checksum = 0


cdef StreamEnd send_flow(int fd, Flow *flow, const Gate *gate, bint more) noexcept nogil:
    """Send everything; with `more` the kernel may keep the last bytes until others follow."""
    cdef iovec vectors[VECTORS]
    cdef msghdr message
    cdef ssize_t moved
    cdef StreamEnd end
    cdef int flags = MSG_NOSIGNAL | MSG_DONTWAIT
    if more:
        flags |= MSG_MORE
    memset(&message, 0, sizeof(message))
    message.msg_iov = vectors
    while flow.left != 0:
        message.msg_iovlen = _fill(flow, vectors)
        moved = sendmsg(fd, &message, flags)
        if moved > 0:
            _advance(flow, <uint64_t>moved)
            if flow.left != 0 and _is_over(gate):
                return STREAM_LATE
        else:
            end = _after_failure(fd, POLLOUT, gate, moved)
            if end != STREAM_OK:
                return end
    return STREAM_OK


cdef StreamEnd receive_flow(int fd, Flow *flow, const Gate *gate) noexcept nogil:
    """Receive everything."""
    cdef StreamEnd end
    while flow.left != 0:
        end = receive_some(fd, flow, gate)
        if end != STREAM_OK:
            return end
    return STREAM_OK


cdef StreamEnd receive_some(int fd, Flow *flow, const Gate *gate) noexcept nogil:
    """Receive at least a byte of what is left, which is not nothing."""
    cdef iovec vectors[VECTORS]
    cdef msghdr message
    cdef ssize_t moved
    cdef StreamEnd end
    memset(&message, 0, sizeof(message))
    message.msg_iov = vectors
    message.msg_iovlen = _fill(flow, vectors)
    while True:
        moved = recvmsg(fd, &message, MSG_DONTWAIT)
        if moved > 0:
            _advance(flow, <uint64_t>moved)
            return STREAM_LATE if flow.left != 0 and _is_over(gate) else STREAM_OK
        end = _after_failure(fd, POLLIN, gate, moved)
        if end != STREAM_OK:
            return end


cdef StreamEnd send_bytes(int fd, const void *bytes, uint64_t nbytes, const Gate *gate, bint more) noexcept nogil:
    cdef Flow flow
    memset(&flow, 0, sizeof(flow))
    flow.head, flow.head_nbytes = bytes, nbytes
    start_flow(&flow)
    return send_flow(fd, &flow, gate, more)


cdef StreamEnd receive_bytes(int fd, void *bytes, uint64_t nbytes, const Gate *gate) noexcept nogil:
    cdef Flow flow
    memset(&flow, 0, sizeof(flow))
    flow.head, flow.head_nbytes = bytes, nbytes
    start_flow(&flow)
    return receive_flow(fd, &flow, gate)


cdef StreamEnd send_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil:
    """Send the bytes of ranges that have addresses."""
    cdef uint64_t nowhere = 0
    cdef Flow flow
    _start_ranges(&flow, ranges, count, &nowhere)
    return send_flow(fd, &flow, gate, False)


cdef StreamEnd receive_ranges(int fd, const Range *ranges, uint64_t count, const Gate *gate) noexcept nogil:
    """Receive into ranges that have addresses."""
    cdef uint64_t nowhere = 0
    cdef Flow flow
    _start_ranges(&flow, ranges, count, &nowhere)
    return receive_flow(fd, &flow, gate)


cdef void _start_ranges(Flow *flow, const Range *ranges, uint64_t count, const uint64_t *nowhere) noexcept nogil:
    memset(flow, 0, sizeof(Flow))
    flow.tensors, flow.num_tensors = nowhere, 1
    flow.ranges, flow.num_ranges = ranges, count
    start_flow(flow)


cdef StreamEnd send_zeros(int fd, uint64_t nbytes, const Gate *gate) noexcept nogil:
    """Send zeros in place of bytes that cannot be read, so that what follows them is found."""
    cdef char zeros[4096]
    cdef uint64_t part
    cdef StreamEnd end = STREAM_OK
    memset(zeros, 0, sizeof(zeros))
    while nbytes != 0 and end == STREAM_OK:
        part = min(nbytes, sizeof(zeros))
        end = send_bytes(fd, zeros, part, gate, True)
        nbytes -= part
    return end


cdef StreamEnd discard(int fd, uint64_t nbytes, const Gate *gate) noexcept nogil:
    """Receive bytes that have no place to go."""
    cdef char rest[65536]
    cdef uint64_t part
    cdef StreamEnd end = STREAM_OK
    while nbytes != 0 and end == STREAM_OK:
        part = min(nbytes, sizeof(rest))
        end = receive_bytes(fd, rest, part, gate)
        nbytes -= part
    return end


# ---- where a flow stands

cdef size_t _fill(const Flow *flow, iovec *vectors) noexcept nogil:
    """Say where the next bytes lie; gives the number of vectors."""
    cdef size_t used = 0
    cdef uint64_t tensor = flow.tensor
    cdef uint64_t range = flow.range
    cdef uint64_t done = flow.range_done
    if flow.head_done < flow.head_nbytes:
        vectors[0].iov_base = <char *>flow.head + flow.head_done
        vectors[0].iov_len = flow.head_nbytes - flow.head_done
        used = 1
    while tensor < flow.num_tensors and used < VECTORS:
        if range == flow.num_ranges:
            tensor += 1
            range = 0
            continue
        vectors[used].iov_base = <void *>(flow.tensors[tensor] + flow.ranges[range].address + done)
        vectors[used].iov_len = flow.ranges[range].nbytes - done
        used += 1
        range += 1
        done = 0
    if used < VECTORS and flow.tail_done < flow.tail_nbytes:
        vectors[used].iov_base = <char *>flow.tail + flow.tail_done
        vectors[used].iov_len = flow.tail_nbytes - flow.tail_done
        used += 1
    return used


cdef void _advance(Flow *flow, uint64_t nbytes) noexcept nogil:
    """Take in that so many bytes have gone."""
    cdef uint64_t part, address
    flow.left -= nbytes
    part = min(nbytes, flow.head_nbytes - flow.head_done)
    flow.head_done += part
    nbytes -= part
    while nbytes != 0 and flow.tensor < flow.num_tensors and flow.num_ranges != 0:
        part = min(nbytes, flow.ranges[flow.range].nbytes - flow.range_done)
        if flow.summed:
            address = flow.tensors[flow.tensor] + flow.ranges[flow.range].address + flow.range_done
            flow.checksum = crc32c(<uint32_t>flow.checksum, <const void *>address, part)
        flow.range_done += part
        nbytes -= part
        if flow.range_done == flow.ranges[flow.range].nbytes:
            flow.range += 1
            flow.range_done = 0
            if flow.range == flow.num_ranges:
                flow.tensor += 1
                flow.range = 0
    flow.tail_done += nbytes


# ---- waiting

cdef bint _is_over(const Gate *gate) noexcept nogil:
    return gate != NULL and (stopped(gate) or monotonic_ns() > gate.deadline_ns)


cdef StreamEnd _after_failure(int fd, short events, const Gate *gate, ssize_t moved) noexcept nogil:
    """Wait if that helps; else tell what a call to the kernel that moved nothing means."""
    if moved == 0:
        return STREAM_CLOSED
    if errno == EAGAIN:
        return _wait(fd, events, gate)
    if errno == EFAULT:
        return STREAM_FAULT
    return STREAM_OK if errno == EINTR else STREAM_CLOSED


cdef StreamEnd _wait(int fd, short events, const Gate *gate) noexcept nogil:
    """Wait until the stream can be moved on, or is at its end."""
    cdef uint64_t start = monotonic_ns()
    cdef pollfd watched
    cdef int timeout_ms = 0
    watched.fd = fd
    watched.events = events
    while True:
        watched.revents = 0
        if poll(&watched, 1, timeout_ms) > 0:
            return STREAM_OK
        if timeout_ms == 0 and monotonic_ns() - start < SPIN_NS:
            continue
        if _is_over(gate):
            return STREAM_LATE
        timeout_ms = -1 if gate == NULL else LOOK_MS
