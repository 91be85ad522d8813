/* Communicators: how one is made up from a configuration, found again by its handle, asked, and destroyed. */
#include "communicator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONFIG_HEAD 24

static struct communicator *communicators;
static pthread_cond_t dismantled = PTHREAD_COND_INITIALIZER; /* or published */

struct communicator *communicator_list(void)
{
    return communicators;
}

/* ---- calls ---- */

static HcclResult unknown_handle(const char *function, HcclComm handle)
{
    if (sim_handle_closed(handle, SIM_COMMUNICATOR_HANDLE))
        return sim_refuse("use_after_free", HCCL_E_PARA, "%s: communicator %p was destroyed", function, handle);
    return sim_fail(HCCL_E_PARA, "%s: %p is no communicator", function, handle);
}

HcclResult communicator_enter(const char *function, HcclComm handle, bool setting_up, struct sim_context **context,
                              struct communicator **found)
{
    struct sim_context *current;
    int code = sim_enter(function, SIM_HCCL | SIM_NEEDS_CONTEXT | (setting_up ? SIM_BLOCKS : 0), &current);
    if (code != 0)
        return code;
    if (handle == NULL)
        return sim_fail(HCCL_E_PTR, "%s: the communicator is NULL", function);
    struct communicator *c = (struct communicator *)sim_handle_get(handle, SIM_COMMUNICATOR_HANDLE);
    if (c == NULL)
        return unknown_handle(function, handle);
    struct sim_device *device = sim_context_device(current);
    if (device != c->device) {
        code = sim_refuse("wrong_device", HCCL_E_PARA, "%s: the communicator is device %d's, the thread's is %d",
                          function, c->device->id, device->id);
        sim_object_put(&c->object);
        return code;
    }
    reception_lock();
    bool closing = c->closing;
    if (!closing && setting_up)
        c->setting_up++;
    else if (!closing)
        c->enqueuing++;
    reception_unlock();
    if (closing) {
        sim_object_put(&c->object);
        return sim_fail(HCCL_E_INTERNAL, "%s: the communicator is being destroyed", function);
    }
    if (context != NULL)
        *context = current;
    *found = c;
    return HCCL_SUCCESS;
}

void communicator_leave(struct communicator *c, bool setting_up)
{
    reception_lock();
    if (setting_up)
        c->setting_up--;
    else
        c->enqueuing--;
    if (c->closing)
        pthread_cond_broadcast(&c->changed);
    reception_unlock();
    sim_object_put(&c->object);
}

void communicator_wake(struct communicator *c)
{
    pthread_cond_broadcast(&c->changed);
    send_receive_wake(c);
    one_sided_wake(c);
}

static bool no_longer_wanted(void *about)
{
    struct communicator *c = about;
    reception_lock();
    bool closing = c->closing;
    reception_unlock();
    return closing;
}

HcclResult communicator_fault(const char *function, const char *where, struct communicator *c, struct link *link)
{
    struct sim_fault fault = sim_fault(where, c->device->id, NULL, no_longer_wanted, c);
    HcclResult result = HCCL_SUCCESS;
    reception_lock();
    if (fault.action == SIM_CODE)
        result = fault.code;
    else if (fault.action == SIM_ASYNC)
        atomic_store(&c->async_error, fault.code);
    if (fault.action == SIM_CODE && c->closing)
        result = HCCL_E_INTERNAL; /* the end of a hang */
    if (fault.action == SIM_EOF && link->socket != NULL)
        socket_cut(link->socket);
    else if (fault.action == SIM_EOF)
        link->cut_when_met = true;
    reception_unlock();
    if (result != HCCL_SUCCESS)
        sim_fail(result, "%s: fault injected at %s", function, where);
    return result;
}

/* ---- configuration ---- */

