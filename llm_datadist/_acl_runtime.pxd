# The library of the ACL runtime: types, constants, functions, failures.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

ctypedef int aclError
ctypedef void *aclrtStream
ctypedef void *aclrtEvent
ctypedef void *aclrtContext

cdef extern from "acl_structures.h" nogil:
    ctypedef struct aclrtMemLocation "llmdd_acl_mem_location":
        uint32_t id
        int32_t type
    ctypedef struct aclrtPtrAttributes "llmdd_acl_pointer_attributes":
        aclrtMemLocation location
        uint32_t page_size

cdef enum:                                # return codes that decisions are made on
    ACL_SUCCESS = 0
    ACL_ERROR_INVALID_PARAM = 100000
    ACL_ERROR_REPEAT_INITIALIZE = 100002
    ACL_ERROR_RT_CONTEXT_NULL = 107002
    ACL_ERROR_RT_WAIT_TIMEOUT = 107019
    ACL_ERROR_RT_STREAM_ABORT = 107023
    ACL_ERROR_RT_MEMORY_ALLOCATION = 207001
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT = 507046
    ACL_ERROR_RT_EVENT_SYNC_TIMEOUT = 507047
    # Of ours, outside of the vendor's numbers:
    ACL_FORKED_CHILD = -1                 # the process was forked after ACL was initialised
    ACL_CLOSED = -2                       # the device, stream or event was closed
    ACL_EVENT_UNRECORDED = -3             # waiting for it would end at once, and order nothing

cdef enum:                                # aclrtMemcpyKind
    ACL_MEMCPY_HOST_TO_HOST = 0
    ACL_MEMCPY_HOST_TO_DEVICE = 1
    ACL_MEMCPY_DEVICE_TO_HOST = 2
    ACL_MEMCPY_DEVICE_TO_DEVICE = 3

cdef enum:                                # aclrtMemMallocPolicy
    ACL_MEM_MALLOC_HUGE_FIRST = 0
    ACL_MEM_MALLOC_HUGE_FIRST_P2P = 3

cdef enum:                                # aclrtMemAttr, aclrtMemLocationType
    ACL_HBM_MEM = 1
    ACL_MEM_LOCATION_TYPE_HOST = 0
    ACL_MEM_LOCATION_TYPE_DEVICE = 1

cdef enum:                                # of events and of streams: their numbers have the opposite order
    ACL_EVENT_RECORDED_STATUS_NOT_READY = 0
    ACL_EVENT_RECORDED_STATUS_COMPLETE = 1
    ACL_STREAM_STATUS_COMPLETE = 0
    ACL_STREAM_STATUS_NOT_READY = 1
    ACL_EVENT_SYNC = 0x1
    ACL_STREAM_FAST_LAUNCH = 0x1
    ACL_STREAM_FAST_SYNC = 0x2

cdef enum:
    ACL_COPY_ALIGNMENT = 64               # of both addresses of an asynchronous copy inside a device
    ACL_SLICE_MS = 5                      # longest time that a wait does not look at its gate

