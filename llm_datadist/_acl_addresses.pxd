from libc.stdint cimport uint64_t

cdef enum:
    MOST_RANGES = 1024

# Whether an address belongs to a device; a device must be entered.
cdef bint is_device_memory(uint64_t address) noexcept nogil
# Whether a range of the host is pinned, so that copies from and to it run by themselves; a device must be entered.
cdef bint is_pinned_memory(uint64_t address, uint64_t nbytes) noexcept nogil

# What this library has taken on devices, which is known without asking; False if there are too many.
cdef bint remember_range(uint64_t begin, uint64_t end) noexcept nogil
cdef void forget_range(uint64_t begin, uint64_t end) noexcept nogil