/* Copies what both know, as the library does; `config` is cleared first. */
static HcclResult read_config(const char *function, const HcclCommConfig *given, HcclCommConfig *config)
{
    memset(config, 0, sizeof *config);
    config->bufferMib = UINT32_MAX;
    config->executionTimeout = -1;
    if (given == NULL)
        return HCCL_SUCCESS;
    if (given->size < CONFIG_HEAD)
        return sim_fail(HCCL_E_PARA, "%s: config.size %zu is smaller than its head", function, given->size);
    if (given->magic != HCCL_CONFIG_MAGIC)
        return sim_fail(HCCL_E_PARA, "%s: config.magic is 0x%08x, not 0x%08x", function, given->magic,
                        HCCL_CONFIG_MAGIC);
    if (given->version < 1 || given->version > HCCL_CONFIG_VERSION_MAX)
        return sim_fail(HCCL_E_PARA, "%s: config.version %u is not in 1 to %d", function, given->version,
                        HCCL_CONFIG_VERSION_MAX);
    static const uint16_t needed[] = {0, 32, 160, 288, 292, 300, 312, 313, 2098, 2226, 2240, 2244};
    if (given->size < needed[given->version])
        return sim_fail(HCCL_E_PARA, "%s: config.size %zu is too small for version %u", function, given->size,
                        given->version);
    size_t known = needed[given->version];
    memcpy(config, given, known < sizeof *config ? known : sizeof *config);
    if (given->version < 8)
        config->executionTimeout = -1;
    return HCCL_SUCCESS;
}

static HcclResult check_config(const char *function, const HcclCommConfig *config)
{
    if (memchr(config->name, '\0', sizeof config->name) == NULL)
        return sim_fail(HCCL_E_PARA, "%s: config.name has no end within %d characters", function, HCCL_NAME_BYTES);
    if (memchr(config->userInformation, '\0', sizeof config->userInformation) == NULL)
        return sim_fail(HCCL_E_PARA, "%s: the user-defined information has no end", function);
    if (config->bufferMib == 0)
        return sim_fail(HCCL_E_PARA, "%s: the buffer size is at least 1 MiB", function);
    if (config->graphZeroCopy > 1)
        return sim_fail(HCCL_E_PARA, "%s: the zero-copy switch is 0 or 1, not %d", function, config->graphZeroCopy);
    if (config->expansion > 3)
        return sim_fail(HCCL_E_PARA, "%s: operations are unfolded in one of 0 to 3, not %u", function,
                        config->expansion);
    if (config->executionTimeout < -1)
        return sim_fail(HCCL_E_PARA, "%s: execution time limit %d", function, config->executionTimeout);
    return HCCL_SUCCESS;
}

/* ---- making one ---- */

HcclResult creation_device(const char *function, struct sim_context **context)
{
    int code = sim_enter(function, SIM_HCCL | SIM_BLOCKS, NULL);
    if (code != 0)
        return code;
    *context = sim_current_context();
    if (*context == NULL)
        return sim_refuse("comm_thread", HCCL_E_RUNTIME, "%s: the thread has no device (107002)", function);
    return HCCL_SUCCESS;
}

static void free_communicator(struct sim_object *object)
{
    struct communicator *c = (struct communicator *)object;
    for (uint32_t peer = 0; c->links != NULL && peer < c->ranks; peer++) {
        send_receive_forget(&c->links[peer]);
        peer_memory_free(&c->links[peer]);
        free(c->links[peer].regions);
        pthread_rwlock_destroy(&c->links[peer].map_lock);
    }
    pthread_cond_destroy(&c->changed);
    free(c->links);
    free(c->members);
    free(c);
}

static void prepare_link(struct communicator *c, uint32_t peer)
{
    struct link *link = &c->links[peer];
    link->communicator = c;
    link->peer = peer;
    for (int entry = 0; entry < ENTRY_POINTS; entry++)
        for (int role = 0; role < ROLES; role++)
            link->lanes[entry][role].last = &link->lanes[entry][role].first;
    pthread_rwlockattr_t attributes; /* who replaces the mapping must not wait for ever for those who copy */
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&link->map_lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
}

