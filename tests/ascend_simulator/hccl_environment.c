#include "hccl_environment.h"

#include "hccl_types.h"
#include "simulator.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct hccl_environment values;
static bool known;

uint64_t hccl_scaled_ns(double seconds)
{
    return (uint64_t)(seconds * sim_time_scale() * 1e9);
}

static bool number(const char *function, const char *name, long low, long high, long absent, long *value)
{
    const char *text = getenv(name);
    char *end = NULL;
    *value = absent;
    if (text == NULL || *text == '\0')
        return true;
    errno = 0;
    *value = strtol(text, &end, 10);
    if (errno == 0 && *end == '\0' && *value >= low && *value <= high)
        return true;
    sim_fail(HCCL_E_PARA, "%s: %s must be a number from %ld to %ld, not \"%s\"", function, name, low, high, text);
    return false;
}

static bool is_address(const char *text)
{
    struct in6_addr address;
    return inet_pton(AF_INET, text, &address) == 1 || inet_pton(AF_INET6, text, &address) == 1;
}

static bool read_all(const char *function)
{
    long connect, execution, exponent, tries, buffer, intra;
    if (!number(function, "HCCL_CONNECT_TIMEOUT", 120, 7200, 120, &connect) ||
        !number(function, "HCCL_EXEC_TIMEOUT", 0, INT32_MAX, 1836, &execution) ||
        !number(function, "HCCL_RDMA_TIMEOUT", 5, 20, 20, &exponent) ||
        !number(function, "HCCL_RDMA_RETRY_CNT", 1, 7, 7, &tries) ||
        !number(function, "HCCL_BUFFSIZE", 1, INT32_MAX, 200, &buffer) ||
        !number(function, "HCCL_INTRA_ROCE_ENABLE", 0, 1, 0, &intra))
        return false;
    const char *inter = getenv("HCCL_INTER_HCCS_DISABLE");
    const char *host_ip = getenv("HCCL_IF_IP");
    if (host_ip != NULL && !is_address(host_ip)) {
        sim_fail(HCCL_E_PARA, "%s: HCCL_IF_IP is no address: \"%s\"", function, host_ip);
        return false;
    }
    values = (struct hccl_environment){
        .connect_timeout_s = connect,
        .execution_timeout_s = execution,
        .retry_s = 4.096e-6 * (double)(1l << exponent) * (double)tries,
        .buffer_mib = (uint32_t)buffer,
        .roce_inside_server = intra == 1,
        .roce_between_servers = inter != NULL && strcasecmp(inter, "true") == 0,
    };
    if (host_ip != NULL)
        strcpy(values.host_ip, host_ip);
    return true;
}

const struct hccl_environment *hccl_environment(const char *function)
{
    pthread_mutex_lock(&lock);
    if (!known)
        known = read_all(function);
    bool good = known;
    pthread_mutex_unlock(&lock);
    return good ? &values : NULL;
}

bool hccl_roce_inside_server(void)
{
    char link[16];
    sim_knob_text(SIM_LINK, link, sizeof link);
    return values.roce_inside_server || strcmp(link, "roce") == 0;
}
