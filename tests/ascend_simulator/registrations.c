#include "registrations.h"

#include <stdlib.h>

static struct registration *registrations;

static void free_registration(struct sim_object *object)
{
    struct registration *r = (struct registration *)object;
    sim_view_close(&r->view);
    free(r);
}

size_t one_sided_registrations(int device)
{
    size_t count = 0;
    reception_lock();
    for (struct registration *r = registrations; r != NULL; r = r->next)
        count += r->device->id == device;
    reception_unlock();
    return count;
}

/* ---- registering ---- */

static HcclResult check_memory(const CommMem *memory, void **handle)
{
    if (memory == NULL || handle == NULL || memory->addr == NULL)
        return sim_fail(HCCL_E_PTR, "HcclRegisterGlobalMem: NULL");
    if (memory->type != COMM_MEM_DEVICE && memory->type != COMM_MEM_HOST)
        return sim_fail(HCCL_E_PARA, "HcclRegisterGlobalMem: type %d is neither device (0) nor host (1)", memory->type);
    if (memory->size == 0)
        return sim_fail(HCCL_E_PARA, "HcclRegisterGlobalMem: size 0");
    return HCCL_SUCCESS;
}

/* A registration of the device with the same bounds, or an error for one that overlaps. Mutex held. */
static HcclResult find_equal(const struct sim_device *device, const CommMem *memory, struct registration **equal)
{
    uintptr_t begin = (uintptr_t)memory->addr;
    for (struct registration *r = registrations; r != NULL; r = r->next) {
        uintptr_t other = (uintptr_t)r->memory.addr;
        if (r->device != device || begin >= other + r->memory.size || other >= begin + memory->size)
            continue;
        if (begin != other || memory->size != r->memory.size || memory->type != r->memory.type)
            return sim_fail(
                HCCL_E_PARA, "HcclRegisterGlobalMem: %p and %llu bytes overlap the registered %p and %llu bytes",
                memory->addr, (unsigned long long)memory->size, r->memory.addr, (unsigned long long)r->memory.size);
        *equal = r;
        return HCCL_SUCCESS;
    }
    return HCCL_SUCCESS;
}

static HcclResult check_place(const struct sim_view *view, const struct sim_device *device, const CommMem *memory)
{
    bool host = view->where == SIM_PAGEABLE || view->where == SIM_PINNED;
    if (host != (memory->type == COMM_MEM_HOST))
        return sim_refuse("wrong_kind", HCCL_E_PARA, "HcclRegisterGlobalMem: %p is %s memory", memory->addr,
                          host ? "host" : "device");
    if (!host && (view->where != SIM_DEVICE || view->device != device))
        return sim_refuse("wrong_device", HCCL_E_PARA, "HcclRegisterGlobalMem: %p is not memory of device %d",
                          memory->addr, device->id);
    return HCCL_SUCCESS;
}

/* The registration for the memory, made if there is none. */
static HcclResult obtain(struct sim_device *device, const CommMem *memory, void **handle)
{
    struct registration *fresh = calloc(1, sizeof *fresh), *equal = NULL;
    if (fresh == NULL)
        return sim_fail(HCCL_E_MEMORY, "HcclRegisterGlobalMem: no memory");
    fresh->device = device;
    fresh->memory = *memory;
    HcclResult result =
        sim_view_open("HcclRegisterGlobalMem", memory->addr, memory->size, &fresh->view) ? HCCL_E_PARA : HCCL_SUCCESS;
    if (result == HCCL_SUCCESS)
        result = check_place(&fresh->view, device, memory);
    reception_lock();
    if (result == HCCL_SUCCESS)
        result = find_equal(device, memory, &equal);
    if (result == HCCL_SUCCESS && equal == NULL &&
        sim_handle_make(&fresh->object, SIM_REGISTRATION_HANDLE, free_registration) == NULL)
        result = sim_fail(HCCL_E_MEMORY, "HcclRegisterGlobalMem: no memory");
    if (result == HCCL_SUCCESS && equal == NULL) {
        fresh->next = registrations;
        registrations = equal = fresh;
        sim_count("live.registrations", 1);
    }
    if (result == HCCL_SUCCESS)
        *handle = equal->object.handle;
    reception_unlock();
    if (equal != fresh) {
        sim_view_close(&fresh->view);
        free(fresh);
    }
    return result;
}

SIM_API HcclResult HcclRegisterGlobalMem(const CommMem *memory, void **handle)
{
    struct sim_context *context;
    HcclResult result = sim_enter("HcclRegisterGlobalMem", SIM_HCCL | SIM_NEEDS_CONTEXT, &context);
    if (result == HCCL_SUCCESS)
        result = check_memory(memory, handle);
    return result != HCCL_SUCCESS ? result : obtain(sim_context_device(context), memory, handle);
}

/* The registration of a handle, held. */
static HcclResult find_registration(const char *function, void *handle, struct registration **found)
{
    if (handle == NULL)
        return sim_fail(HCCL_E_PTR, "%s: the registration is NULL", function);
    *found = (struct registration *)sim_handle_get(handle, SIM_REGISTRATION_HANDLE);
    if (*found != NULL)
        return HCCL_SUCCESS;
    if (sim_handle_closed(handle, SIM_REGISTRATION_HANDLE))
        return sim_refuse("use_after_free", HCCL_E_PARA, "%s: registration %p was taken back", function, handle);
    return sim_fail(HCCL_E_PARA, "%s: %p is no registration", function, handle);
}