static struct communicator *allocate(const struct creation *creation)
{
    struct communicator *c = calloc(1, sizeof *c);
    if (c == NULL)
        return NULL;
    c->ranks = creation->ranks;
    c->rank = creation->rank;
    c->device = creation->device;
    sim_condition_init(&c->changed);
    c->members = calloc(c->ranks, sizeof *c->members);
    c->links = calloc(c->ranks, sizeof *c->links);
    for (uint32_t peer = 0; c->links != NULL && peer < c->ranks; peer++)
        prepare_link(c, peer);
    if (c->members != NULL && c->links != NULL &&
        sim_handle_make(&c->object, SIM_COMMUNICATOR_HANDLE, free_communicator) != NULL)
        return c;
    free_communicator(&c->object);
    return NULL;
}

static bool name_in_use(const char *name, const struct sim_device *device)
{
    for (struct communicator *c = communicators; c != NULL; c = c->next)
        if (c->device == device && name[0] != '\0' && strcmp(c->name, name) == 0)
            return true;
    return false;
}

/* Into the list, where names are taken; the sockets' thread lives as long as it stays there. */
static HcclResult enlist(const char *function, struct communicator *c)
{
    reception_lock();
    HcclResult result = HCCL_SUCCESS;
    if (name_in_use(c->name, c->device))
        result = sim_refuse("comm_duplicate_name", HCCL_E_PARA, "%s: device %d has a communicator \"%s\"", function,
                            c->device->id, c->name);
    else if (!reception_hold())
        result = sim_fail(HCCL_E_SYSCALL, "%s: no thread for the sockets", function);
    if (result == HCCL_SUCCESS) {
        c->next = communicators;
        communicators = c;
        sim_object_hold(&c->object);
    }
    reception_unlock();
    return result;
}

static void drop_unlisted(struct communicator *c)
{
    sim_handle_close(c->object.handle);
    sim_object_put(&c->object);
}

HcclResult communicator_begin(const struct creation *creation, struct communicator **made)
{
    const char *function = creation->function;
    const struct hccl_environment *environment = hccl_environment(function);
    HcclCommConfig config;
    if (environment == NULL)
        return HCCL_E_PARA;
    HcclResult result = read_config(function, creation->config, &config);
    if (result == HCCL_SUCCESS)
        result = check_config(function, &config);
    if (result != HCCL_SUCCESS)
        return result;
    if (creation->needs_name && config.name[0] == '\0')
        return sim_fail(HCCL_E_PARA, "%s: a communicator of a rank table needs a name", function);
    struct communicator *c = allocate(creation);
    if (c == NULL)
        return sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
    strcpy(c->name, config.name);
    long limit = config.executionTimeout < 0 ? environment->execution_timeout_s : config.executionTimeout;
    c->execution_timeout_ns = limit == 0 ? UINT64_MAX : hccl_scaled_ns((double)limit);
    result = enlist(function, c);
    if (result != HCCL_SUCCESS) {
        drop_unlisted(c);
        return result;
    }
    uint64_t mib = config.bufferMib == UINT32_MAX ? environment->buffer_mib : config.bufferMib;
    uint64_t bytes = 2 * mib << 20;
    int code = sim_charge(c->device, bytes);
    if (code != 0) {
        communicator_discard(c);
        return sim_fail(HCCL_E_MEMORY, "%s: two buffers of %llu MiB do not fit on device %d (%d)", function,
                        (unsigned long long)mib, creation->device->id, code);
    }
    c->charged = bytes;
    *made = c;
    return HCCL_SUCCESS;
}

HcclResult communicator_publish(struct communicator *c, HcclComm *handle)
{
    reception_lock();
    c->listed = true;
    pthread_cond_broadcast(&dismantled);
    reception_unlock();
    sim_count("live.communicators", 1);
    *handle = c->object.handle;
    return HCCL_SUCCESS;
}

