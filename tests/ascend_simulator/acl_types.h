/* What a program sees of ACL: types, codes and enumerations, with the values of the public headers. */
#ifndef LLMDD_SIM_ACL_TYPES_H
#define LLMDD_SIM_ACL_TYPES_H

#include <stddef.h>
#include <stdint.h>

/* Everything is compiled hidden; this is what leaves the library, if the version script lets it. */
#define SIM_API __attribute__((visibility("default")))

typedef int aclError;
typedef void *aclrtStream;
typedef void *aclrtEvent;
typedef void *aclrtContext;

enum {
    ACL_SUCCESS = 0,
    ACL_INVALID_PARAM = 100000,
    ACL_UNINITIALIZE = 100001,
    ACL_REPEAT_INITIALIZE = 100002,
    ACL_INVALID_FILE = 100003,
    ACL_REPEAT_FINALIZE = 100037,
    ACL_BAD_ALLOC = 200000,
    ACL_PARAM_INVALID = 107000,
    ACL_INVALID_DEVICEID = 107001,
    ACL_CONTEXT_NULL = 107002,
    ACL_STREAM_CONTEXT = 107003,
    ACL_WAIT_TIMEOUT = 107019,
    ACL_STREAM_ABORT = 107023,
    ACL_FEATURE_NOT_SUPPORT = 207000,
    ACL_MEMORY_ALLOCATION = 207001,
    ACL_NO_PERMISSION = 207006,
    ACL_NO_EVENT_RESOURCE = 207007,
    ACL_NO_STREAM_RESOURCE = 207008,
    ACL_LINK_TYPE_NOT_SUPPORTED = 207021,
    ACL_INTERNAL_ERROR = 507000,
    ACL_EVENT_NOT_COMPLETE = 507006,
    ACL_IPC_ERROR = 507022,
    ACL_STREAM_SYNC_TIMEOUT = 507046,
    ACL_EVENT_SYNC_TIMEOUT = 507047,
    ACL_DEVICE_MEM_ERROR = 507053,
    ACL_SUSPECT_REMOTE_ERROR = 507057,
    ACL_HOST_MEMORY_REGISTERED = 507910,
    ACL_HOST_MEMORY_NOT_REGISTERED = 507911,
};

enum aclrt_memcpy_kind {
    ACL_HOST_TO_HOST = 0,
    ACL_HOST_TO_DEVICE = 1,
    ACL_DEVICE_TO_HOST = 2,
    ACL_DEVICE_TO_DEVICE = 3,
    ACL_DEFAULT = 4,
};

enum aclrt_malloc_policy {
    ACL_HUGE_FIRST = 0,
    ACL_HUGE_ONLY = 1,
    ACL_NORMAL_ONLY = 2,
    ACL_HUGE_FIRST_P2P = 3,
    ACL_HUGE_ONLY_P2P = 4,
    ACL_NORMAL_ONLY_P2P = 5,
    ACL_HUGE1G_ONLY = 6,
    ACL_HUGE1G_ONLY_P2P = 7,
};

enum aclrt_location { ACL_LOCATION_HOST = 0, ACL_LOCATION_DEVICE = 1, ACL_LOCATION_UNREGISTERED = 2 };
enum aclrt_recorded_status { ACL_EVENT_NOT_READY = 0, ACL_EVENT_COMPLETE = 1 };
enum aclrt_stream_status { ACL_STREAM_COMPLETE = 0, ACL_STREAM_NOT_READY = 1 };

enum {
    ACL_EVENT_SYNC = 0x1,
    ACL_EVENT_CAPTURE_STREAM_PROGRESS = 0x2,
    ACL_EVENT_TIME_LINE = 0x8,
    ACL_EVENT_DEVICE_USE_ONLY = 0x10,
    ACL_EVENT_EXTERNAL = 0x20,
    ACL_EVENT_IPC = 0x40,
};

typedef struct {
    uint32_t id;
    int type;
} aclrtMemLocation;

typedef struct {
    aclrtMemLocation location;
    uint32_t page_size;
    uint32_t reserved[4];
} aclrtPtrAttributes;

_Static_assert(sizeof(aclrtMemLocation) == 8, "as measured with the public header");
_Static_assert(sizeof(aclrtPtrAttributes) == 28, "as measured with the public header");

#endif
