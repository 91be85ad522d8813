# The ACL runtime of Ascend devices: its functions, found in the installed library when an Ascend device is first asked
# for, and owners of what they give out.
#
# Rules for who uses this. The device must be current on the calling thread (`Device.enter`, then `leave`) around every
# call of a function here and every `cdef` method of Stream and Event; methods that Python sees do it themselves. No call
# may hold the interpreter lock. Nothing waits without a limit: `Stream.wait` and `Event.wait` follow a gate.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._segment cimport Memory

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
# A pointer may be NULL where `_acl.pyx` says that the function is optional.
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
    aclError (*aclrtDeviceCanAccessPeer)(int32_t *, int32_t, int32_t) noexcept nogil
    aclError (*aclrtDeviceGetBareTgid)(int32_t *) noexcept nogil
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
    aclError (*aclrtResetEvent)(aclrtEvent, aclrtStream) noexcept nogil
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
    aclError (*aclrtMemGetAddressRange)(void *, void **, size_t *) noexcept nogil
    # copies
    aclError (*aclrtMemcpy)(void *, size_t, const void *, size_t, int32_t) noexcept nogil
    aclError (*aclrtMemcpyAsync)(void *, size_t, const void *, size_t, int32_t, aclrtStream) noexcept nogil
    # memory between processes of one server
    aclError (*aclrtIpcMemGetExportKey)(void *, size_t, char *, size_t, uint64_t) noexcept nogil
    aclError (*aclrtIpcMemSetImportPid)(const char *, int32_t *, size_t) noexcept nogil
    aclError (*aclrtIpcMemImportByKey)(void **, const char *, uint64_t) noexcept nogil
    aclError (*aclrtIpcMemClose)(const char *) noexcept nogil

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

# Takes the vendor's text with it, which lasts only until the next call of the same thread.
cdef void note_failure(AclFailure *out, const char *function, aclError code) noexcept nogil
cdef object acl_error(str function, aclError code)          # an AclError to be raised, with the text of this thread
cdef object failure_error(AclFailure *failure)

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
    cdef uint64_t _users                  # handles that must be given back before the device is

    # Makes the device current on this thread. `leave` must follow, unless it failed.
    cdef aclError enter(self, Scope *scope) noexcept nogil
    # Makes current what was so before; a thread that had nothing keeps the device.
    cdef void leave(self, Scope *scope) noexcept nogil
    cdef int _hold(self) except -1
    cdef void _drop(self) noexcept
    cdef void _give_back(self) noexcept
    cdef int _find_physical_id(self) except? -1


cdef class DeviceMemory(Memory):
    cdef readonly Device device
    cdef void *_block                     # as ACL gave it: `base` is the first page boundary inside
    cdef void _free(self, AclFailure *failure) noexcept


cdef class PinnedMemory(Memory):
    cdef readonly Device device
    cdef Py_ssize_t _exports
    cdef bint _closed
    cdef void _free(self, AclFailure *failure) noexcept


cdef class Stream:
    cdef readonly Device device
    cdef aclrtStream handle
    cdef bint aborted

    # Until everything on the stream has taken effect: 0, or the first error of its tasks. ACL_ERROR_RT_STREAM_SYNC_TIMEOUT
    # when the gate is stopped or late: then tasks may still write, until `abort` has returned 0.
    cdef aclError wait(self, const Gate *gate) noexcept nogil
    # 0: no task of the stream touches memory from now on. The stream is of no more use; it can only be closed.
    cdef aclError abort(self) noexcept nogil
    cdef void _destroy(self, AclFailure *failure) noexcept


cdef class Event:
    cdef readonly Device device
    cdef aclrtEvent handle
    cdef readonly bint reusable           # of the newer kind, which needs no reset
    cdef bint _recorded

    cdef aclError record(self, Stream stream) noexcept nogil
    # What comes next on the stream waits for the latest record.
    cdef aclError make_wait(self, Stream stream) noexcept nogil
    # As of a stream, with ACL_ERROR_RT_EVENT_SYNC_TIMEOUT.
    cdef aclError wait(self, const Gate *gate) noexcept nogil
    cdef aclError query(self, bint *complete) noexcept nogil
    cdef aclError _reset(self, Stream stream) noexcept nogil
    cdef void _destroy(self, AclFailure *failure) noexcept


# Whether an address belongs to a device; the device must be entered.
cdef bint is_device_memory(uint64_t address) noexcept nogil
# Whether a range of the host is pinned, so that copies from and to it run by themselves; the device must be entered.
cdef bint is_pinned_memory(uint64_t address, uint64_t nbytes) noexcept nogil