static void unlist(struct registration *registration)
{
    for (struct registration **at = &registrations; *at != NULL; at = &(*at)->next)
        if (*at == registration) {
            *at = registration->next;
            break;
        }
    sim_count("live.registrations", -1);
    sim_handle_close(registration->object.handle);
}

SIM_API HcclResult HcclDeregisterGlobalMem(void *handle)
{
    struct sim_context *context;
    struct registration *r;
    HcclResult result = sim_enter("HcclDeregisterGlobalMem", SIM_HCCL | SIM_NEEDS_CONTEXT, &context);
    if (result == HCCL_SUCCESS)
        result = find_registration("HcclDeregisterGlobalMem", handle, &r);
    if (result != HCCL_SUCCESS)
        return result;
    bool freed = sim_view_check("HcclDeregisterGlobalMem: freed before it was deregistered", &r->view) != 0;
    reception_lock();
    if (r->device != sim_context_device(context))
        result = sim_refuse("wrong_device", HCCL_E_PARA, "HcclDeregisterGlobalMem: it is registered on device %d",
                            r->device->id);
    else if (r->bindings > 0)
        result = sim_fail(HCCL_E_PARA, "HcclDeregisterGlobalMem: %p is bound to %d communicators", r->memory.addr,
                          r->bindings);
    else
        unlist(r);
    reception_unlock();
    if (result == HCCL_SUCCESS)
        sim_object_put(&r->object);
    sim_object_put(&r->object);
    return result == HCCL_SUCCESS && freed ? HCCL_E_PARA : result;
}

void one_sided_finalize(void)
{
    for (;;) {
        reception_lock();
        struct registration *r = registrations;
        if (r != NULL) {
            sim_misuse("leak", 0, "aclFinalize: %p and %llu bytes are registered", r->memory.addr,
                       (unsigned long long)r->memory.size);
            unlist(r);
        }
        reception_unlock();
        if (r == NULL)
            return;
        sim_object_put(&r->object);
    }
}

/* ---- binding ---- */

static struct binding **find_binding(struct communicator *c, const struct registration *registration)
{
    struct binding **at = &c->bindings;
    while (*at != NULL && (*at)->registration != registration)
        at = &(*at)->next;
    return at;
}

struct binding *binding_of(struct communicator *c, const void *address, uint64_t size)
{
    for (struct binding *b = c->bindings; b != NULL; b = b->next) {
        const CommMem *memory = &b->registration->memory;
        uintptr_t offset = (uintptr_t)address - (uintptr_t)memory->addr;
        if ((uintptr_t)address >= (uintptr_t)memory->addr && offset <= memory->size && size <= memory->size - offset)
            return b;
    }
    return NULL;
}

/* Mutex held. */
static HcclResult bind_memory(struct communicator *c, struct registration *r)
{
    if (r->device != c->device)
        return sim_refuse("wrong_device", HCCL_E_PARA,
                          "HcclCommBindMem: memory of device %d, communicator of device %d", r->device->id,
                          c->device->id);
    struct binding **at = find_binding(c, r);
    if (*at != NULL)
        return sim_fail(HCCL_E_PARA, "HcclCommBindMem: %p is bound to \"%s\" already", r->memory.addr, c->name);
    if (c->prepared &&
        sim_misuse("comm_late_bind", HCCL_E_PARA,
                   "HcclCommBindMem: \"%s\" is prepared: no peer would see memory bound now", c->name) != 0)
        return HCCL_E_PARA;
    struct binding *b = calloc(1, sizeof *b);
    if (b == NULL)
        return sim_fail(HCCL_E_MEMORY, "HcclCommBindMem: no memory");
    b->registration = r;
    sim_object_hold(&r->object);
    r->bindings++;
    *at = b;
    return HCCL_SUCCESS;
}

/* Mutex held. */
static HcclResult unbind_memory(struct communicator *c, struct registration *r)
{
    struct binding **at = find_binding(c, r), *b = *at;
    if (b == NULL)
        return sim_fail(HCCL_E_PARA, "HcclCommUnbindMem: %p is not bound to \"%s\"", r->memory.addr, c->name);
    if (c->one_sided != NULL && sim_misuse("comm_busy_destroy", HCCL_E_PARA,
                                           "HcclCommUnbindMem: puts or gets of \"%s\" are still queued", c->name) != 0)
        return HCCL_E_PARA;
    *at = b->next;
    r->bindings--;
    sim_object_put(&r->object);
    free(b);
    return HCCL_SUCCESS;
}

static HcclResult change(const char *function, HcclComm comm, void *handle,
                         HcclResult (*how)(struct communicator *, struct registration *))
{
    struct communicator *c;
    struct registration *r;
    HcclResult result = communicator_enter(function, comm, false, NULL, &c);
    if (result != HCCL_SUCCESS)
        return result;
    result = find_registration(function, handle, &r);
    if (result == HCCL_SUCCESS) {
        reception_lock();
        result = how(c, r);
        reception_unlock();
        sim_object_put(&r->object);
    }
    communicator_leave(c, false);
    return result;
}

SIM_API HcclResult HcclCommBindMem(HcclComm comm, void *handle)
{
    return change("HcclCommBindMem", comm, handle, bind_memory);
}

SIM_API HcclResult HcclCommUnbindMem(HcclComm comm, void *handle)
{
    return change("HcclCommUnbindMem", comm, handle, unbind_memory);
}

void one_sided_forget(struct communicator *c)
{
    while (c->bindings != NULL) {
        struct binding *b = c->bindings;
        c->bindings = b->next;
        b->registration->bindings--;
        sim_object_put(&b->registration->object);
        free(b);
    }
}
