from libc.stdint cimport uint64_t


# A range of memory of this process or of its device: all that who claims and checks caches needs to know of a pool.
cdef class Memory:
    cdef uint64_t base            # address of the first byte, 0 once it is given up
    cdef readonly uint64_t size   # bytes
    cdef readonly bint writable   # whether this process may write to it


cdef class Segment(Memory):
    cdef readonly bint huge_pages   # whether `populate` tries for huge pages; it gives up when there are none
    cdef int _fd
    cdef Py_ssize_t _exports      # buffers that Python code holds on the mapping
    cdef bint _closed

    cdef int _unmap(self) except -1
