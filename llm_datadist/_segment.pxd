from libc.stdint cimport uint64_t


cdef class Segment:
    cdef uint64_t base            # address of the mapping, 0 once unmapped
    cdef readonly uint64_t size   # bytes
    cdef readonly bint writable   # whether this process may write through its mapping
    cdef readonly bint huge_pages   # whether `populate` tries for huge pages; it gives up when there are none
    cdef int _fd
    cdef Py_ssize_t _exports      # buffers that Python code holds on the mapping
    cdef bint _closed

    cdef int _unmap(self) except -1
