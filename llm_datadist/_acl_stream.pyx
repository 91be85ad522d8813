"""Streams and events of a device. Nothing waits without a limit; a busy stream is aborted and not waited for."""

cimport cython
from libc.stdint cimport int32_t, uint64_t

from llm_datadist._acl_device cimport Device, Scope
from llm_datadist._acl_runtime cimport (
    ACL_CLOSED, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, ACL_EVENT_RECORDED_STATUS_COMPLETE,
    ACL_EVENT_RECORDED_STATUS_NOT_READY, ACL_EVENT_SYNC, ACL_EVENT_UNRECORDED, ACL_FORKED_CHILD, ACL_SLICE_MS,
    ACL_STREAM_FAST_LAUNCH, ACL_STREAM_FAST_SYNC, ACL_SUCCESS, AclFailure, AclFunctions, aclError, aclrtEvent,
    aclrtStream, failure_error, forget_text, in_forked_child, note_failure,
)
from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._copy cimport Gate, stopped


cdef int32_t _slice_ms(const Gate *gate) noexcept nogil:
    """How long to wait at a stretch: never 0, whose meaning is not documented, and never without a limit."""
    cdef uint64_t now = monotonic_ns()
    cdef uint64_t left = (gate.deadline_ns - now + 999999) // 1000000 if gate.deadline_ns > now else 1
    return <int32_t>min(left, <uint64_t>ACL_SLICE_MS)


cdef Gate _until(uint64_t deadline_ns) noexcept nogil:
    cdef Gate gate
    gate.deadline_ns = deadline_ns
    gate.peer_dead = gate.revoked = gate.closing = NULL
    return gate


