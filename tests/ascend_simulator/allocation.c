/* aclrtMalloc and its kin: sizes as the device takes them, addresses no better aligned than promised. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define EXTRA 32 /* what aclrtMalloc adds on A2 and A3 */
#define GRAIN 32
#define PROMISED 64

/* 4 KiB, 2 MiB or 1 GiB. */
static size_t page_of(size_t size, int policy)
{
    switch (policy) {
    case ACL_HUGE_FIRST:
    case ACL_HUGE_FIRST_P2P:
        return size > MIB ? HUGE_PAGE : PAGE;
    case ACL_HUGE_ONLY:
    case ACL_HUGE_ONLY_P2P:
        return HUGE_PAGE;
    case ACL_NORMAL_ONLY:
    case ACL_NORMAL_ONLY_P2P:
        return PAGE;
    case ACL_HUGE1G_ONLY:
    case ACL_HUGE1G_ONLY_P2P:
        return GIB;
    default: /* hardware does not refuse it: the size decides */
        return size >= HUGE_PAGE ? HUGE_PAGE : PAGE;
    }
}

/* Where in its block an allocation begins: at an odd multiple of 64 in small pages, in huge ones where the knob
   says. */
static size_t offset_of(size_t page)
{
    return page == PAGE ? PROMISED : (size_t)sim_knob(SIM_HUGE_OFFSET) / PROMISED * PROMISED;
}

static void release(struct sim_range *range)
{
    sim_block_release(range->device, range->block_start, range->block_size);
    free(range);
}

static struct sim_range *make_range(struct sim_device *device, size_t size, size_t taken, size_t page)
{
    struct sim_range *range = calloc(1, sizeof *range);
    if (!range)
        return NULL;
    size_t begin = offset_of(page);
    range->block_size = sim_round_up(begin + taken, PAGE);
    if (!sim_block_take(device, range->block_size, page, &range->block_start)) {
        free(range);
        return NULL;
    }
    range->where = SIM_DEVICE;
    range->device = device;
    range->physical = device->physical;
    range->offset = range->block_start + begin;
    range->address = sim_device_base(device) + range->offset;
    range->bytes = sim_device_bytes(device) + range->offset;
    range->size = size;
    range->page = page;
    range->charged = sim_round_up(taken, page);
    range->connection = -1;
    range->free = release;
    return range;
}

static int allocate(const char *function, void **address, size_t size, int policy, size_t extra)
{
    struct sim_context *context;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!address || !size)
        return sim_fail(ACL_INVALID_PARAM, "%s: %s", function, address ? "size is 0" : "devPtr is null");
    struct sim_device *device = sim_context_device(context);
    if (size > (size_t)sim_knob(SIM_HBM_MIB) * MIB)
        return sim_fail(ACL_MEMORY_ALLOCATION, "%s: %zu bytes are more than device %d has", function, size, device->id);
    size_t taken = sim_round_up(size, GRAIN) + extra, page = page_of(size, policy);
    code = sim_charge(device, sim_round_up(taken, page));
    if (code)
        return code;
    struct sim_range *range = make_range(device, size, taken, page);
    if (range) {
        memset(sim_device_bytes(device) + range->block_start, 0xa5, range->block_size);
        code = sim_range_add(range);
        if (!code) {
            *address = (void *)range->address;
            return 0;
        }
        release(range);
    }
    sim_discharge(device, sim_round_up(taken, page));
    return sim_fail(ACL_MEMORY_ALLOCATION, "%s: no room for %zu bytes in one piece on device %d", function, size,
                    device->id);
}

SIM_API aclError aclrtMalloc(void **address, size_t size, int policy)
{
    return allocate(__func__, address, size, policy, EXTRA);
}

SIM_API aclError aclrtMallocAlign32(void **address, size_t size, int policy)
{
    return allocate(__func__, address, size, policy, 0);
}

SIM_API aclError aclrtMallocCached(void **address, size_t size, int policy)
{
    return allocate(__func__, address, size, policy, EXTRA);
}

SIM_API aclError aclrtMallocWithCfg(void **address, size_t size, int policy, void *configuration)
{
    (void)configuration; /* band width and the like are not simulated; their flags stand above the policies */
    return allocate(__func__, address, size, policy & 0xff, EXTRA);
}

