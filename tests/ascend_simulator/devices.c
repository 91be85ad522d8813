/* Devices as the process sees them: the visible list, how often each was set, and who may reach whom. */
#include "internal.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

struct device_state {
    struct sim_device device;
    pthread_mutex_t lock; /* over opening and closing, which take long */
    int times_set;
    struct sim_context *context; /* the default one, while times_set > 0 */
};

static struct device_state states[SIM_MAX_DEVICES];
static atomic_int count;
static atomic_bool enabled[SIM_MAX_DEVICES][SIM_MAX_DEVICES];

static pthread_once_t locks_once = PTHREAD_ONCE_INIT;

static void make_locks(void)
{
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        pthread_mutex_init(&states[i].lock, NULL);
}

void sim_devices_open(void)
{
    int physical[SIM_MAX_DEVICES];
    int visible = (int)sim_visible_devices(physical, SIM_MAX_DEVICES);
    pthread_once(&locks_once, make_locks);
    for (int i = 0; i < visible; i++)
        states[i].device = (struct sim_device){i, physical[i]};
    memset(enabled, 0, sizeof enabled);
    atomic_store(&count, visible);
}

int sim_device_count(void)
{
    return atomic_load(&count);
}

struct sim_device *sim_device(int id)
{
    return id >= 0 && id < sim_device_count() ? &states[id].device : NULL;
}

static int invalid(const char *function, int id)
{
    return sim_fail(ACL_INVALID_DEVICEID, "%s: deviceId %d: there are %d visible devices", function, id,
                    sim_device_count());
}

/* Memory and, for aclrtSetDevice, the default context. Under the device's lock. */
static int open_device(struct device_state *state)
{
    struct timespec start_up = {.tv_nsec = sim_knob(SIM_SETDEVICE_MS) % 1000 * 1000000,
                                .tv_sec = sim_knob(SIM_SETDEVICE_MS) / 1000};
    nanosleep(&start_up, NULL);
    int code = sim_memory_open(&state->device);
    if (code)
        return code;
    state->context = sim_context_make(&state->device, true);
    return state->context ? 0 : sim_fail(ACL_BAD_ALLOC, "aclrtSetDevice: no memory");
}

SIM_API aclError aclrtSetDevice(int32_t id)
{
    int code = sim_enter(__func__, SIM_FAULT_LATER, NULL);
    if (!code) /* faults are told the device that is meant, not the one that the thread has */
        code = sim_fault_at_call(__func__, id);
    if (code)
        return code;
    if (!sim_device(id))
        return invalid(__func__, id);
    struct device_state *state = &states[id];
    pthread_mutex_lock(&state->lock);
    bool first = !state->times_set;
    code = first ? sim_blocks(__func__) : 0;
    if (!code && first)
        code = open_device(state);
    if (!code) {
        state->times_set++;
        sim_bind_thread(state->context);
    }
    pthread_mutex_unlock(&state->lock);
    return code;
}

/* What still stands on the device, as a text; false if nothing does. */
static bool find_leaks(const struct device_state *state, char *text, size_t room)
{
    const struct sim_device *device = &state->device;
    size_t streams = sim_streams_alive(device), events = sim_events_alive(device), memory = sim_ranges_alive(device);
    size_t exports = sim_exports_alive(device), contexts = sim_contexts_alive(device),
           hccl = sim_hccl_alive(device->id);
    snprintf(text, room,
             "%zu allocations or imports, %zu exports, %zu streams, %zu events, %zu explicit contexts, %zu of HCCL's",
             memory, exports, streams, events, contexts, hccl);
    return streams || events || memory || exports || contexts || hccl;
}

/* The last reference went: whatever is left goes as well, as on hardware, after it was told. Under the device's
   lock. */
static int close_device(const char *function, struct device_state *state)
{
    char left[256];
    int code = 0;
    if (find_leaks(state, left, sizeof left))
        code = sim_misuse("leak", ACL_PARAM_INVALID, "%s: device %d is given back with %s", function, state->device.id,
                          left);
    sim_contexts_end(&state->device);
    sim_events_end(&state->device);
    sim_ipc_clear(&state->device);
    sim_memory_clear(&state->device);
    state->context = NULL;
    state->times_set = 0;
    return code;
}

