"""What an address belongs to: a device, or memory of the host that a device reaches."""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from llm_datadist._acl_runtime cimport (
    ACL_MEM_LOCATION_TYPE_DEVICE, ACL_MEM_LOCATION_TYPE_HOST, ACL_SUCCESS, aclrtPtrAttributes, forget_text,
    functions_in_use,
)
from llm_datadist._atomics cimport compare_exchange, relax, store_release


# The ranges that this library has taken on devices, for releases that cannot tell what an address belongs to.
cdef struct Range:
    uint64_t begin
    uint64_t end

cdef Range _ranges[MOST_RANGES]
cdef int _num_ranges = 0  # behind it nothing was ever written
cdef uint64_t _ranges_lock = 0


cdef void _lock_ranges() noexcept nogil:
    while not compare_exchange(&_ranges_lock, 0, 1):
        relax()


cdef bint remember_range(uint64_t begin, uint64_t end) noexcept nogil:
    return _exchange_range(0, 0, begin, end)


cdef void forget_range(uint64_t begin, uint64_t end) noexcept nogil:
    _exchange_range(begin, end, 0, 0)


cdef bint _exchange_range(uint64_t old, uint64_t old_end, uint64_t begin, uint64_t end) noexcept nogil:
    global _num_ranges
    cdef bint found = False
    cdef int i
    _lock_ranges()
    for i in range(MOST_RANGES):
        if _ranges[i].begin == old and _ranges[i].end == old_end:
            _ranges[i].begin = begin
            _ranges[i].end = end
            _num_ranges = max(_num_ranges, i + 1)
            found = True
            break
    store_release(&_ranges_lock, 0)
    return found


cdef bint _is_in_ranges(uint64_t address) noexcept nogil:
    cdef bint found = False
    cdef int i
    _lock_ranges()
    for i in range(_num_ranges):
        if _ranges[i].begin <= address < _ranges[i].end:
            found = True
            break
    store_release(&_ranges_lock, 0)
    return found


cdef int _location(uint64_t address) noexcept nogil:
    """Give the type of a location, or -1 if the runtime does not tell."""
    cdef aclrtPtrAttributes attributes
    memset(&attributes, 0, sizeof(attributes))
    if functions_in_use().aclrtPointerGetAttributes(<const void *>address, &attributes) != ACL_SUCCESS:
        forget_text()
        return -1
    return attributes.location.type


cdef bint is_device_memory(uint64_t address) noexcept nogil:
    if _is_in_ranges(address):
        return True  # most that is asked for, and sooner than the runtime tells
    if functions_in_use().aclrtPointerGetAttributes == NULL:
        return False
    return _location(address) == ACL_MEM_LOCATION_TYPE_DEVICE


cdef bint is_pinned_memory(uint64_t address, uint64_t nbytes) noexcept nogil:
    if functions_in_use().aclrtPointerGetAttributes == NULL or nbytes == 0:
        return False
    return (
        _location(address) == ACL_MEM_LOCATION_TYPE_HOST
        and _location(address + nbytes - 1) == ACL_MEM_LOCATION_TYPE_HOST
    )
