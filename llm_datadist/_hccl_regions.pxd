# Memory that peers reach over HCCL by themselves, and communicators that it is bound to.

from libc.stdint cimport uint64_t

from llm_datadist._acl cimport AclFailure, Device
from llm_datadist._hccl cimport Communicator, HcclFunctions


cdef class RegisteredMemory:
    cdef readonly Device device
    cdef readonly uint64_t address
    cdef readonly uint64_t size
    cdef object _memory                   # its owner
    cdef void *handle                     # NULL once it is taken back
    cdef HcclFunctions *hccl

    cdef bint _take_back(self, AclFailure *failure) noexcept


cdef class OneSidedCommunicator(Communicator):
    cdef RegisteredMemory _bound          # None once it is unbound

    cdef int _bind(self, RegisteredMemory memory) except -1
    cdef bint _unbind(self, uint64_t deadline_ns) noexcept
