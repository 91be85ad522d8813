# HCCL, the communication between Ascend devices: its functions, found when the first link over it is made, and the
# owner of a communicator of two ranks.
#
# The device of a communicator must be current on the calling thread around every function here; no call may hold the
# interpreter lock. The first HcclSend, HcclRecv or HcclBatchSendRecv of a pair waits inside the call for the other end.

from libc.stdint cimport int32_t, uint32_t, uint64_t

from llm_datadist._acl cimport AclFailure, Device, aclrtStream

ctypedef int HcclResult
ctypedef void *HcclComm

cdef extern from "hccl_structures.h" nogil:
    ctypedef struct HcclRootInfo "llmdd_hccl_root_info":
        char internal[4108]
    ctypedef struct HcclSendRecvItem "llmdd_hccl_send_recv_item":
        int32_t type                      # HCCL_SEND or HCCL_RECV
        void *buffer
        uint64_t count
        int32_t data_type
        uint32_t remote_rank
    ctypedef struct HcclCommConfig "llmdd_hccl_comm_config":
        size_t size
        uint32_t magic
        uint32_t version
        uint32_t buffer_mib
        uint32_t deterministic
        char name[128]
        uint32_t rdma_traffic_class
        uint32_t rdma_service_level
        int32_t execution_limit_s
    ctypedef struct HcclOneSideOpDesc "llmdd_hccl_one_sided_desc":
        void *local_address
        void *remote_address
        uint64_t count
        int32_t data_type
    ctypedef struct CommMem "llmdd_hccl_memory":
        int32_t type                      # 0 device, 1 host
        void *address
        uint64_t size
    ctypedef struct HcclPrepareConfig "llmdd_hccl_prepare_config":
        int32_t topology                  # 0: every rank with every other
    uint32_t HCCL_CONFIG_MAGIC "LLMDD_HCCL_CONFIG_MAGIC"
    size_t HCCL_CONFIG_SIZE_5 "LLMDD_HCCL_CONFIG_SIZE_5"
    size_t HCCL_CONFIG_SIZE_8 "LLMDD_HCCL_CONFIG_SIZE_8"

cdef enum:
    HCCL_SUCCESS = 0
    HCCL_E_PARA = 1
    HCCL_E_TIMEOUT = 9
    HCCL_E_AGAIN = 20
    HCCL_E_REMOTE = 21
    HCCL_SEND = 0
    HCCL_RECV = 1
    HCCL_DATA_TYPE_UINT8 = 7              # bytes are counted, whatever they mean
    HCCL_NAME_MAX_LENGTH = 127
    HCCL_MOST_DESCRIPTORS = 256           # of one HcclBatchGet
    # Of ours, outside of the vendor's numbers:
    HCCL_CLOSED = -2

cdef inline uint64_t hccl_most_bytes() noexcept nogil:
    """Most elements of one send or receive, which are bytes here."""
    return 0x7FFFFFFFF


# Parameter types as in the vendor's headers; a pointer may be NULL where `_hccl.pyx` says that the function is
# optional.
cdef struct HcclFunctions:
    # communicators
    HcclResult (*HcclGetRootInfo)(HcclRootInfo *) noexcept nogil
    HcclResult (*HcclCommInitRootInfoConfig)(
        uint32_t, const HcclRootInfo *, uint32_t, const HcclCommConfig *, HcclComm *) noexcept nogil
    HcclResult (*HcclCommInitClusterInfoMemConfig)(const char *, uint32_t, HcclCommConfig *, HcclComm *) noexcept nogil
    HcclResult (*HcclCommDestroy)(HcclComm) noexcept nogil
    HcclResult (*HcclGetRankSize)(HcclComm, uint32_t *) noexcept nogil
    HcclResult (*HcclGetRankId)(HcclComm, uint32_t *) noexcept nogil
    HcclResult (*HcclGetCommName)(HcclComm, char *) noexcept nogil
    HcclResult (*HcclGetCommAsyncError)(HcclComm, HcclResult *) noexcept nogil
    HcclResult (*HcclConfigGetInfo)(HcclComm, int32_t, uint32_t, void *) noexcept nogil
    const char *(*HcclGetErrorString)(HcclResult) noexcept nogil
    # operators
    HcclResult (*HcclSend)(void *, uint64_t, int32_t, uint32_t, HcclComm, aclrtStream) noexcept nogil
    HcclResult (*HcclRecv)(void *, uint64_t, int32_t, uint32_t, HcclComm, aclrtStream) noexcept nogil
    HcclResult (*HcclBatchSendRecv)(HcclSendRecvItem *, uint32_t, HcclComm, aclrtStream) noexcept nogil
    # one-sided
    HcclResult (*HcclRegisterGlobalMem)(const CommMem *, void **) noexcept nogil
    HcclResult (*HcclDeregisterGlobalMem)(void *) noexcept nogil
    HcclResult (*HcclCommBindMem)(HcclComm, void *) noexcept nogil
    HcclResult (*HcclCommUnbindMem)(HcclComm, void *) noexcept nogil
    HcclResult (*HcclCommPrepare)(HcclComm, const HcclPrepareConfig *, int) noexcept nogil
    HcclResult (*HcclBatchGet)(HcclComm, uint32_t, HcclOneSideOpDesc *, uint32_t, aclrtStream) noexcept nogil

# Found at the first call, which also keeps a failure; raises LibraryMissing.
cdef HcclFunctions *hccl_functions() except NULL

# Whether the installed release has every function of the one-sided family; its header is not a public one.
cdef bint has_one_sided() except -1

# Takes the texts of HCCL and of the ACL runtime with it, as `note_failure` does.
cdef void note_hccl_failure(AclFailure *out, const char *function, HcclResult code) noexcept nogil
cdef object hccl_failure_error(AclFailure *failure)


cdef class Communicator:
    cdef readonly Device device
    cdef readonly int rank
    cdef readonly str name
    cdef readonly object failure          # why `destroy` did not succeed: an HcclError; else None
    cdef HcclComm handle                  # NULL once destroyed
    cdef HcclFunctions *hccl

    # Takes the arguments that all ways to make one have in common, and makes it.
    cdef int _make(
        self, Device device, const void *description, int rank, str name, int buffer_mib, int exec_timeout_s
    ) except -1
    cdef int _create(self, const void *description, HcclCommConfig *config) except -1
    # The call of HCCL: `description` is what both ranks have been given.
    cdef void _init(
        self, const void *description, HcclCommConfig *config, HcclComm *handle, AclFailure *failure
    ) noexcept nogil
    cdef bint _destroy(self, uint64_t deadline_ns) noexcept
