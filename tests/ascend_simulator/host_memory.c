/* Pinned host memory: made by ACL, or the program's own and registered. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define MAPPED 0x2u
#define PINNED 0x10000000u

/* One byte in front of a 128-byte boundary would do; this way an address is an odd multiple of 64, as promised and no
   better. */
#define SHIFT 64

static void free_made(struct sim_range *range)
{
    free(range->bytes - SHIFT);
    free(range);
}

static void free_registered(struct sim_range *range)
{
    free(range);
}

static int add(void *address, size_t size, void (*release)(struct sim_range *))
{
    struct sim_range *range = calloc(1, sizeof *range);
    if (!range)
        return sim_fail(ACL_BAD_ALLOC, "no host memory");
    range->where = SIM_PINNED;
    range->address = (uintptr_t)address;
    range->bytes = address;
    range->size = size;
    range->page = PAGE;
    range->connection = -1;
    range->free = release;
    int code = sim_range_add(range);
    if (code)
        free(range);
    return code;
}

SIM_API aclError aclrtMallocHost(void **address, size_t size)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!address || !size)
        return sim_fail(ACL_INVALID_PARAM, "aclrtMallocHost: %s", address ? "size is 0" : "hostPtr is null");
    void *block;
    if (size > PTRDIFF_MAX - 2 * SHIFT || posix_memalign(&block, 2 * SHIFT, size + SHIFT))
        return sim_fail(ACL_BAD_ALLOC, "aclrtMallocHost: no host memory for %zu bytes", size);
    unsigned char *bytes = (unsigned char *)block + SHIFT;
    memset(bytes, 0xa5, size);
    code = add(bytes, size, free_made);
    if (code)
        free(block);
    else
        *address = bytes;
    return code;
}

/* Finds what begins there and is of this kind, checks that no task uses it, takes it out. */
static int drop(const char *function, void *address, void (*kind)(struct sim_range *), int unknown)
{
    char text[160];
    bool at_begin;
    struct sim_range *range = sim_range_find(address);
    if (!range || range->free != kind || range->address != (uintptr_t)address) {
        if (range)
            sim_range_put(range);
        if (!range && sim_range_was(address, text, sizeof text, &at_begin) && at_begin)
            return sim_refuse("double_free", unknown, "%s: %p was %s, which was freed before", function, address, text);
        return sim_refuse("foreign_free", unknown, "%s: %p was not given out or registered", function, address);
    }
    const char *user = sim_used_by(address, range->size);
    int code = user ? sim_misuse("use_after_free", ACL_PARAM_INVALID, "%s: %s is still used by a queued %s", function,
                                 sim_range_words(range, text, sizeof text), user)
                    : 0;
    if (!code && sim_range_take(range))
        sim_range_put(range);
    sim_range_put(range);
    return code;
}

SIM_API aclError aclrtFreeHost(void *address)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!address)
        return sim_fail(ACL_INVALID_PARAM, "aclrtFreeHost: hostPtr is null");
    return drop(__func__, address, free_made, ACL_PARAM_INVALID);
}

static int register_memory(const char *function, void *address, uint64_t size)
{
    if (!address || !size)
        return sim_fail(ACL_INVALID_PARAM, "%s: null or size 0", function);
    if ((uintptr_t)address % PAGE)
        return sim_refuse("unaligned", ACL_PARAM_INVALID, "%s: %p is not a multiple of 4096", function, address);
    struct sim_range *first = sim_range_find(address), *last = sim_range_find((char *)address + size - 1);
    bool known = first || last;
    if (first)
        sim_range_put(first);
    if (last)
        sim_range_put(last);
    if (known)
        return sim_fail(ACL_HOST_MEMORY_REGISTERED, "%s: %p, %lu bytes: known to ACL already", function, address,
                        (unsigned long)size);
    return add(address, size, free_registered);
}

/* The simulator has no kernels: nothing could use the device's own address of host memory, and there is none. */
SIM_API aclError aclrtHostRegister(void *address, uint64_t size, int type, void **device_address)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!device_address)
        return sim_fail(ACL_INVALID_PARAM, "aclrtHostRegister: devPtr is null");
    if (type != 0)
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtHostRegister: type %d is not simulated", type);
    *device_address = NULL;
    return register_memory(__func__, address, size);
}

SIM_API aclError aclrtHostRegisterV2(void *address, uint64_t size, uint32_t flags)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!flags || flags & ~(MAPPED | PINNED))
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtHostRegisterV2: flags %#x are not simulated", flags);
    return register_memory(__func__, address, size);
}

SIM_API aclError aclrtHostGetDevicePointer(void *address, void **device_address, uint32_t flags)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    (void)address;
    (void)device_address;
    (void)flags;
    return sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtHostGetDevicePointer: not simulated");
}

SIM_API aclError aclrtHostUnregister(void *address)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!address)
        return sim_fail(ACL_INVALID_PARAM, "aclrtHostUnregister: ptr is null");
    return drop(__func__, address, free_registered, ACL_HOST_MEMORY_NOT_REGISTERED);
}
