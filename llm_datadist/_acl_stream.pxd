from llm_datadist._acl_device cimport Device
from llm_datadist._acl_runtime cimport AclFailure, aclError, aclrtEvent, aclrtStream
from llm_datadist._copy cimport Gate


cdef class Stream:
    cdef readonly Device device
    cdef aclrtStream handle
    cdef bint aborted

    # Until everything on the stream has taken effect: 0, or the first error of its tasks.
    # ACL_ERROR_RT_STREAM_SYNC_TIMEOUT when the gate is stopped or late: then tasks may still write, until `abort` has
    # returned 0.
    cdef aclError wait(self, const Gate *gate) noexcept nogil
    # 0: no task of the stream touches memory from now on. The stream is of no more use; it can only be closed.
    cdef aclError abort(self) noexcept nogil
    cdef void _destroy(self, AclFailure *failure) noexcept


cdef class Event:
    cdef readonly Device device
    cdef aclrtEvent handle
    cdef readonly bint reusable           # of the newer kind, which needs no reset
    cdef bint _recorded

    cdef aclError record(self, Stream stream) noexcept nogil
    # What comes next on the stream waits for the latest record.
    cdef aclError make_wait(self, Stream stream) noexcept nogil
    # As of a stream, with ACL_ERROR_RT_EVENT_SYNC_TIMEOUT.
    cdef aclError wait(self, const Gate *gate) noexcept nogil
    cdef aclError query(self, bint *complete) noexcept nogil
    cdef aclError _renew(self) noexcept nogil
    cdef void _destroy(self, AclFailure *failure) noexcept
