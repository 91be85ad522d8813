"""Memory of a device, and memory of the host that a device reaches; given back from whatever thread drops it."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int32_t, uint64_t

from llm_datadist._acl_addresses cimport MOST_RANGES, forget_range, remember_range
from llm_datadist._acl_device cimport Device, Scope
from llm_datadist._acl_runtime cimport (
    ACL_MEM_MALLOC_HUGE_FIRST, ACL_MEM_MALLOC_HUGE_FIRST_P2P, ACL_SUCCESS, AclFailure, AclFunctions, failure_error,
    in_forked_child, note_failure,
)
from llm_datadist._segment cimport Memory

from llm_datadist._segment import HUGE_PAGE

cdef uint64_t PAGE = HUGE_PAGE


@cython.final
@cython.no_gc_clear
cdef class DeviceMemory(Memory):
    """Memory of a device, large and meant to be reached by other devices: a pool.

    It begins at a boundary of 2 MiB and has whole pages of 2 MiB, since it is shared with other processes by pages.
    What it holds at first is not defined.

    Parameters
    ----------
    device : Device
    nbytes : int
        Bytes, > 0; rounded up to whole pages.

    Raises
    ------
    ValueError
        `nbytes` is 0.
    AclError
        The device has no room: 207001.
    """

    def __init__(self, Device device not None, uint64_t nbytes):
        cdef AclFailure failure
        cdef Scope scope
        if nbytes == 0:
            raise ValueError("size of device memory is 0 bytes, should be > 0")
        if nbytes > <uint64_t>1 << 62:
            raise ValueError(f"size of device memory is {nbytes} bytes, should be <= 2**62")
        device._hold()
        self.device = device
        cdef uint64_t size = (nbytes + PAGE - 1) // PAGE * PAGE
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self._block = _take_pages(device.acl, size, &failure)
                device.leave(&scope)
        if self._block == NULL:
            self.device = None
            device._drop()
            raise failure_error(&failure)
        self.base = (<uint64_t>self._block + PAGE - 1) // PAGE * PAGE
        self.size = size
        self.writable = True
        if not remember_range(self.base, self.base + size) and device.acl.aclrtPointerGetAttributes == NULL:
            self._free(&failure)
            raise MemoryError(f"more than {MOST_RANGES} pieces of device memory in one process")

    cdef void _free(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef void *block = self._block
        failure.code = ACL_SUCCESS
        if block == NULL or in_forked_child() or device.lost:
            return
        forget_range(self.base, self.base + self.size)
        self._block = NULL
        self.base = 0
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtFree", device.acl.aclrtFree(block))
                device.leave(&scope)
        device._drop()

    def close(self):
        """Give the memory back; nothing that was enqueued may still use it. May be called twice.

        Raises
        ------
        AclError
            The runtime refuses, for instance because the device was lost.
        """
        cdef AclFailure failure
        self._free(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._free(&failure)


cdef void *_take_pages(AclFunctions *acl, uint64_t size, AclFailure *failure) noexcept nogil:
    """Take memory that holds `size` bytes from a page boundary on."""
    cdef void *block = _take(acl, size, failure)
    if <uint64_t>block % PAGE == 0:  # also when there was none
        return block
    # More than 64 bytes of alignment is not promised. Give it back first: there may be no room for both.
    acl.aclrtFree(block)
    return _take(acl, size + PAGE, failure)


cdef void *_take(AclFunctions *acl, uint64_t size, AclFailure *failure) noexcept nogil:
    # Peers reach the memory through their own devices, for which the P2P kind is meant; where a product has none of it,
    # or not enough, ordinary memory serves the transfers that the process carries out itself.
    cdef void *block = NULL
    cdef int32_t policy = ACL_MEM_MALLOC_HUGE_FIRST_P2P
    while True:
        block = NULL
        if acl.aclrtMallocAlign32 != NULL:
            note_failure(failure, "aclrtMallocAlign32", acl.aclrtMallocAlign32(&block, size, policy))
        else:
            note_failure(failure, "aclrtMalloc", acl.aclrtMalloc(&block, size, policy))
        if failure.code == ACL_SUCCESS:
            return block
        if policy == ACL_MEM_MALLOC_HUGE_FIRST:
            return NULL
        policy = ACL_MEM_MALLOC_HUGE_FIRST


@cython.final
@cython.no_gc_clear
cdef class PinnedMemory(Memory):
    """Memory of the host that stays where it is, so that a device copies from and to it by itself.

    It supports the buffer protocol, writable. `close` gives it back once the last buffer is released.

    Parameters
    ----------
    device : Device
        The device that copies.
    nbytes : int
        Bytes, > 0.

    Raises
    ------
    ValueError
        `nbytes` is 0.
    AclError
        The host has no memory for it.
    """

    def __init__(self, Device device not None, uint64_t nbytes):
        cdef AclFailure failure
        cdef Scope scope
        cdef void *block = NULL
        if not 0 < nbytes < <uint64_t>1 << 62:
            raise ValueError(f"size of pinned memory is {nbytes} bytes, should be in [1, 2**62)")
        device._hold()
        self.device = device
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtMallocHost", device.acl.aclrtMallocHost(&block, nbytes))
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)
        self.base = <uint64_t>block
        self.size = nbytes
        self.writable = True

    cdef void _free(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef void *block = <void *>self.base
        failure.code = ACL_SUCCESS
        if block == NULL or in_forked_child() or device.lost:
            return
        self.base = 0
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtFreeHost", device.acl.aclrtFreeHost(block))
                device.leave(&scope)
        device._drop()

    def close(self):
        """Give the memory back as soon as no buffer refers to it; may be called twice."""
        cdef AclFailure failure
        self._closed = True
        if self._exports != 0:
            return
        self._free(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self._closed or self.base == 0:
            raise BufferError("pinned memory is closed")
        PyBuffer_FillInfo(buffer, self, <void *>self.base, <Py_ssize_t>self.size, False, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        cdef AclFailure failure
        self._exports -= 1
        if self._exports == 0 and self._closed:
            self._free(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._free(&failure)
