"""One copy at a time between memories of which an Ascend device has at least one.

A lane is a stream: what is enqueued on it takes effect in order, so runs that must follow each other do. Memory of
the host that is not pinned goes through two buffers that are; while the device copies one of them, the host fills or
empties the other. (Given to the runtime as it is, such memory would make each call wait, without a limit.)

A copy that does not end in time is aborted before anybody may touch its memory again.
"""

cimport cython
from libc.stdint cimport int32_t, uint8_t, uint64_t

from llm_datadist._acl cimport (
    ACL_COPY_ALIGNMENT, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
    ACL_MEMCPY_DEVICE_TO_DEVICE, ACL_MEMCPY_DEVICE_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE,
    ACL_SUCCESS, AclFailure, Device, Event, PinnedMemory, Scope, Stream, aclError, failure_error, is_device_memory,
    is_pinned_memory, note_failure,
)
from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._copy cimport (
    COPIED, COPY_FAULT, COPY_STOPPED, COPY_TIMED_OUT, IN_PROCESS, CopyOutcome, Gate, Plan, execute_shared, stopped,
)


@cython.final
cdef class Bounce:
    """Pinned memory between the host and a device, and the ranges that lie in it."""

    def __init__(self, Device device not None):
        self._memory = PinnedMemory(device, BOUNCE_BYTES)
        self._event = Event(device)

    cdef Piece *_add(self, uint64_t host, uint64_t device, uint64_t nbytes) noexcept nogil:
        """Give room to as much of a range as fits; the buffer must not be full."""
        cdef Piece *piece = &self._pieces[self._count]
        piece.host = host
        piece.device = device
        piece.offset = self._used
        piece.nbytes = min(nbytes, <uint64_t>BOUNCE_BYTES - self._used)
        self._used += (piece.nbytes + ACL_COPY_ALIGNMENT - 1) // ACL_COPY_ALIGNMENT * ACL_COPY_ALIGNMENT
        self._count += 1
        self._is_full = self._count == MOST_PIECES or self._used >= BOUNCE_BYTES
        return piece

    cdef CopyOutcome _move(self, bint inward, bint in_order, uint64_t threads, const Gate *gate) noexcept nogil:
        """Copy all ranges between the buffer and the host."""
        cdef uint64_t nowhere = 0  # the runs have addresses
        cdef uint64_t inside
        cdef Plan plan
        cdef uint64_t i
        for i in range(self._count):
            inside = self._memory.base + self._pieces[i].offset
            self._runs[i].source = self._pieces[i].host if inward else inside
            self._runs[i].target = inside if inward else self._pieces[i].host
            self._runs[i].nbytes = self._pieces[i].nbytes
        plan = Plan(
            sources=&nowhere, targets=&nowhere, tensors=1, runs=&self._runs[0], num_runs=self._count,
            carrier=IN_PROCESS, pid=0,
        )
        return execute_shared(&plan, gate, threads, in_order)

    def close(self):
        """Give event and memory back; nothing may be on the way."""
        self._event.close()
        self._memory.close()