SIM_API aclError aclrtResetDevice(int32_t id)
{
    int code = sim_enter(__func__, SIM_FAULT_LATER, NULL);
    if (!code) /* faults are told the device that is meant, not the one that the thread has */
        code = sim_fault_at_call(__func__, id);
    if (code)
        return code;
    if (!sim_device(id))
        return invalid(__func__, id);
    struct device_state *state = &states[id];
    pthread_mutex_lock(&state->lock);
    if (!state->times_set) {
        code = sim_fail(ACL_INVALID_DEVICEID, "aclrtResetDevice: deviceId %d is not set in this process", id);
    } else {
        if (sim_current_context() == state->context)
            sim_bind_thread(NULL);
        if (--state->times_set == 0)
            code = close_device(__func__, state);
    }
    pthread_mutex_unlock(&state->lock);
    return code;
}

int sim_devices_close(const char *function)
{
    int result = 0;
    for (int i = 0; i < sim_device_count(); i++) {
        pthread_mutex_lock(&states[i].lock);
        int code = close_device(function, &states[i]);
        pthread_mutex_unlock(&states[i].lock);
        result = result ? result : code;
    }
    size_t host = sim_ranges_alive(NULL);
    if (host && !result)
        result = sim_misuse("leak", ACL_PARAM_INVALID, "%s: %zu pieces of pinned host memory are left", function, host);
    return result;
}

/* For aclrtCreateContext, which needs no aclrtSetDevice before. */
int sim_device_prepare(struct sim_device *device)
{
    struct device_state *state = &states[device->id];
    pthread_mutex_lock(&state->lock);
    int code = sim_memory_open(device);
    pthread_mutex_unlock(&state->lock);
    return code;
}

SIM_API aclError aclrtGetDeviceCount(uint32_t *number)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!number)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetDeviceCount: count is null");
    *number = (uint32_t)sim_device_count();
    return 0;
}

SIM_API aclError aclrtGetDevice(int32_t *id)
{
    struct sim_context *context;
    int code = sim_enter(__func__, 0, &context);
    if (code)
        return code;
    if (!id)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetDevice: deviceId is null");
    if (!context) /* no misuse: this is how one asks */
        return sim_fail(ACL_CONTEXT_NULL, "aclrtGetDevice: this thread has no device");
    *id = sim_context_device(context)->id;
    return 0;
}

static int convert(const char *function, int32_t from, int32_t *to, bool to_physical)
{
    int code = sim_enter(function, 0, NULL);
    if (code)
        return code;
    if (!to)
        return sim_fail(ACL_INVALID_PARAM, "%s: null", function);
    if (!sim_device(from))
        return invalid(function, from);
    *to = to_physical ? sim_device(from)->physical : from;
    return 0;
}

SIM_API aclError aclrtGetPhyDevIdByUserDevId(const int32_t user, int32_t *const physical)
{
    return convert(__func__, user, physical, true);
}

SIM_API aclError aclrtGetPhyDevIdByLogicDevId(const int32_t user, int32_t *const physical)
{
    return convert(__func__, user, physical, true); /* the argument is a user id in truth */
}

/* In the simulator's container the logical id is the index on the server. */
SIM_API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical)
{
    return convert(__func__, user, logical, true);
}

SIM_API aclError aclrtGetUserDevIdByLogicDevId(const int32_t logical, int32_t *const user)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!user)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetUserDevIdByLogicDevId: userDevId is null");
    for (int i = 0; i < sim_device_count(); i++)
        if (states[i].device.physical == logical) {
            *user = i;
            return 0;
        }
    return invalid(__func__, logical);
}

