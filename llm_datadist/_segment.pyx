"""Shared memory without a name: a memfd of fixed size, mapped shared.

A segment vanishes with the last process that holds it, so a crash leaves nothing behind. Its size is sealed: a peer
cannot shrink it under a reader, so touching a mapped page never raises SIGBUS. A segment that peers may only read is
sealed against further writable mappings after the owner has made its own.
"""

import os

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from libc.errno cimport EAGAIN, EBUSY, EINVAL, errno
from libc.stdint cimport uint64_t

import fcntl

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED
    void *MAP_FAILED

# linux/fcntl.h and asm-generic/mman-common.h; spelt out because older Pythons and C libraries lack some of the names.
cdef int F_ADD_SEALS = 1033
cdef int F_GET_SEALS = 1034
cdef int F_SEAL_SEAL = 0x0001
cdef int F_SEAL_SHRINK = 0x0002
cdef int F_SEAL_GROW = 0x0004
cdef int F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1
cdef int MADV_HUGEPAGE = 14
cdef int MADV_POPULATE_WRITE = 23      # Linux 5.14
cdef int MADV_COLLAPSE = 25            # Linux 6.1
cdef unsigned MFD_HUGETLB = 0x0004

HUGE_PAGE = 2 << 20  # bytes; on x86-64, and on aarch64 with pages of 4 KiB
cdef uint64_t HUGE = HUGE_PAGE

cdef uint64_t PAGE = <uint64_t>os.sysconf("SC_PAGESIZE")


cdef class Memory:
    """A range of memory that a pool may lie in: shared memory of the host, or memory of a device.

    Attributes
    ----------
    size : int
        Bytes.
    writable : bool
        Whether this process may write to it.
    """

    @property
    def address(self) -> int:
        """Address of the first byte in this process, 0 when closed."""
        return self.base

    def close(self):
        """Give the memory up; may be called twice."""
        raise NotImplementedError(type(self).__name__)