static int refuse_unknown(const char *function, const void *address)
{
    char text[160];
    bool at_begin;
    if (sim_range_was(address, text, sizeof text, &at_begin) && at_begin)
        return sim_refuse("double_free", ACL_PARAM_INVALID, "%s: %p was %s, which was freed before", function, address,
                          text);
    return sim_refuse("foreign_free", ACL_PARAM_INVALID, "%s: %p is the begin of no allocation", function, address);
}

/* May it be freed on this device? */
static int check_free(const char *function, struct sim_range *range, const void *address, struct sim_device *device)
{
    char text[160];
    sim_range_words(range, text, sizeof text);
    if (range->where != SIM_DEVICE || range->address != (uintptr_t)address)
        return sim_refuse("foreign_free", ACL_PARAM_INVALID, "%s: %p lies in %s and is not the begin of an allocation",
                          function, address, text);
    if (range->device != device)
        return sim_refuse("wrong_device", ACL_PARAM_INVALID, "%s: %s, but the thread's device is %d", function, text,
                          device->id);
    const char *user = sim_used_by((void *)range->address, range->size);
    int code = user ? sim_misuse("use_after_free", ACL_PARAM_INVALID, "%s: %s is still used by a queued %s", function,
                                 text, user)
                    : 0;
    if (!code && atomic_load(&range->exports))
        code = sim_misuse("ipc_free_exported", ACL_PARAM_INVALID, "%s: %s is still exported", function, text);
    return code;
}

static int free_address(const char *function, void *address, struct sim_context *context)
{
    struct sim_range *range = sim_range_find(address);
    if (!range)
        return refuse_unknown(function, address);
    int code = check_free(function, range, address, sim_context_device(context));
    if (!code && !sim_range_take(range))
        code = refuse_unknown(function, address); /* another thread was first */
    else if (!code) {
        sim_discharge(range->device, range->charged);
        sim_range_put(range); /* the table's */
    }
    sim_range_put(range);
    return code;
}

SIM_API aclError aclrtFree(void *address)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!address)
        return sim_fail(ACL_INVALID_PARAM, "aclrtFree: devPtr is null");
    return free_address(__func__, address, context);
}

SIM_API aclError aclrtFreeWithDevSync(void *address)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT | SIM_BLOCKS, &context);
    if (code)
        return code;
    if (!address)
        return sim_fail(ACL_INVALID_PARAM, "aclrtFreeWithDevSync: devPtr is null");
    code = sim_device_drain(__func__, context, UINT64_MAX);
    return code ? code : free_address(__func__, address, context);
}

SIM_API aclError aclrtGetMemInfo(int attribute, size_t *unused, size_t *total)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!unused || !total)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetMemInfo: null");
    if (attribute != 1 && attribute != 4 && attribute != 5 && attribute != 8 && attribute != 9)
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtGetMemInfo: attribute %d is not simulated, HBM is 1", attribute);
    uint64_t taken = sim_charged(sim_context_device(context));
    *total = (size_t)sim_knob(SIM_HBM_MIB) * MIB;
    *unused = taken < *total ? *total - taken : 0;
    return 0;
}

SIM_API aclError aclrtPointerGetAttributes(const void *address, aclrtPtrAttributes *attributes)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!address || !attributes)
        return sim_fail(ACL_INVALID_PARAM, "aclrtPointerGetAttributes: null");
    memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_LOCATION_UNREGISTERED;
    struct sim_range *range = sim_range_find(address);
    if (!range)
        return 0;
    bool on_device = range->where != SIM_PINNED;
    attributes->location.type = on_device ? ACL_LOCATION_DEVICE : ACL_LOCATION_HOST;
    attributes->location.id = range->device ? (uint32_t)range->device->id : 0;
    attributes->page_size = (uint32_t)range->page;
    sim_range_put(range);
    return 0;
}

SIM_API aclError aclrtMemGetAddressRange(void *address, void **base, size_t *size)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!address || !base || !size)
        return sim_fail(ACL_INVALID_PARAM, "aclrtMemGetAddressRange: null");
    struct sim_range *range = sim_range_find(address);
    bool found = range && range->where == SIM_DEVICE;
    if (found) {
        *base = (void *)range->address;
        *size = range->size;
    }
    if (range)
        sim_range_put(range);
    return found ? 0 : sim_fail(ACL_PARAM_INVALID, "aclrtMemGetAddressRange: %p lies in no allocation", address);
}
