/* Creation from a rank table. It does not wait for the peers: the first operation or the preparation does. */
#include "communicator.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATH_BYTES 4096

/* The wires of rank `rank` as the library chooses them at set-up. */
static bool needs_network(const struct rank_table *table, uint32_t rank, uint32_t peer)
{
    const struct hccl_environment *environment = hccl_environment("rank table");
    bool same_server = table->entry[rank].server == table->entry[peer].server;
    if (same_server)
        return hccl_roce_inside_server();
    return !sim_is_a3() || !rank_table_near(table, rank, peer) || environment->roce_between_servers;
}

static HcclResult check_addresses(const char *function, const struct rank_table *table)
{
    for (uint32_t rank = 0; rank < table->ranks; rank++)
        for (uint32_t peer = 0; peer < table->ranks; peer++)
            if (rank != peer && needs_network(table, rank, peer) && table->entry[rank].address[0] == '\0')
                return sim_fail(HCCL_E_PARA, "%s: rank %u needs a device_ip to reach rank %u", function, rank, peer);
    return HCCL_SUCCESS;
}

/* Peers on other servers of one super pod exchange through sockets too, which need an address. */
static HcclResult door_address(const char *function, const struct rank_entry *entry, bool same_server, char *address)
{
    if (same_server) {
        snprintf(address, ADDRESS_BYTES, "unix:hccl-device-%u-%u", entry->device, entry->port);
        return HCCL_SUCCESS;
    }
    if (entry->address[0] == '\0')
        return sim_fail(HCCL_E_PARA,
                        "%s: the simulator reaches another server by device_ip only, and the table has none", function);
    snprintf(address, ADDRESS_BYTES, "tcp:%u:%s", entry->port, entry->address);
    return HCCL_SUCCESS;
}

static HcclResult fill_members(const char *function, struct communicator *c, const struct rank_table *table)
{
    for (uint32_t rank = 0; rank < c->ranks; rank++) {
        const struct rank_entry *entry = &table->entry[rank];
        struct member *member = &c->members[rank];
        *member = (struct member){.physical = entry->device};
        member->same_server = entry->server == table->entry[c->rank].server;
        member->roce = rank != c->rank && needs_network(table, c->rank, rank);
        HcclResult result = door_address(function, entry, member->same_server, member->door);
        if (result != HCCL_SUCCESS)
            return result;
    }
    return HCCL_SUCCESS;
}

/* The lower rank listens: at one address for its server, at another one for all others. */
static HcclResult open_doors(const char *function, struct communicator *c, const struct rank_table *table)
{
    bool wanted[2] = {false, false};
    for (uint32_t peer = c->rank + 1; peer < c->ranks; peer++)
        wanted[!c->members[peer].same_server] = true;
    for (int slot = 0; slot < 2; slot++) {
        char address[ADDRESS_BYTES];
        if (!wanted[slot])
            continue;
        HcclResult result = door_address(function, &table->entry[c->rank], slot == 0, address);
        if (result == HCCL_SUCCESS)
            result = meeting_open_door(function, c, slot, address);
        if (result != HCCL_SUCCESS)
            return result;
    }
    return HCCL_SUCCESS;
}

static HcclResult make(const struct creation *creation, const struct rank_table *table, HcclComm *handle)
{
    struct communicator *c;
    HcclResult result = communicator_begin(creation, &c);
    if (result != HCCL_SUCCESS)
        return result;
    c->digest = table->digest;
    snprintf(c->key, sizeof c->key, "table:%s", c->name);
    result = fill_members(creation->function, c, table);
    if (result == HCCL_SUCCESS)
        result = open_doors(creation->function, c, table);
    if (result != HCCL_SUCCESS) {
        communicator_discard(c);
        return result;
    }
    reception_lock();
    c->members_known = true;
    meeting_admit_waiting(c);
    reception_unlock();
    return communicator_publish(c, handle);
}