# Parameter types as in the vendor's headers: enumerations are 32 bits wide, handles are pointers.
# A pointer may be NULL where `_acl_runtime.pyx` says that the function is optional.
cdef struct AclFunctions:
    # process
    aclError (*aclInit)(const char *) noexcept nogil
    const char *(*aclGetRecentErrMsg)() noexcept nogil
    const char *(*aclrtGetSocName)() noexcept nogil
    aclError (*aclsysGetVersionStr)(char *, char *) noexcept nogil
    # device and context
    aclError (*aclrtGetDeviceCount)(uint32_t *) noexcept nogil
    aclError (*aclrtSetDevice)(int32_t) noexcept nogil
    aclError (*aclrtResetDevice)(int32_t) noexcept nogil
    aclError (*aclrtGetCurrentContext)(aclrtContext *) noexcept nogil
    aclError (*aclrtSetCurrentContext)(aclrtContext) noexcept nogil
    aclError (*aclrtGetPhyDevIdByUserDevId)(int32_t, int32_t *) noexcept nogil
    aclError (*aclrtGetPhyDevIdByLogicDevId)(int32_t, int32_t *) noexcept nogil
    aclError (*aclrtGetDeviceInfo)(uint32_t, int32_t, int64_t *) noexcept nogil
    # streams
    aclError (*aclrtCreateStream)(aclrtStream *) noexcept nogil
    aclError (*aclrtCreateStreamWithConfig)(aclrtStream *, uint32_t, uint32_t) noexcept nogil
    aclError (*aclrtDestroyStream)(aclrtStream) noexcept nogil
    aclError (*aclrtDestroyStreamForce)(aclrtStream) noexcept nogil
    aclError (*aclrtSynchronizeStreamWithTimeout)(aclrtStream, int32_t) noexcept nogil
    aclError (*aclrtStreamAbort)(aclrtStream) noexcept nogil
    aclError (*aclrtStreamWaitEvent)(aclrtStream, aclrtEvent) noexcept nogil
    # events
    aclError (*aclrtCreateEventExWithFlag)(aclrtEvent *, uint32_t) noexcept nogil
    aclError (*aclrtCreateEventWithFlag)(aclrtEvent *, uint32_t) noexcept nogil
    aclError (*aclrtDestroyEvent)(aclrtEvent) noexcept nogil
    aclError (*aclrtRecordEvent)(aclrtEvent, aclrtStream) noexcept nogil
    aclError (*aclrtQueryEventStatus)(aclrtEvent, int32_t *) noexcept nogil
    aclError (*aclrtSynchronizeEventWithTimeout)(aclrtEvent, int32_t) noexcept nogil
    # memory
    aclError (*aclrtMalloc)(void **, size_t, int32_t) noexcept nogil
    aclError (*aclrtMallocAlign32)(void **, size_t, int32_t) noexcept nogil
    aclError (*aclrtFree)(void *) noexcept nogil
    aclError (*aclrtMallocHost)(void **, size_t) noexcept nogil
    aclError (*aclrtFreeHost)(void *) noexcept nogil
    aclError (*aclrtGetMemInfo)(int32_t, size_t *, size_t *) noexcept nogil
    aclError (*aclrtPointerGetAttributes)(const void *, aclrtPtrAttributes *) noexcept nogil
    # copies
    aclError (*aclrtMemcpy)(void *, size_t, const void *, size_t, int32_t) noexcept nogil
    aclError (*aclrtMemcpyAsync)(void *, size_t, const void *, size_t, int32_t, aclrtStream) noexcept nogil

# Found at the first call, which also keeps a failure; raises LibraryMissing. Has no other effect on the process.
cdef AclFunctions *acl_functions() except NULL

# The address of a name in the same libraries; NULL if they lack it.
cdef void *acl_symbol(const char *name) except? NULL

# Whether this process was forked from one that had initialised ACL: nothing of the vendor's may be touched then.
cdef bint in_forked_child() noexcept nogil

# A failure where no exception can be made. `function` is a literal; the text is the vendor's, and may be empty.
cdef struct AclFailure:
    const char *function
    aclError code
    char text[512]

# The same as `acl_functions`, without the interpreter lock: for code that runs while a device is open.
cdef AclFunctions *functions_in_use() noexcept nogil

# Takes the vendor's text with it, which lasts only until the next call of the same thread.
cdef void note_failure(AclFailure *out, const char *function, aclError code) noexcept nogil
cdef object acl_error(str function, aclError code)          # an AclError to be raised, with the text of this thread
cdef object failure_error(AclFailure *failure)
cdef object visible_devices_error(AclFailure *failure)      # the same, which also shows what this process may see
# Takes the text of an expected failure away, so that it is not taken for that of a later one.
cdef void forget_text() noexcept nogil