@cython.final
cdef class Lane:
    """A stream of a device and, once they are needed, two buffers.

    Parameters
    ----------
    device : Device

    Raises
    ------
    AclError
        The device has no more streams.
    """

    def __init__(self, Device device not None):
        self._device = device
        self._stream = Stream(device)

    def close(self):
        """Give everything back; no copy may be running."""
        self._stream.close()
        for bounce in (self._first, self._second):
            if bounce is not None:
                bounce.close()

    cdef int make_buffers(self) except -1:
        """Take the buffers, if that has not been done."""
        if self._second is None:
            self._first = Bounce(self._device)
            self._second = Bounce(self._device)
        return 0

    cdef int find_ways(self, const Plan *plan, uint8_t *ways, bint *bounced) except -1:
        cdef AclFailure failure
        cdef Scope scope
        bounced[0] = False
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self._device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                _find_ways(plan, ways, bounced)
                self._device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return 0

    cdef CopyOutcome carry(
        self, const Plan *plan, const uint8_t *ways, bint in_order, uint64_t threads, const Gate *gate,
        AclFailure *failure, bint *lost,
    ) noexcept nogil:
        cdef CopyOutcome outcome
        cdef Scope scope
        lost[0] = False
        self._gate, self._failure, self._threads, self._in_order = gate, failure, threads, in_order
        note_failure(failure, "aclrtSetCurrentContext", self._device.enter(&scope))
        if failure.code != ACL_SUCCESS:
            return COPY_FAULT
        outcome = self._carry_tensors(plan, ways)
        if outcome != COPIED and self._tasks != 0:
            # Only now nothing writes any more: on a deadline, and also on an error, behind which tasks go on.
            lost[0] = self._stream.abort() != ACL_SUCCESS
        self._device.leave(&scope)
        return outcome

    cdef CopyOutcome _carry_tensors(self, const Plan *plan, const uint8_t *ways) noexcept nogil:
        cdef CopyOutcome outcome = COPIED
        cdef uint64_t tensor
        for tensor in range(plan.tensors):
            if tensor != 0 and ways[tensor] != ways[tensor - 1]:
                outcome = self._finish()
            if outcome == COPIED:
                outcome = self._carry_tensor(plan, tensor, <Way>ways[tensor])
            if outcome != COPIED:
                return outcome
        return self._finish()

    cdef CopyOutcome _carry_tensor(self, const Plan *plan, uint64_t tensor, Way way) noexcept nogil:
        cdef CopyOutcome outcome = COPIED
        cdef Plan of_tensor
        cdef uint64_t source, target, nbytes, r
        if way == ON_HOST:
            of_tensor = plan[0]
            of_tensor.sources += tensor
            of_tensor.targets += tensor
            of_tensor.tensors = 1
            return execute_shared(&of_tensor, self._gate, self._threads, self._in_order)
        self._inward = way == IN_BOUNCED
        for r in range(plan.num_runs):
            source = plan.sources[tensor] + plan.runs[r].source
            target = plan.targets[tensor] + plan.runs[r].target
            nbytes = plan.runs[r].nbytes
            if way == ON_DEVICE:
                outcome = self._inside_device(target, source, nbytes)
            elif way == IN_DIRECTLY:
                outcome = self._enqueue(target, source, nbytes, ACL_MEMCPY_HOST_TO_DEVICE)
            elif way == OUT_DIRECTLY:
                outcome = self._enqueue(target, source, nbytes, ACL_MEMCPY_DEVICE_TO_HOST)
            elif way == IN_BOUNCED:
                outcome = self._bounce(source, target, nbytes)
            else:
                outcome = self._bounce(target, source, nbytes)
            if outcome != COPIED:
                return outcome
        return COPIED

    # ---- inside the device

    cdef CopyOutcome _inside_device(self, uint64_t target, uint64_t source, uint64_t nbytes) noexcept nogil:
        if (target | source) % ACL_COPY_ALIGNMENT == 0:
            return self._enqueue(target, source, nbytes, ACL_MEMCPY_DEVICE_TO_DEVICE)
        return self._wait_and_copy(target, source, nbytes)

    cdef CopyOutcome _wait_and_copy(self, uint64_t target, uint64_t source, uint64_t nbytes) noexcept nogil:
        """Copy between addresses that the asynchronous copy does not take; it has no order with the stream."""
        cdef CopyOutcome outcome = self._wait()
        cdef uint64_t piece
        while outcome == COPIED and nbytes != 0:
            piece = min(nbytes, <uint64_t>SYNCHRONOUS_BYTES)
            outcome = self._look()
            if outcome == COPIED:
                outcome = self._judge("aclrtMemcpy", self._device.acl.aclrtMemcpy(
                    <void *>target, piece, <const void *>source, piece, ACL_MEMCPY_DEVICE_TO_DEVICE))
            target += piece
            source += piece
            nbytes -= piece
        return outcome

    # ---- through the buffers

    cdef CopyOutcome _bounce(self, uint64_t host, uint64_t device, uint64_t nbytes) noexcept nogil:
        cdef CopyOutcome outcome
        cdef uint64_t taken
        while nbytes != 0:
            taken = nbytes
            if self._second_next:
                outcome = self._add_piece(self._second, host, device, &taken)
            else:
                outcome = self._add_piece(self._first, host, device, &taken)
            if outcome != COPIED:
                return outcome
            host += taken
            device += taken
            nbytes -= taken
        return COPIED

    cdef CopyOutcome _add_piece(self, Bounce bounce, uint64_t host, uint64_t device, uint64_t *nbytes) noexcept nogil:
        """Take as much of a range as the buffer has room for, and send it off when it is full."""
        cdef CopyOutcome outcome = self._settle(bounce)
        cdef Piece *piece
        if outcome != COPIED:
            return outcome
        piece = bounce._add(host, device, nbytes[0])
        nbytes[0] = piece.nbytes
        if not self._inward:
            outcome = self._enqueue(
                bounce._memory.base + piece.offset, piece.device, piece.nbytes, ACL_MEMCPY_DEVICE_TO_HOST
            )
        if outcome == COPIED and bounce._is_full:
            outcome = self._send_off(bounce)
        return outcome

    cdef CopyOutcome _send_off(self, Bounce bounce) noexcept nogil:
        """Let the device copy what is in the buffer, or for it, and go on with the other one."""
        cdef CopyOutcome outcome = COPIED
        cdef Piece *piece
        cdef uint64_t i
        if bounce._count == 0:
            return COPIED
        if self._inward:
            outcome = bounce._move(True, self._in_order, self._threads, self._gate)
            for i in range(bounce._count):
                if outcome != COPIED:
                    return outcome
                piece = &bounce._pieces[i]
                outcome = self._enqueue(
                    piece.device, bounce._memory.base + piece.offset, piece.nbytes, ACL_MEMCPY_HOST_TO_DEVICE
                )
        if outcome != COPIED:
            return outcome
        bounce._on_the_way = True
        self._second_next = not self._second_next
        return self._judge("aclrtRecordEvent", bounce._event.record(self._stream))

    cdef CopyOutcome _settle(self, Bounce bounce) noexcept nogil:
        """Make a buffer free that was sent off; what has come out of the device in it goes to the host."""
        cdef CopyOutcome outcome = COPIED
        if not bounce._on_the_way:
            return COPIED
        outcome = self._judge("aclrtMemcpyAsync", bounce._event.wait(self._gate))
        if outcome == COPIED and not self._inward:
            outcome = bounce._move(False, self._in_order, self._threads, self._gate)
        if outcome == COPIED:
            bounce._on_the_way = bounce._is_full = False
            bounce._count = bounce._used = 0
        return outcome

    cdef CopyOutcome _finish(self) noexcept nogil:
        """See everything through that was begun."""
        cdef CopyOutcome outcome = COPIED
        if self._second is not None:
            # What is sent off now is the younger one afterwards.
            outcome = self._send_off(self._second) if self._second_next else self._send_off(self._first)
            if outcome == COPIED:
                outcome = self._settle(self._second) if self._second_next else self._settle(self._first)
            if outcome == COPIED:
                outcome = self._settle(self._first) if self._second_next else self._settle(self._second)
        return self._wait() if outcome == COPIED else outcome

    # ---- the stream

    cdef CopyOutcome _enqueue(self, uint64_t target, uint64_t source, uint64_t nbytes, int32_t kind) noexcept nogil:
        cdef CopyOutcome outcome = self._wait() if self._tasks >= MOST_TASKS else self._look()
        cdef aclError code
        if outcome != COPIED or nbytes == 0:
            return outcome
        code = self._device.acl.aclrtMemcpyAsync(
            <void *>target, nbytes, <const void *>source, nbytes, kind, self._stream.handle
        )
        self._tasks += 1  # also when it failed: better an abort too many
        return self._judge("aclrtMemcpyAsync", code)

    cdef CopyOutcome _wait(self) noexcept nogil:
        """Wait until the stream is empty."""
        cdef CopyOutcome outcome
        if self._tasks == 0:
            return COPIED
        # An error that is seen here is one of the copies.
        outcome = self._judge("aclrtMemcpyAsync", self._stream.wait(self._gate))
        if outcome == COPIED:
            self._tasks = 0
        return outcome

    cdef CopyOutcome _look(self) noexcept nogil:
        if stopped(self._gate):
            return COPY_STOPPED
        return COPY_TIMED_OUT if monotonic_ns() > self._gate.deadline_ns else COPIED

    cdef CopyOutcome _judge(self, const char *function, aclError code) noexcept nogil:
        if code == ACL_SUCCESS:
            return COPIED
        note_failure(self._failure, function, code)
        if code == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT or code == ACL_ERROR_RT_EVENT_SYNC_TIMEOUT:
            return COPY_STOPPED if stopped(self._gate) else COPY_TIMED_OUT
        return COPY_FAULT


