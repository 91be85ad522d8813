# The ACL runtime of Ascend devices: its functions, found in the installed library when an Ascend device is first asked
# for, and owners of what they give out.
#
# Rules for who uses this. The device must be current on the calling thread (`Device.enter`, then `leave`) around
# every call of a function here and every `cdef` method of Stream and Event; methods that Python sees do it
# themselves. No call may hold the interpreter lock. Nothing waits without a limit: `Stream.wait` and `Event.wait`
# follow a gate.

from llm_datadist._acl_addresses cimport is_device_memory, is_pinned_memory
from llm_datadist._acl_device cimport Device, Scope
from llm_datadist._acl_memory cimport DeviceMemory, PinnedMemory
from llm_datadist._acl_runtime cimport (
    ACL_CLOSED, ACL_COPY_ALIGNMENT, ACL_ERROR_INVALID_PARAM, ACL_ERROR_REPEAT_INITIALIZE, ACL_ERROR_RT_CONTEXT_NULL,
    ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, ACL_ERROR_RT_MEMORY_ALLOCATION, ACL_ERROR_RT_STREAM_ABORT,
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, ACL_ERROR_RT_WAIT_TIMEOUT, ACL_EVENT_RECORDED_STATUS_COMPLETE,
    ACL_EVENT_RECORDED_STATUS_NOT_READY,
    ACL_EVENT_SYNC, ACL_EVENT_UNRECORDED, ACL_FORKED_CHILD, ACL_HBM_MEM, ACL_MEMCPY_DEVICE_TO_DEVICE,
    ACL_MEMCPY_DEVICE_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE, ACL_MEMCPY_HOST_TO_HOST, ACL_MEM_LOCATION_TYPE_DEVICE,
    ACL_MEM_LOCATION_TYPE_HOST, ACL_MEM_MALLOC_HUGE_FIRST, ACL_MEM_MALLOC_HUGE_FIRST_P2P, ACL_SLICE_MS,
    ACL_STREAM_FAST_LAUNCH, ACL_STREAM_FAST_SYNC, ACL_STREAM_STATUS_COMPLETE, ACL_STREAM_STATUS_NOT_READY,
    ACL_SUCCESS, AclFailure, AclFunctions, acl_error, acl_functions, acl_symbol, aclError, aclrtContext, aclrtEvent,
    aclrtMemLocation, aclrtPtrAttributes, aclrtStream, failure_error, forget_text, in_forked_child, note_failure,
)
from llm_datadist._acl_stream cimport Event, Stream
