/* Structures of HCCL, declared without a vendor header; sizes and offsets are those of the vendor's headers. */
#ifndef LLM_DATADIST_HCCL_STRUCTURES_H
#define LLM_DATADIST_HCCL_STRUCTURES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    char internal[4108];
} llmdd_hccl_root_info;

typedef struct {
    int32_t type;
    void *buffer;
    uint64_t count;
    int32_t data_type;
    uint32_t remote_rank;
} llmdd_hccl_send_recv_item;

/* As far as version 8 of the structure, the newest that this library fills; `size` and `version` say how far it is read. */
typedef struct {
    size_t size;
    uint32_t magic;
    uint32_t version;
    uint64_t reserved;
    uint32_t buffer_mib;
    uint32_t deterministic;
    char name[128];
    char user_information[128];
    uint32_t expansion_mode;
    uint32_t rdma_traffic_class;
    uint32_t rdma_service_level;
    uint32_t world_rank_id;
    uint64_t job_id;
    uint8_t zero_copy_in_graphs;
    int32_t execution_limit_s;
    char algorithm[1600];
    char retry_switch[50];
    char retry_parameters[128];
} llmdd_hccl_comm_config;

typedef struct {
    void *local_address;
    void *remote_address;
    uint64_t count;
    int32_t data_type;
} llmdd_hccl_one_sided_desc;

typedef struct {
    int32_t type;
    void *address;
    uint64_t size;
} llmdd_hccl_memory;

typedef struct {
    int32_t topology;
    uint64_t reserved[3];
} llmdd_hccl_prepare_config;

#define LLMDD_AT(structure, field, offset) \
    _Static_assert(offsetof(structure, field) == (offset), #field " of " #structure)

_Static_assert(sizeof(llmdd_hccl_root_info) == 4108, "HcclRootInfo");
_Static_assert(sizeof(llmdd_hccl_send_recv_item) == 32, "HcclSendRecvItem");
LLMDD_AT(llmdd_hccl_send_recv_item, buffer, 8);
LLMDD_AT(llmdd_hccl_send_recv_item, count, 16);
LLMDD_AT(llmdd_hccl_send_recv_item, data_type, 24);
LLMDD_AT(llmdd_hccl_send_recv_item, remote_rank, 28);
_Static_assert(sizeof(llmdd_hccl_one_sided_desc) == 32, "HcclOneSideOpDesc");
_Static_assert(sizeof(llmdd_hccl_memory) == 24, "CommMem");
_Static_assert(sizeof(llmdd_hccl_prepare_config) == 32, "HcclPrepareConfig");
LLMDD_AT(llmdd_hccl_comm_config, magic, 8);
LLMDD_AT(llmdd_hccl_comm_config, version, 12);
LLMDD_AT(llmdd_hccl_comm_config, reserved, 16);
LLMDD_AT(llmdd_hccl_comm_config, buffer_mib, 24);
LLMDD_AT(llmdd_hccl_comm_config, deterministic, 28);
LLMDD_AT(llmdd_hccl_comm_config, name, 32);
LLMDD_AT(llmdd_hccl_comm_config, user_information, 160);
LLMDD_AT(llmdd_hccl_comm_config, expansion_mode, 288);
LLMDD_AT(llmdd_hccl_comm_config, rdma_traffic_class, 292);
LLMDD_AT(llmdd_hccl_comm_config, rdma_service_level, 296);
LLMDD_AT(llmdd_hccl_comm_config, world_rank_id, 300);
LLMDD_AT(llmdd_hccl_comm_config, job_id, 304);
LLMDD_AT(llmdd_hccl_comm_config, zero_copy_in_graphs, 312);
LLMDD_AT(llmdd_hccl_comm_config, execution_limit_s, 316);
LLMDD_AT(llmdd_hccl_comm_config, algorithm, 320);
LLMDD_AT(llmdd_hccl_comm_config, retry_switch, 1920);
LLMDD_AT(llmdd_hccl_comm_config, retry_parameters, 1970);
#undef LLMDD_AT

#define LLMDD_HCCL_CONFIG_MAGIC 0xf0f0f0f0u
#define LLMDD_HCCL_CONFIG_SIZE_5 300 /* up to and with version 5 */
#define LLMDD_HCCL_CONFIG_SIZE_8 2098

#endif
