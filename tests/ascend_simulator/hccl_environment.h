/* The variables of HCCL, read once at its first use, as the vendor's library does. */
#ifndef HCCL_ENVIRONMENT_H
#define HCCL_ENVIRONMENT_H

#include <stdbool.h>
#include <stdint.h>

struct hccl_environment {
    long connect_timeout_s;
    long execution_timeout_s; /* 0: without limit */
    double retry_s;           /* until the network gives a dead peer up */
    uint32_t buffer_mib;
    char host_ip[46]; /* where ranks on other servers reach this process; empty: nowhere */
    bool roce_inside_server;
    bool roce_between_servers; /* of one super pod */
};

/* The values, or NULL with the text set when one of them is outside its range. */
const struct hccl_environment *hccl_environment(const char *function);
/* A time limit of HCCL's own, scaled. */
uint64_t hccl_scaled_ns(double seconds);
/* Whether devices of this server use the network between them: by the variable, or LLMDD_SIM_LINK as it is now. */
bool hccl_roce_inside_server(void);

#endif