cdef void _find_ways(const Plan *plan, uint8_t *ways, bint *bounced) noexcept nogil:
    cdef uint64_t first_source, first_target, source_nbytes, target_nbytes, tensor
    cdef bint from_device, to_device, pinned
    _extent(plan, True, &first_source, &source_nbytes)
    _extent(plan, False, &first_target, &target_nbytes)
    for tensor in range(plan.tensors):
        from_device = is_device_memory(plan.sources[tensor] + first_source)
        to_device = is_device_memory(plan.targets[tensor] + first_target)
        if from_device == to_device:
            ways[tensor] = ON_DEVICE if to_device else ON_HOST
            continue
        if to_device:
            pinned = is_pinned_memory(plan.sources[tensor] + first_source, source_nbytes)
            ways[tensor] = IN_DIRECTLY if pinned else IN_BOUNCED
        else:
            pinned = is_pinned_memory(plan.targets[tensor] + first_target, target_nbytes)
            ways[tensor] = OUT_DIRECTLY if pinned else OUT_BOUNCED
        bounced[0] = bounced[0] or not pinned


cdef void _extent(const Plan *plan, bint of_source, uint64_t *first, uint64_t *nbytes) noexcept nogil:
    """Find the range of a tensor that the runs lie in, on one of the sides."""
    cdef uint64_t begin, end, r
    cdef uint64_t last = 0
    first[0] = plan.runs[0].source if of_source else plan.runs[0].target
    for r in range(plan.num_runs):
        begin = plan.runs[r].source if of_source else plan.runs[r].target
        end = begin + plan.runs[r].nbytes
        first[0] = min(first[0], begin)
        last = max(last, end)
    nbytes[0] = last - first[0]
