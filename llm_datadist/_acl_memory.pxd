from libc.stdint cimport uint64_t

from llm_datadist._acl_device cimport Device
from llm_datadist._acl_runtime cimport AclFailure
from llm_datadist._segment cimport Memory


cdef class DeviceMemory(Memory):
    cdef readonly Device device
    cdef void *_block                     # as ACL gave it: `base` is the first page boundary inside
    cdef void _free(self, AclFailure *failure) noexcept


cdef class PinnedMemory(Memory):
    cdef readonly Device device
    cdef Py_ssize_t _exports
    cdef bint _closed
    cdef void _free(self, AclFailure *failure) noexcept
