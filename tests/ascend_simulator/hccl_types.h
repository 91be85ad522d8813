/* Types of the communication library as its callers see them: sizes and offsets are part of the interface. */
#ifndef HCCL_TYPES_H
#define HCCL_TYPES_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

typedef int HcclResult;
typedef void *HcclComm;
typedef int HcclDataType;
typedef int HcclConfigType;

enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_MEMORY = 3,
    HCCL_E_INTERNAL = 4,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_NOT_FOUND = 6,
    HCCL_E_UNAVAIL = 7,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_OPEN_FILE_FAILURE = 10,
    HCCL_E_TCP_CONNECT = 11,
    HCCL_E_TCP_TRANSFER = 13,
    HCCL_E_RUNTIME = 15,
    HCCL_E_AGAIN = 20,
    HCCL_E_REMOTE = 21,
};

enum { HCCL_TYPE_INT128 = 12, HCCL_TYPE_UINT8 = 7 };

#define HCCL_ROOT_INFO_BYTES 4108
#define HCCL_NAME_BYTES 128
#define HCCL_COUNT_MAX 0x7FFFFFFFFull
#define HCCL_CONFIG_MAGIC 0xf0f0f0f0u
#define HCCL_CONFIG_VERSION_MAX 11
#define HCCL_ONE_SIDED_DESCRIPTORS_MAX 256

typedef struct {
    char internal[HCCL_ROOT_INFO_BYTES];
} HcclRootInfo;

typedef struct {
    int32_t kind; /* 0 send, 1 receive */
    void *buf;
    uint64_t count;
    HcclDataType dataType;
    uint32_t remoteRank;
} HcclSendRecvItem;
static_assert(sizeof(HcclSendRecvItem) == 32 && offsetof(HcclSendRecvItem, remoteRank) == 28, "send/receive item");

typedef struct {
    void *localAddr;
    void *remoteAddr;
    uint64_t count;
    HcclDataType dataType;
} HcclOneSideOpDesc;
static_assert(sizeof(HcclOneSideOpDesc) == 32 && offsetof(HcclOneSideOpDesc, dataType) == 24, "one-sided descriptor");

enum { COMM_MEM_DEVICE = 0, COMM_MEM_HOST = 1 };

typedef struct {
    int32_t type;
    void *addr;
    uint64_t size;
} CommMem;
static_assert(sizeof(CommMem) == 24 && offsetof(CommMem, size) == 16, "memory to register");

typedef struct {
    int32_t topoType; /* full mesh 0 */
    uint64_t reserved[3];
} HcclPrepareConfig;
static_assert(sizeof(HcclPrepareConfig) == 32, "preparation");

/* The first 300 bytes are version 5; what follows is read where the version in the block says that it is there. */
typedef struct {
    size_t size;
    uint32_t magic;
    uint32_t version;
    uint64_t reserved;
    uint32_t bufferMib;
    uint32_t deterministic;
    char name[HCCL_NAME_BYTES];
    char userInformation[HCCL_NAME_BYTES];
    uint32_t expansion;
    uint32_t trafficClass;
    uint32_t serviceLevel;
    uint32_t worldRank;
    uint64_t jobId;
    uint8_t graphZeroCopy;
    int32_t executionTimeout;
    char algorithm[1600];
    char retrySwitch[50];
    char retryParameters[128];
    char bufferName[HCCL_NAME_BYTES];
    uint32_t qos;
    uint64_t symmetricWindowGib;
    uint32_t queueDepth;
} HcclCommConfig;
static_assert(offsetof(HcclCommConfig, bufferMib) == 24 && offsetof(HcclCommConfig, name) == 32, "config");
static_assert(offsetof(HcclCommConfig, userInformation) == 160 && offsetof(HcclCommConfig, expansion) == 288, "config");
static_assert(offsetof(HcclCommConfig, worldRank) == 300 && offsetof(HcclCommConfig, jobId) == 304, "config");
static_assert(offsetof(HcclCommConfig, executionTimeout) == 316 && offsetof(HcclCommConfig, algorithm) == 320,
              "config");
static_assert(offsetof(HcclCommConfig, bufferName) == 2098 && offsetof(HcclCommConfig, qos) == 2228, "config");
static_assert(offsetof(HcclCommConfig, queueDepth) == 2240 && sizeof(HcclCommConfig) == 2248, "config");

#endif