SIM_API aclError aclrtGetDeviceInfo(uint32_t id, int attribute, int64_t *value)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!value)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetDeviceInfo: value is null");
    if (!sim_device((int)id))
        return invalid(__func__, (int)id);
    int64_t server = sim_knob(SIM_SERVER), physical = sim_device((int)id)->physical;
    switch (attribute) {
    case 301:
        *value = (int64_t)sim_knob(SIM_HBM_MIB) << 20;
        return 0;
    case 402:
        *value = physical;
        return 0;
    case 403: /* numbered through the pod: server, chip, die */
    case 404:
    case 405:
        if (sim_is_a3()) {
            *value = attribute == 403 ? server << 22 | physical << 16 | physical : attribute == 404 ? server : 0;
            return 0;
        }
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtGetDeviceInfo: attribute %d only exists in a super pod",
                        attribute);
    default:
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtGetDeviceInfo: attribute %d is not simulated", attribute);
    }
}

SIM_API aclError aclrtQueryDeviceStatus(int32_t id, int *status)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!status)
        return sim_fail(ACL_INVALID_PARAM, "aclrtQueryDeviceStatus: deviceStatus is null");
    if (!sim_device(id))
        return invalid(__func__, id);
    *status = 0;
    return 0;
}

bool sim_devices_linked(int physical, int other)
{
    char text[512];
    sim_knob_text(SIM_HCCS, text, sizeof text);
    if (!strcmp(text, "all"))
        return true;
    int a, b, read = 0;
    for (const char *rest = text; sscanf(rest, "%d-%d%n", &a, &b, &read) == 2; rest += read + (rest[read] == ','))
        if ((a == physical && b == other) || (b == physical && a == other))
            return true;
    return false;
}

static int check_pair(const char *function, int one, int other)
{
    if (!sim_device(one))
        return invalid(function, one);
    return sim_device(other) ? 0 : invalid(function, other);
}

SIM_API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t id, int32_t peer)
{
    int code = sim_enter(__func__, 0, NULL);
    if (!code)
        code = check_pair(__func__, id, peer);
    if (code)
        return code;
    if (!can)
        return sim_fail(ACL_INVALID_PARAM, "aclrtDeviceCanAccessPeer: canAccessPeer is null");
    *can = id != peer && sim_devices_linked(sim_device(id)->physical, sim_device(peer)->physical);
    return 0;
}

SIM_API aclError aclrtGetDevicesTopo(uint32_t id, uint32_t other, uint64_t *value)
{
    int code = sim_enter(__func__, 0, NULL);
    if (!code)
        code = check_pair(__func__, (int)id, (int)other);
    if (code)
        return code;
    if (!value)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetDevicesTopo: value is null");
    *value = sim_devices_linked(sim_device((int)id)->physical, sim_device((int)other)->physical) ? 0x1 : 0x10;
    return 0;
}

bool sim_peer_enabled(const struct sim_device *from, const struct sim_device *to)
{
    return from == to || atomic_load(&enabled[from->id][to->id]);
}

SIM_API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    struct sim_device *own = sim_context_device(context);
    if (!sim_device(peer))
        return invalid(__func__, peer);
    if (flags || own->id == peer)
        return sim_fail(ACL_PARAM_INVALID, "aclrtDeviceEnablePeerAccess: peerDeviceId %d, flags %u on device %d", peer,
                        flags, own->id);
    if (!sim_devices_linked(own->physical, sim_device(peer)->physical))
        return sim_fail(ACL_LINK_TYPE_NOT_SUPPORTED, "aclrtDeviceEnablePeerAccess: no link between %d and %d", own->id,
                        peer);
    atomic_store(&enabled[own->id][peer], true);
    return 0;
}

SIM_API aclError aclrtDeviceDisablePeerAccess(int32_t peer)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!sim_device(peer))
        return invalid(__func__, peer);
    if (!atomic_exchange(&enabled[sim_context_device(context)->id][peer], false))
        return sim_fail(ACL_PARAM_INVALID, "aclrtDeviceDisablePeerAccess: device %d was not enabled", peer);
    return 0;
}

SIM_API aclError aclrtDevicePeerAccessStatus(int32_t id, int32_t peer, int32_t *status)
{
    int code = sim_enter(__func__, 0, NULL);
    if (!code)
        code = check_pair(__func__, id, peer);
    if (code)
        return code;
    if (!status)
        return sim_fail(ACL_INVALID_PARAM, "aclrtDevicePeerAccessStatus: status is null");
    *status = id != peer && sim_peer_enabled(sim_device(id), sim_device(peer));
    return 0;
}
