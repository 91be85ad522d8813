from libc.stdint cimport uint64_t

from llm_datadist._acl_runtime cimport AclFunctions, aclError, aclrtContext

# What `Device.leave` needs.
cdef struct Scope:
    aclrtContext previous
    bint changed


cdef class Device:
    cdef readonly int device_id           # as aclrtSetDevice takes it
    cdef readonly int physical_id
    cdef readonly str soc_name
    cdef AclFunctions *acl
    cdef aclrtContext _context            # the default one of the device, shared with others of this process
    cdef bint _open
    cdef bint _closing
    cdef bint lost                        # tasks could not be ended: memory that they may touch is never given back
    cdef uint64_t _users                  # handles that must be given back before the device is

    # Makes the device current on this thread. `leave` must follow, unless it failed.
    cdef aclError enter(self, Scope *scope) noexcept nogil
    # Makes current what was so before; a thread that had nothing keeps the device.
    cdef void leave(self, Scope *scope) noexcept nogil
    cdef int _hold(self) except -1
    cdef int _keep(self) except -1
    cdef void _drop(self) noexcept
    cdef void _give_back(self) noexcept
    cdef int _find_physical_id(self) except? -1
