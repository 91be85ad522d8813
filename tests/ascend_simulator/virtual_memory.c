/* Virtual memory management: there, so that a program can ask, and not supported. */
#include "internal.h"

#define NOT_SUPPORTED(name, ...) \
    SIM_API aclError name(__VA_ARGS__) \
    { \
        int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL); \
        return code ? code : sim_fail(ACL_FEATURE_NOT_SUPPORT, "%s: not simulated", __func__); \
    }

#pragma GCC diagnostic ignored "-Wunused-parameter"

NOT_SUPPORTED(aclrtMemGetAllocationGranularity, void *properties, int option, size_t *granularity)
NOT_SUPPORTED(aclrtMallocPhysical, void **handle, size_t size, const void *properties, uint64_t flags)
NOT_SUPPORTED(aclrtFreePhysical, void *handle)
NOT_SUPPORTED(aclrtReserveMemAddress, void **address, size_t size, size_t alignment, void *wanted, uint64_t flags)
NOT_SUPPORTED(aclrtReserveMemAddressNoUCMemory, void **address, size_t size, size_t alignment, void *wanted,
              uint64_t flags)
NOT_SUPPORTED(aclrtReleaseMemAddress, void *address)
NOT_SUPPORTED(aclrtMapMem, void *address, size_t size, size_t offset, void *handle, uint64_t flags)
NOT_SUPPORTED(aclrtUnmapMem, void *address)
NOT_SUPPORTED(aclrtMemSetAccess, void *address, size_t size, void *descriptions, size_t count)
NOT_SUPPORTED(aclrtMemExportToShareableHandle, void *handle, int type, uint64_t flags, uint64_t *shareable)
NOT_SUPPORTED(aclrtMemExportToShareableHandleV2, void *handle, uint64_t flags, int type, void *shareable)
NOT_SUPPORTED(aclrtMemSetPidToShareableHandle, uint64_t shareable, int32_t *pids, size_t count)
NOT_SUPPORTED(aclrtMemSetPidToShareableHandleV2, void *shareable, int type, int32_t *pids, size_t count)
NOT_SUPPORTED(aclrtMemImportFromShareableHandle, uint64_t shareable, int32_t device, void **handle)
NOT_SUPPORTED(aclrtMemImportFromShareableHandleV2, void *shareable, int type, uint64_t flags, void **handle)