cdef class Segment(Memory):
    """One shared mapping; made with `create` by its owner and with `attach` by a peer.

    The object supports the buffer protocol (bytes, writable where `writable`). `close` unmaps it once the last buffer
    is released; it may be called twice.
    """

    def __cinit__(self):
        self._fd = -1

    @staticmethod
    def create(str name, uint64_t size, *, bint peers_may_write, bint reserved_huge_pages=False):
        """Make a zeroed segment and map it readable and writable.

        Parameters
        ----------
        name : str
            Label shown in ``/proc/<pid>/maps``; it is no address, other processes cannot open it.
        size : int
            Bytes, > 0; rounded up to whole pages.
        peers_may_write : bool
            False seals the segment so that no later mapping, in any process, can be writable.
        reserved_huge_pages : bool
            Take the memory from the huge pages that the system keeps in reserve; the size is rounded up to them.

        Raises
        ------
        OSError
            The kernel refuses the memfd or the mapping; for instance, the reserve is too small.
        """
        if size == 0:
            raise ValueError("size of a segment is 0 bytes, should be > 0")
        cdef Segment self = Segment.__new__(Segment)
        cdef uint64_t page = HUGE_PAGE if reserved_huge_pages else PAGE
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (MFD_HUGETLB if reserved_huge_pages else 0)
        self._fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(self._fd, (size + page - 1) // page * page)
            _map(self, True)
            seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
            if not peers_may_write:
                seals |= F_SEAL_FUTURE_WRITE
            fcntl.fcntl(self._fd, F_ADD_SEALS, seals)
        except BaseException:
            self.close()
            raise
        return self

    @staticmethod
    def attach(int fd, *, bint writable):
        """Map a segment that a peer sent; takes over `fd`, also when it fails.

        Raises
        ------
        ValueError
            The descriptor is no memfd whose size is sealed.
        OSError
            The kernel refuses the mapping, for instance a writable one of a segment that is sealed read-only.
        """
        cdef Segment self = Segment.__new__(Segment)
        self._fd = fd
        try:
            _require_sealed_size(fd)
            _map(self, writable)
        except BaseException:
            self.close()
            raise
        # The mapping is all that is needed: with hundreds of links descriptors would run out first.
        self._fd = -1
        os.close(fd)
        return self

    def fileno(self) -> int:
        """Descriptor of the memfd, for sending it to a peer; the segment keeps owning it."""
        if self._fd < 0:
            raise ValueError("segment is closed, or was attached and has no descriptor")
        return self._fd

    def populate(self, uint64_t offset, uint64_t nbytes):
        """Give `nbytes` bytes from `offset` real pages now, so that the first copy does not pay for them.

        A hint: on kernels before 5.14 it does nothing. Where `huge_pages` is set, whole huge pages are taken if the
        kernel gives them, which is also ten times faster.
        """
        if self.base == 0 or not self.writable or offset > self.size or nbytes > self.size - offset:
            raise ValueError(f"range {offset}+{nbytes} is not inside the writable segment of {self.size} bytes")
        cdef uint64_t first = offset // PAGE * PAGE
        cdef uint64_t length = offset + nbytes - first
        cdef int rc
        if nbytes == 0:
            return
        with nogil:
            if self.huge_pages:
                _populate_huge(self, self.base + first, length)
            rc = madvise(<void *>(self.base + first), length, MADV_POPULATE_WRITE)
        if rc != 0 and errno != EINVAL:
            raise OSError(errno, f"{os.strerror(errno)}: cannot populate {nbytes} bytes of shared memory")

    def prefer_huge_pages(self):
        """Let `populate` take huge pages where the kernel gives them."""
        self.huge_pages = True
        madvise(<void *>self.base, self.size, MADV_HUGEPAGE)  # for kernels that cannot widen; no harm if refused

    def close(self):
        """Close the descriptor now and unmap as soon as no buffer refers to the memory."""
        self._closed = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        if self._exports == 0:
            self._unmap()

    @property
    def closed(self) -> bool:
        return self._closed

    cdef int _unmap(self) except -1:
        if self.base != 0:
            munmap(<void *>self.base, self.size)
            self.base = 0
        return 0

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self._closed or self.base == 0:
            raise BufferError("segment is closed")
        if flags & PyBUF_WRITABLE and not self.writable:
            raise BufferError("segment is mapped read-only")
        PyBuffer_FillInfo(buffer, self, <void *>self.base, <Py_ssize_t>self.size, not self.writable, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self._exports -= 1
        if self._exports == 0 and self._closed:
            self._unmap()

    def __dealloc__(self):
        # No buffer can be alive here: each holds a reference to the segment.
        if self.base != 0:
            munmap(<void *>self.base, self.size)
        if self._fd >= 0:
            os.close(self._fd)


cdef int _map(Segment segment, bint writable) except -1:
    cdef uint64_t size = <uint64_t>os.fstat(segment._fd).st_size
    cdef int protection = PROT_READ | PROT_WRITE if writable else PROT_READ
    cdef uint64_t room = _reserve_aligned(size)
    cdef void *base = mmap(<void *>room, size, protection, MAP_SHARED | (MAP_FIXED if room else 0), segment._fd, 0)
    if base == MAP_FAILED:
        error = OSError(errno, f"{os.strerror(errno)}: cannot map {size} bytes of shared memory")
        if room:
            munmap(<void *>room, size)
        raise error
    segment.base = <uint64_t>base
    segment.size = size
    segment.writable = writable
    return 0


cdef uint64_t _reserve_aligned(uint64_t size) noexcept:
    """Address of reserved room that begins where a huge page may; 0 if the size is too small for one, or none is left.

    Only a mapping whose addresses and offsets agree modulo the size of a huge page can lie on huge pages.
    """
    if size < HUGE:
        return 0
    cdef void *room = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if room == MAP_FAILED:
        return 0
    cdef uint64_t end = <uint64_t>room + size + HUGE
    cdef uint64_t aligned = (<uint64_t>room + HUGE - 1) // HUGE * HUGE
    cdef uint64_t after = (aligned + size + PAGE - 1) // PAGE * PAGE
    if aligned > <uint64_t>room:
        munmap(room, aligned - <uint64_t>room)
    if end > after:
        munmap(<void *>after, end - after)
    return aligned


cdef int _populate_huge(Segment segment, uint64_t address, uint64_t length) noexcept nogil:
    """Fill the whole huge pages of a range: one ordinary page in each, which the kernel then widens.

    It widens regardless of shmem_enabled, short of "deny". No huge page to be had is expensive to find out each time,
    so then it is not asked again.
    """
    cdef uint64_t first = (address + HUGE - 1) // HUGE * HUGE
    cdef uint64_t end = (address + length) // HUGE * HUGE
    cdef uint64_t page = first
    if first >= end:
        return 0
    while page < end:
        if madvise(<void *>page, PAGE, MADV_POPULATE_WRITE) != 0:
            segment.huge_pages = False
            return 0
        page += HUGE
    if madvise(<void *>first, end - first, MADV_COLLAPSE) != 0 and errno != EAGAIN and errno != EBUSY:
        segment.huge_pages = False
    return 0


cdef int _require_sealed_size(int fd) except -1:
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"descriptor {fd} is no memfd: {error.strerror}") from None
    if seals & (F_SEAL_SHRINK | F_SEAL_GROW) != F_SEAL_SHRINK | F_SEAL_GROW:
        raise ValueError(f"size of the memfd is not sealed (seals {seals:#x})")
    if os.fstat(fd).st_size == 0:
        raise ValueError("memfd is empty")
    return 0