/* The device is set, the arguments are there. */
static HcclResult init(const char *function, struct sim_context *context, const char *text, uint32_t rank,
                       const HcclCommConfig *config, HcclComm *handle)
{
    struct sim_device *device = sim_context_device(context);
    char reason[512];
    if (hccl_environment(function) == NULL)
        return HCCL_E_PARA;
    struct rank_table *table = malloc(sizeof *table);
    if (table == NULL)
        return sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
    HcclResult result;
    if (!rank_table_parse(text, sim_is_a3(), table, reason, sizeof reason))
        result = sim_fail(HCCL_E_PARA, "%s: rank table: %s", function, reason);
    else if (rank >= table->ranks)
        result = sim_fail(HCCL_E_PARA, "%s: rank %u is not in the table of %u", function, rank, table->ranks);
    else if ((result = check_addresses(function, table)) == HCCL_SUCCESS &&
             table->entry[rank].device != (uint32_t)device->physical)
        result =
            sim_refuse("comm_thread", HCCL_E_PARA, "%s: rank %u is on device %u, the thread's physical device is %d",
                       function, rank, table->entry[rank].device, device->physical);
    if (result == HCCL_SUCCESS)
        result = make(&(struct creation){.function = function,
                                         .config = config,
                                         .needs_name = true,
                                         .rank = rank,
                                         .ranks = table->ranks,
                                         .device = device},
                      table, handle);
    free(table);
    return result;
}

SIM_API HcclResult HcclCommInitClusterInfoMemConfig(const char *table, uint32_t rank, HcclCommConfig *config,
                                                    HcclComm *handle)
{
    struct sim_context *context;
    HcclResult result = creation_device("HcclCommInitClusterInfoMemConfig", &context);
    if (result != HCCL_SUCCESS)
        return result;
    if (table == NULL || config == NULL || handle == NULL)
        return sim_fail(HCCL_E_PTR, "HcclCommInitClusterInfoMemConfig: NULL");
    return init("HcclCommInitClusterInfoMemConfig", context, table, rank, config, handle);
}

/* The file's text, with malloc. */
static HcclResult read_file(const char *function, const char *path, char **text)
{
    if (strnlen(path, PATH_BYTES) == PATH_BYTES)
        return sim_fail(HCCL_E_PARA, "%s: the path has more than %d characters", function, PATH_BYTES - 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return sim_fail(HCCL_E_OPEN_FILE_FAILURE, "%s: %s: %s", function, path, strerror(errno));
    char *bytes = calloc(1, RANK_TABLE_BYTES_MAX + 2);
    ssize_t got = 0, length = 0;
    while (bytes != NULL && length <= RANK_TABLE_BYTES_MAX &&
           (got = read(fd, bytes + length, (size_t)(RANK_TABLE_BYTES_MAX + 1 - length))) > 0)
        length += got;
    close(fd);
    if (bytes == NULL)
        return sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
    if (got >= 0 && memchr(bytes, '\0', (size_t)length) == NULL) {
        *text = bytes;
        return HCCL_SUCCESS;
    }
    free(bytes);
    return sim_fail(HCCL_E_PARA, "%s: %s is no text file", function, path);
}

SIM_API HcclResult HcclCommInitClusterInfoConfig(const char *path, uint32_t rank, HcclCommConfig *config,
                                                 HcclComm *handle)
{
    struct sim_context *context;
    HcclResult result = creation_device("HcclCommInitClusterInfoConfig", &context);
    if (result != HCCL_SUCCESS)
        return result;
    if (path == NULL || config == NULL || handle == NULL)
        return sim_fail(HCCL_E_PTR, "HcclCommInitClusterInfoConfig: NULL");
    char *text = NULL;
    result = read_file("HcclCommInitClusterInfoConfig", path, &text);
    if (result == HCCL_SUCCESS)
        result = init("HcclCommInitClusterInfoConfig", context, text, rank, config, handle);
    free(text);
    return result;
}