@cython.final
@cython.no_gc_clear
cdef class Stream:
    """A queue of tasks of a device, which run in order and beside those of other streams.

    Parameters
    ----------
    device : Device

    Raises
    ------
    AclError
        The device has no more streams: 207008.
    """

    def __init__(self, Device device not None):
        cdef AclFailure failure
        cdef Scope scope
        device._hold()
        self.device = device
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self.handle = _new_stream(device.acl, &failure)
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)

    cdef aclError wait(self, const Gate *gate) noexcept nogil:
        cdef aclError code
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        while True:
            code = self.device.acl.aclrtSynchronizeStreamWithTimeout(self.handle, _slice_ms(gate))
            if code != ACL_ERROR_RT_STREAM_SYNC_TIMEOUT or stopped(gate) or monotonic_ns() >= gate.deadline_ns:
                return code

    cdef aclError abort(self) noexcept nogil:
        cdef aclError code
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_SUCCESS
        code = self.device.acl.aclrtStreamAbort(self.handle)
        if code == ACL_SUCCESS:
            self.aborted = True
        return code

    cdef void _destroy(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef aclrtStream handle = self.handle
        failure.code = ACL_SUCCESS
        if handle == NULL or in_forked_child():
            return
        self.handle = NULL
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                _destroy_stream(device.acl, handle, self.aborted, failure)
                device.leave(&scope)
        device._drop()

    def synchronise(self, uint64_t deadline_ns):
        """Wait until all tasks have taken effect.

        Parameters
        ----------
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        AclError
            507046: the deadline passed, tasks may still write. Any other code: the first error of a task.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef Gate gate = _until(deadline_ns)
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtSynchronizeStreamWithTimeout", self.wait(&gate))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def cancel(self):
        """Drop all tasks; when this returns, none of them writes any more. The stream can only be closed then.

        Raises
        ------
        AclError
            The runtime cannot: what the tasks write to must stay as it is.
        """
        cdef AclFailure failure
        cdef Scope scope
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtStreamAbort", self.abort())
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    @property
    def pointer(self):
        """The runtime's handle as a number, for other libraries of the process; 0 when closed."""
        return <uint64_t>self.handle

    def close(self):
        """Destroy the stream; tasks that are left are dropped. May be called twice.

        Raises
        ------
        AclError
            The runtime refuses, for instance because the device was lost.
        """
        cdef AclFailure failure
        self._destroy(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._destroy(&failure)


cdef void _destroy_stream(AclFunctions *acl, aclrtStream stream, bint aborted, AclFailure *failure) noexcept nogil:
    # The ordinary way waits without a limit, so it is for a stream that has nothing to do.
    if not aborted:
        if acl.aclrtSynchronizeStreamWithTimeout(stream, 1) == ACL_SUCCESS:
            note_failure(failure, "aclrtDestroyStream", acl.aclrtDestroyStream(stream))
            return
        acl.aclrtStreamAbort(stream)
        forget_text()
    note_failure(failure, "aclrtDestroyStreamForce", acl.aclrtDestroyStreamForce(stream))


cdef aclrtStream _new_stream(AclFunctions *acl, AclFailure *failure) noexcept nogil:
    cdef aclrtStream stream = NULL
    if acl.aclrtCreateStreamWithConfig != NULL:
        # Resources are taken now and not at the first launch, and a wait polls: both shorten a transfer.
        if acl.aclrtCreateStreamWithConfig(&stream, 0, ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC) == ACL_SUCCESS:
            failure.code = ACL_SUCCESS
            return stream
        stream = NULL
        forget_text()
    note_failure(failure, "aclrtCreateStream", acl.aclrtCreateStream(&stream))
    return stream


@cython.final
@cython.no_gc_clear
cdef class Event:
    """A mark in a stream, which others wait for. It may be recorded again and again.

    One thread records it, and nobody may wait for an earlier record then.

    Parameters
    ----------
    device : Device

    Raises
    ------
    AclError
        The device has no more events: 207007.
    """

    def __init__(self, Device device not None):
        cdef AclFailure failure
        cdef Scope scope
        device._hold()
        self.device = device
        self.reusable = device.acl.aclrtCreateEventExWithFlag != NULL
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self.handle = _new_event(device.acl, &failure)
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)

    cdef aclError record(self, Stream stream) noexcept nogil:
        cdef aclError code
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL or stream.handle == NULL:
            return ACL_CLOSED
        if self._recorded and not self.reusable:
            code = self._renew()
            if code != ACL_SUCCESS:
                return code
        code = self.device.acl.aclrtRecordEvent(self.handle, stream.handle)
        if code == ACL_SUCCESS:
            self._recorded = True
        return code

    cdef aclError _renew(self) noexcept nogil:
        """Put a new event in the place of one of the older kind, which goes on to count as complete until it is reset.

        The reset would be a task of the stream; until it runs, the last record would let through who waits here.
        """
        cdef AclFailure failure
        cdef aclrtEvent new = _new_event(self.device.acl, &failure)
        if failure.code != ACL_SUCCESS:
            return failure.code
        new, self.handle = self.handle, new
        return self.device.acl.aclrtDestroyEvent(new)  # the old one; streams that wait for it keep what they need

    cdef aclError make_wait(self, Stream stream) noexcept nogil:
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL or stream.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        return self.device.acl.aclrtStreamWaitEvent(stream.handle, self.handle)

    cdef aclError wait(self, const Gate *gate) noexcept nogil:
        cdef aclError code
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        while True:
            code = self.device.acl.aclrtSynchronizeEventWithTimeout(self.handle, _slice_ms(gate))
            if code != ACL_ERROR_RT_EVENT_SYNC_TIMEOUT or stopped(gate) or monotonic_ns() >= gate.deadline_ns:
                return code

    cdef aclError query(self, bint *complete) noexcept nogil:
        cdef int32_t status = ACL_EVENT_RECORDED_STATUS_NOT_READY
        cdef aclError code
        complete[0] = False
        if in_forked_child():
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        code = self.device.acl.aclrtQueryEventStatus(self.handle, &status)
        complete[0] = code == ACL_SUCCESS and status == ACL_EVENT_RECORDED_STATUS_COMPLETE
        return code

    cdef void _destroy(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef aclrtEvent handle = self.handle
        failure.code = ACL_SUCCESS
        if handle == NULL or in_forked_child():
            return
        self.handle = NULL
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtDestroyEvent", device.acl.aclrtDestroyEvent(handle))
                device.leave(&scope)
        device._drop()

    def mark(self, Stream stream not None):
        """Record the event behind what is on a stream now."""
        cdef AclFailure failure
        cdef Scope scope
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtRecordEvent", self.record(stream))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def hold_up(self, Stream stream not None):
        """Let what comes next on a stream wait for the event."""
        cdef AclFailure failure
        cdef Scope scope
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtStreamWaitEvent", self.make_wait(stream))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def synchronise(self, uint64_t deadline_ns):
        """Wait until the event is complete; the deadline is on the clock of ``time.monotonic_ns``.

        Raises
        ------
        AclError
            507047: the deadline passed. A negative code: the event was never recorded, or is closed.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef Gate gate = _until(deadline_ns)
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtSynchronizeEventWithTimeout", self.wait(&gate))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    @property
    def complete(self):
        """Whether everything before the latest record has taken effect."""
        cdef AclFailure failure
        cdef Scope scope
        cdef bint complete = False
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtQueryEventStatus", self.query(&complete))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return complete

    def close(self):
        """Destroy the event, also before it is complete; may be called twice."""
        cdef AclFailure failure
        self._destroy(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._destroy(&failure)


cdef aclrtEvent _new_event(AclFunctions *acl, AclFailure *failure) noexcept nogil:
    cdef aclrtEvent event = NULL
    if acl.aclrtCreateEventExWithFlag != NULL:
        note_failure(failure, "aclrtCreateEventExWithFlag", acl.aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC))
    else:
        note_failure(failure, "aclrtCreateEventWithFlag", acl.aclrtCreateEventWithFlag(&event, ACL_EVENT_SYNC))
    return event
