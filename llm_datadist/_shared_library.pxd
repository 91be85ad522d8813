# A library of the device's vendor: found when it is first asked for, never given back.

cdef class SharedLibrary:
    cdef readonly tuple names             # as the linker knows them; the first ones are preferred
    cdef readonly str variable            # of the environment: the path of the only file to look in
    cdef readonly list paths              # of what was opened
    cdef readonly list missing            # optional names that it lacks
    cdef list _left                       # names that were not opened yet
    cdef void *_handles[4]
    cdef int _num_handles

    cdef int open(self) except -1
    cdef void *find(self, const char *name) except? NULL
    cdef int require(self, const char *name, void **slot) except -1
    cdef int accept(self, const char *name, void **slot) except -1
    cdef bint _open_file(self, str file, bint if_loaded, list attempts) except -1
    cdef bint _open_first(self, list files, bint if_loaded, list attempts) except -1
