/* The preparation for one-sided access: both ends at the same time tell each other what they have bound. */
#include "registrations.h"

#include <stdlib.h>
#include <string.h>

/* ---- the list of regions ---- */

/* Host memory is shown to peers that are reached over the network only. Mutex held. */
static struct peer_region *list_regions(struct communicator *c, bool with_host, size_t *count)
{
    size_t all = 0;
    for (struct binding *b = c->bindings; b != NULL; b = b->next)
        b->number = all++;
    struct peer_region *regions = calloc(all + 1, sizeof *regions);
    *count = 0;
    for (struct binding *b = c->bindings; regions != NULL && b != NULL; b = b->next) {
        const CommMem *memory = &b->registration->memory;
        b->shown = true;
        if (memory->type == COMM_MEM_HOST && !with_host)
            continue;
        regions[(*count)++] = (struct peer_region){.type = memory->type,
                                                   .number = b->number,
                                                   .address = (uint64_t)(uintptr_t)memory->addr,
                                                   .size = memory->size,
                                                   .offset = b->registration->view.offset};
    }
    return regions;
}

static HcclResult show(struct link *link)
{
    struct communicator *c = link->communicator;
    size_t count;
    struct peer_region *regions = list_regions(c, c->members[link->peer].roce, &count);
    HcclResult result = HCCL_SUCCESS;
    if (regions == NULL || count * sizeof *regions > FRAME_BODY_MAX)
        result = sim_fail(HCCL_E_MEMORY, "HcclCommPrepare: too many regions");
    peer_memory_send(link);
    if (result == HCCL_SUCCESS && link->socket != NULL)
        socket_send(link->socket, (struct frame){.kind = FRAME_PREPARED, .body = (uint32_t)(count * sizeof *regions)},
                    regions, -1);
    free(regions);
    return result;
}

void one_sided_frame(struct link *link, const struct frame *frame, const char *body)
{
    if (frame->kind == FRAME_UNPREPARED) {
        link->prepared_heard = false;
    } else if (frame->kind == FRAME_PREPARED && !link->communicator->prepared) {
        free(link->regions);
        link->regions = malloc(frame->body + 1);
        link->region_count = link->regions != NULL ? frame->body / sizeof *link->regions : 0;
        if (link->regions != NULL)
            memcpy(link->regions, body, frame->body);
        link->prepared_heard = link->regions != NULL;
    }
    pthread_cond_broadcast(&link->communicator->changed);
}

/* What a peer asks for by frames: part of a region that was shown to it, still bound and not freed. */
unsigned char *one_sided_window(struct link *link, uint64_t number, uint64_t offset, uint64_t size)
{
    struct communicator *c = link->communicator;
    for (struct binding *b = c->bindings; b != NULL; b = b->next) {
        struct registration *r = b->registration;
        if (!b->shown || b->number != number)
            continue;
        if (offset > r->memory.size || size > r->memory.size - offset ||
            sim_view_check("memory that a peer reaches", &r->view) != 0)
            return NULL;
        return r->view.bytes + offset;
    }
    return NULL;
}

/* ---- the call ---- */

static HcclResult check_wire(struct communicator *c)
{
    for (uint32_t peer = 0; peer < c->ranks; peer++) {
        const struct member *member = &c->members[peer];
        if (peer != c->rank && !member->roce && member->same_server &&
            !sim_devices_linked(c->device->physical, (int)member->physical))
            return sim_fail(HCCL_E_NOT_SUPPORT, "HcclCommPrepare: no HCCS between devices %d and %u",
                            c->device->physical, member->physical);
    }
    return HCCL_SUCCESS;
}

static HcclResult meet_all(struct communicator *c, uint64_t deadline)
{
    HcclResult result = HCCL_SUCCESS;
    for (uint32_t peer = 0; peer < c->ranks && result == HCCL_SUCCESS; peer++) {
        if (peer == c->rank)
            continue;
        result = communicator_fault("HcclCommPrepare", "link.meet", c, &c->links[peer]);
        if (result != HCCL_SUCCESS)
            break;
        reception_lock();
        result = meeting_await("HcclCommPrepare", &c->links[peer], deadline);
        reception_unlock();
        if (result == HCCL_SUCCESS)
            result = communicator_fault("HcclCommPrepare", "link.peer", c, &c->links[peer]);
    }
    return result;
}

static HcclResult await_regions(struct link *link, uint64_t deadline)
{
    struct communicator *c = link->communicator;
    while (!link->prepared_heard) {
        if (c->closing)
            return sim_fail(HCCL_E_INTERNAL, "HcclCommPrepare: the communicator was destroyed meanwhile");
        if (link->goodbye)
            return sim_fail(HCCL_E_TCP_TRANSFER, "HcclCommPrepare: rank %u destroyed its communicator", link->peer);
        if (sim_now() >= deadline)
            return sim_fail(HCCL_E_TIMEOUT, "HcclCommPrepare: rank %u of \"%s\" did not come", link->peer, c->name);
        reception_wait(&c->changed, deadline);
    }
    return HCCL_SUCCESS;
}

/* Everybody is there. Mutex held. */
static HcclResult exchange(struct communicator *c, uint64_t deadline)
{
    HcclResult result = HCCL_SUCCESS;
    for (uint32_t peer = 0; peer < c->ranks && result == HCCL_SUCCESS; peer++)
        if (peer != c->rank)
            result = show(&c->links[peer]);
    for (uint32_t peer = 0; peer < c->ranks && result == HCCL_SUCCESS; peer++)
        if (peer != c->rank)
            result = await_regions(&c->links[peer], deadline);
    c->prepared = result == HCCL_SUCCESS;
    for (uint32_t peer = 0; peer < c->ranks && !c->prepared; peer++)
        if (peer != c->rank && c->links[peer].socket != NULL)
            socket_send(c->links[peer].socket, (struct frame){.kind = FRAME_UNPREPARED}, NULL, -1);
    return result;
}

static HcclResult prepare(struct communicator *c, const HcclPrepareConfig *config, int timeout)
{
    if (config == NULL)
        return sim_fail(HCCL_E_PTR, "HcclCommPrepare: config is NULL");
    if (config->topoType != 0)
        return sim_fail(HCCL_E_PARA, "HcclCommPrepare: topology %d, only the full mesh (0) is known", config->topoType);
    if (timeout <= 0)
        return sim_fail(HCCL_E_PARA, "HcclCommPrepare: timeout %d s", timeout);
    reception_lock();
    bool done = c->prepared;
    reception_unlock();
    if (done)
        return HCCL_SUCCESS;
    uint64_t deadline = sim_now() + (uint64_t)timeout * 1000000000u;
    HcclResult result = check_wire(c);
    if (result == HCCL_SUCCESS)
        result = meet_all(c, deadline);
    if (result != HCCL_SUCCESS)
        return result;
    reception_lock();
    result = exchange(c, deadline);
    reception_unlock();
    return result;
}

SIM_API HcclResult HcclCommPrepare(HcclComm comm, const HcclPrepareConfig *config, const int timeout)
{
    struct communicator *c;
    HcclResult result = communicator_enter("HcclCommPrepare", comm, true, NULL, &c);
    if (result != HCCL_SUCCESS)
        return result;
    result = prepare(c, config, timeout);
    communicator_leave(c, true);
    return result;
}