/* The mutex is held, nobody is inside and nothing is queued. It lets the mutex go and takes it again. */
static void dismantle(struct communicator *c)
{
    for (uint32_t peer = 0; peer < c->ranks; peer++)
        meeting_part(&c->links[peer]);
    meeting_close_doors(c);
    one_sided_forget(c);
    for (struct communicator **at = &communicators; *at != NULL; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    if (c->charged > 0)
        sim_discharge(c->device, c->charged);
    if (c->listed)
        sim_count("live.communicators", -1);
    pthread_cond_broadcast(&dismantled);
    reception_release();
    reception_unlock();
    sim_object_put(&c->object); /* of the list */
    sim_object_put(&c->object); /* of the handle */
    reception_lock();
}

void communicator_discard(struct communicator *c)
{
    sim_handle_close(c->object.handle);
    reception_lock();
    dismantle(c);
    reception_unlock();
}

/* ---- destroying one ---- */

/* What has arrived counts, although nobody has looked at it yet. */
static void hear_all(struct communicator *c)
{
    for (uint32_t peer = 0; peer < c->ranks; peer++)
        if (c->links[peer].socket != NULL)
            socket_drain(c->links[peer].socket);
}

/* Ends what is stuck, and waits until everybody has left. */
static void empty(struct communicator *c)
{
    c->closing = true;
    communicator_wake(c);
    while (c->setting_up + c->enqueuing > 0 || c->queued > 0)
        reception_wait(&c->changed, UINT64_MAX);
}

static HcclResult check_destroy(struct communicator *c)
{
    if (c->closing)
        return sim_fail(HCCL_E_AGAIN, "HcclCommDestroy: another thread is destroying it");
    if (c->bindings != NULL)
        return sim_fail(HCCL_E_PARA, "HcclCommDestroy: memory is still bound to \"%s\"", c->name);
    if (c->enqueuing > 0)
        return sim_fail(HCCL_E_AGAIN, "HcclCommDestroy: \"%s\" is busy in another thread", c->name);
    hear_all(c);
    int code = 0;
    if (c->queued > 0)
        code = sim_misuse(
            "comm_busy_destroy", HCCL_E_PARA,
            "HcclCommDestroy: %zu operations of \"%s\" are still queued: synchronise or abort the stream first",
            c->queued, c->name);
    size_t unmatched = c->aborted || c->failed ? 0 : send_receive_unmatched(c);
    if (code == 0 && unmatched > 0)
        code =
            sim_misuse("comm_unmatched", HCCL_E_PARA,
                       "HcclCommDestroy: peers of \"%s\" wait in %zu operations without partner", c->name, unmatched);
    return code;
}

SIM_API HcclResult HcclCommDestroy(HcclComm handle)
{
    int code = sim_enter("HcclCommDestroy", SIM_HCCL | SIM_BLOCKS, NULL);
    if (code != 0 || handle == NULL)
        return code;
    struct sim_context *context = sim_current_context();
    if (context == NULL)
        return sim_refuse("no_context", HCCL_E_RUNTIME, "HcclCommDestroy: the thread has no device (107002)");
    struct communicator *c = (struct communicator *)sim_handle_get(handle, SIM_COMMUNICATOR_HANDLE);
    if (c == NULL)
        return unknown_handle("HcclCommDestroy", handle);
    if (sim_context_device(context) != c->device) {
        code = sim_refuse("wrong_device", HCCL_E_PARA,
                          "HcclCommDestroy: the communicator is device %d's, the thread's is %d", c->device->id,
                          sim_context_device(context)->id);
    } else {
        reception_lock();
        code = check_destroy(c);
        if (code == 0) {
            empty(c);
            sim_handle_close(handle);
            dismantle(c);
        }
        reception_unlock();
    }
    sim_object_put(&c->object);
    return code;
}

/* ---- the process ends, a device ends ---- */

size_t sim_hccl_alive(int device)
{
    size_t alive = one_sided_registrations(device);
    reception_lock();
    for (struct communicator *c = communicators; c != NULL; c = c->next)
        alive += c->device->id == device;
    reception_unlock();
    return alive;
}

void sim_hccl_finalize(void)
{
    root_info_finalize();
    reception_lock();
    while (communicators != NULL) {
        struct communicator *c = communicators;
        while (c != NULL && !c->listed)
            c = c->next;
        if (c == NULL) { /* those that are being made give up by themselves */
            reception_wait(&dismantled, UINT64_MAX);
            continue;
        }
        sim_misuse("leak", 0, "aclFinalize: communicator \"%s\" is alive", c->name);
        sim_object_hold(&c->object);
        empty(c);
        sim_handle_close(c->object.handle);
        dismantle(c);
        reception_unlock();
        sim_object_put(&c->object);
        reception_lock();
    }
    reception_unlock();
    one_sided_finalize();
}

/* ---- asking ---- */

static HcclResult ask(const char *function, HcclComm handle, const void *answer, struct communicator **c)
{
    HcclResult result = communicator_enter(function, handle, false, NULL, c);
    if (result != HCCL_SUCCESS)
        return result;
    if (answer != NULL)
        return HCCL_SUCCESS;
    communicator_leave(*c, false);
    return sim_fail(HCCL_E_PTR, "%s: no place for the answer", function);
}

SIM_API HcclResult HcclGetRankSize(HcclComm handle, uint32_t *size)
{
    struct communicator *c;
    HcclResult result = ask("HcclGetRankSize", handle, size, &c);
    if (result != HCCL_SUCCESS)
        return result;
    *size = c->ranks;
    communicator_leave(c, false);
    return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank)
{
    struct communicator *c;
    HcclResult result = ask("HcclGetRankId", handle, rank, &c);
    if (result != HCCL_SUCCESS)
        return result;
    *rank = c->rank;
    communicator_leave(c, false);
    return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetCommName(HcclComm handle, char *name)
{
    struct communicator *c;
    HcclResult result = ask("HcclGetCommName", handle, name, &c);
    if (result != HCCL_SUCCESS)
        return result;
    strcpy(name, c->name);
    communicator_leave(c, false);
    return HCCL_SUCCESS;
}

SIM_API HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult *error)
{
    struct communicator *c;
    HcclResult result = ask("HcclGetCommAsyncError", handle, error, &c);
    if (result != HCCL_SUCCESS)
        return result;
    *error = atomic_load(&c->async_error);
    communicator_leave(c, false);
    return HCCL_SUCCESS;
}

/* Present in newer releases; callers look for its name only. No item is known here. */
SIM_API HcclResult HcclConfigGetInfo(HcclComm handle, HcclConfigType type, uint32_t size, void *value)
{
    struct communicator *c;
    (void)size;
    HcclResult result = ask("HcclConfigGetInfo", handle, value, &c);
    if (result != HCCL_SUCCESS)
        return result;
    communicator_leave(c, false);
    return sim_fail(HCCL_E_NOT_SUPPORT, "HcclConfigGetInfo: item %d", type);
}

SIM_API const char *HcclGetErrorString(HcclResult code)
{
    static const char *const texts[] = {
        "success",         "parameter error",    "empty pointer",       "memory error",        "internal error",
        "not supported",   "not found",          "not available",       "system call failed",  "timeout",
        "file not opened", "TCP connect failed", "RoCE connect failed", "TCP transfer failed", "RoCE transfer failed",
        "ACL call failed", "driver error",       "profiling error",     "CCE error",           "network error",
        "try again",       "remote error",       "suspending",          "retry failed",        "out of memory",
    };
    return code >= 0 && (size_t)code < sizeof texts / sizeof *texts ? texts[code] : "unknown error";
}
