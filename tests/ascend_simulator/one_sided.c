/* Puts and gets: the initiator's stream does all the work. The descriptors of one call run in random order and partly
 * at the same time; the next call of the stream starts after the last of them. */
#include "registrations.h"

#include <stdlib.h>

struct piece_of_work {
    const struct sim_view *own;
    struct peer_window window;
    uint64_t remote; /* address at the peer, for checks */
};

struct one_sided_call {
    struct sim_task task;
    struct one_sided_call *next;
    struct communicator *communicator;
    struct link *link;
    bool put;
    struct sim_fault fault;
    size_t count;
    atomic_size_t taken;
    atomic_int code; /* the first failure */
    size_t *order;
    struct piece_of_work work[];
};

void one_sided_wake(struct communicator *c)
{
    for (struct one_sided_call *call = c->one_sided; call != NULL; call = call->next)
        sim_task_wake(&call->task);
}

/* ---- on the stream ---- */

static bool destroyed(void *about)
{
    struct one_sided_call *call = about;
    reception_lock();
    bool closing = call->communicator->closing;
    reception_unlock();
    return closing;
}

/* The peer is gone: at once where its memory was mapped, after the network's retries otherwise. */
static int peer_gone(struct one_sided_call *call)
{
    struct communicator *c = call->communicator;
    int code = (int)sim_knob(SIM_DEAD_PEER_CODE);
    if (c->members[call->link->peer].roce) {
        reception_lock();
        uint64_t until = call->link->died_at + hccl_scaled_ns(hccl_environment(call->task.what)->retry_s);
        reception_unlock();
        while (sim_now() < until && !sim_task_aborted(&call->task) && !destroyed(call))
            sim_task_wait(&call->task, until);
        if (sim_task_aborted(&call->task))
            return ACL_STREAM_ABORT;
        atomic_store(&c->async_error, HCCL_E_REMOTE);
    }
    return sim_fail(code, "%s: rank %u is gone", call->task.what, call->link->peer);
}

/* What the injected fault means for the work number `index` of the order. */
static struct sim_fault fault_of(const struct one_sided_call *call, size_t index)
{
    struct sim_fault fault = call->fault;
    if ((fault.action == SIM_CORRUPT && index > 0) || (fault.action == SIM_HALF && index != call->count / 2))
        fault.action = SIM_NONE;
    return fault;
}

static void work_off(struct one_sided_call *call)
{
    for (;;) {
        size_t index = atomic_fetch_add(&call->taken, 1);
        if (index >= call->count || atomic_load(&call->code) != 0)
            return;
        struct piece_of_work *work = &call->work[call->order[index]];
        int none = 0, code = peer_memory_copy(&call->task, &work->window, work->own, 0, work->own->size, call->put,
                                              fault_of(call, index));
        if (code != 0)
            atomic_compare_exchange_strong(&call->code, &none, code);
    }
}

static void *help(void *about)
{
    work_off(about);
    return NULL;
}

static void shuffle(struct one_sided_call *call)
{
    for (size_t i = 0; i < call->count; i++)
        call->order[i] = i;
    for (size_t i = call->count; i > 1; i--) {
        size_t other = sim_random_below(i), kept = call->order[i - 1];
        call->order[i - 1] = call->order[other];
        call->order[other] = kept;
    }
}

/* A second thread takes part in some calls; never where requests wait, for a task has one waiting thread. */
static void work_together(struct one_sided_call *call)
{
    pthread_t helper;
    bool alone = call->count < 2 || call->fault.action != SIM_NONE || !call->work[0].window.mapped ||
                 sim_random_below(2) == 0 || sim_thread_start(&helper, "hccl-one-sided", help, call) != 0;
    work_off(call);
    if (!alone)
        pthread_join(helper, NULL);
}

static int inject(struct one_sided_call *call)
{
    const char *where = call->put ? "exec.put" : "exec.get";
    call->fault = sim_fault(where, call->communicator->device->id, &call->task, NULL, NULL);
    if (call->fault.action == SIM_CODE)
        return sim_fail(call->fault.code, "%s: fault injected at %s", call->task.what, where);
    if (call->fault.action == SIM_ASYNC)
        atomic_store(&call->communicator->async_error, call->fault.code);
    if (call->fault.action == SIM_EOF)
        meeting_cut(call->link, &call->task);
    if (call->fault.action == SIM_EOF || call->fault.action == SIM_ASYNC)
        call->fault.action = SIM_NONE;
    return 0;
}

static int run(struct sim_task *task)
{
    struct one_sided_call *call = (struct one_sided_call *)task;
    int code = inject(call);
    for (size_t i = 0; code == 0 && i < call->count; i++)
        code = sim_view_check(task->what, call->work[i].own);
    if (code != 0)
        return code;
    shuffle(call);
    work_together(call);
    code = atomic_load(&call->code);
    if (code == PEER_GONE)
        return peer_gone(call);
    if (code == PEER_CANCELLED)
        return sim_fail(ACL_INTERNAL_ERROR, "%s: the communicator was destroyed", task->what);
    if (code == PEER_REFUSED)
        return sim_fail(ACL_SUSPECT_REMOTE_ERROR, "%s: the peer's memory is no longer bound", task->what);
    return code;
}

static void end(struct sim_task *task, int code)
{
    struct one_sided_call *call = (struct one_sided_call *)task;
    struct communicator *c = call->communicator;
    reception_lock();
    c->failed |= code != 0;
    for (struct one_sided_call **at = &c->one_sided; *at != NULL; at = &(*at)->next)
        if (*at == call) {
            *at = call->next;
            break;
        }
    if (--c->queued == 0)
        c->stream = NULL;
    if (c->closing)
        pthread_cond_broadcast(&c->changed);
    reception_unlock();
    sim_object_put(&c->object);
    free(call->order);
    free(call);
}

/* ---- the call ---- */

static void discard(struct one_sided_call *call)
{
    for (size_t i = 0; i < call->task.use_count; i++)
        sim_view_close(&call->task.uses[i].view);
    free(call->task.uses);
    free(call->order);
    free(call);
}

static struct one_sided_call *new_call(const char *function, struct link *link, bool put, size_t count)
{
    struct one_sided_call *call = calloc(1, sizeof *call + count * sizeof call->work[0]);
    if (call == NULL)
        return NULL;
    call->task.what = function;
    call->task.run = run;
    call->task.end = end;
    call->task.uses = calloc(count, sizeof *call->task.uses);
    call->order = calloc(count, sizeof *call->order);
    call->communicator = link->communicator;
    call->link = link;
    call->put = put;
    call->count = count;
    if (call->task.uses != NULL && call->order != NULL)
        return call;
    discard(call);
    return NULL;
}

/* The one region of the peer in which the whole range lies. */
static const struct peer_region *remote_region(const struct link *link, uint64_t address, uint64_t size)
{
    for (size_t i = 0; i < link->region_count; i++) {
        const struct peer_region *region = &link->regions[i];
        if (address >= region->address && address - region->address <= region->size &&
            size <= region->size - (address - region->address))
            return region;
    }
    return NULL;
}

/* Mutex held: bindings do not change meanwhile. */
static HcclResult check_local(struct one_sided_call *call, size_t i, void *address, uint64_t size)
{
    struct communicator *c = call->communicator;
    const char *function = call->task.what;
    const struct binding *b = binding_of(c, address, size);
    if (b == NULL)
        return sim_refuse("out_of_bounds", HCCL_E_PARA,
                          "%s: descriptor %zu: local %p and %llu bytes are not within one region "
                          "bound to \"%s\"",
                          function, i, address, (unsigned long long)size, c->name);
    if (b->registration->memory.type == COMM_MEM_HOST && !c->members[call->link->peer].roce)
        return sim_fail(HCCL_E_NOT_SUPPORT, "%s: descriptor %zu: host memory does not go over HCCS", function, i);
    return HCCL_SUCCESS;
}

static HcclResult add_work(struct one_sided_call *call, size_t i, const HcclOneSideOpDesc *desc, uint64_t size)
{
    const char *function = call->task.what;
    uint64_t remote = (uint64_t)(uintptr_t)desc->remoteAddr;
    reception_lock();
    HcclResult result = check_local(call, i, desc->localAddr, size);
    const struct peer_region *region = remote_region(call->link, remote, size);
    reception_unlock();
    if (result != HCCL_SUCCESS)
        return result;
    if (region == NULL)
        return sim_refuse("out_of_bounds", HCCL_E_PARA,
                          "%s: descriptor %zu: remote %p and %llu bytes are not within one region "
                          "that rank %u has bound",
                          function, i, desc->remoteAddr, (unsigned long long)size, call->link->peer);
    struct sim_use *use = &call->task.uses[i];
    if (sim_view_open(function, desc->localAddr, size, &use->view) != 0)
        return HCCL_E_PARA;
    use->writes = !call->put;
    call->task.use_count++;
    uint64_t offset = remote - region->address;
    call->work[i] =
        (struct piece_of_work){.own = &use->view,
                               .remote = remote,
                               .window = {.link = call->link,
                                          .kind = WINDOW_REGION,
                                          .number = region->number,
                                          .offset = offset,
                                          .file_offset = region->offset + offset,
                                          .mapped = call->communicator->members[call->link->peer].same_server &&
                                                    region->type == COMM_MEM_DEVICE,
                                          .cancelled = destroyed,
                                          .about = call}};
    return HCCL_SUCCESS;
}

/* Nobody orders the descriptors of one call: what one of them writes, no other may touch. */
static HcclResult check_overlap(const struct one_sided_call *call)
{
    for (size_t i = 0; i < call->count; i++)
        for (size_t j = 0; j < i; j++) {
            const struct piece_of_work *a = &call->work[i], *b = &call->work[j];
            uint64_t one = call->put ? a->remote : (uint64_t)(uintptr_t)a->own->address;
            uint64_t other = call->put ? b->remote : (uint64_t)(uintptr_t)b->own->address;
            if (one < other + b->own->size && other < one + a->own->size)
                return sim_misuse("overlap_copy", HCCL_E_PARA, "%s: descriptors %zu and %zu write the same bytes",
                                  call->task.what, j, i);
        }
    return HCCL_SUCCESS;
}

static HcclResult fill(struct one_sided_call *call, const HcclOneSideOpDesc *desc, size_t count)
{
    const char *function = call->task.what;
    for (size_t i = 0; i < count; i++) {
        uint64_t size = hccl_type_bytes(desc[i].dataType);
        if (size == 0)
            return sim_fail(HCCL_E_NOT_SUPPORT, "%s: descriptor %zu: data type %d", function, i, desc[i].dataType);
        if (desc[i].localAddr == NULL || desc[i].remoteAddr == NULL)
            return sim_fail(HCCL_E_PTR, "%s: descriptor %zu: NULL", function, i);
        if (desc[i].count == 0 || desc[i].count > HCCL_COUNT_MAX)
            return sim_fail(HCCL_E_PARA, "%s: descriptor %zu: count %llu", function, i,
                            (unsigned long long)desc[i].count);
        HcclResult result = add_work(call, i, &desc[i], desc[i].count * size);
        if (result != HCCL_SUCCESS)
            return result;
    }
    return check_overlap(call);
}

/* The call is no longer ours. */
static HcclResult submit(struct one_sided_call *call, struct sim_stream *stream)
{
    struct communicator *c = call->communicator;
    const char *function = call->task.what;
    HcclResult result = HCCL_SUCCESS;
    reception_lock();
    if (c->queued > 0 && c->stream != stream)
        result =
            sim_misuse("comm_two_streams", HCCL_E_PARA, "%s: operations of \"%s\" are queued on stream %d, this is %d",
                       function, c->name, sim_stream_id(c->stream), sim_stream_id(stream));
    if (result == HCCL_SUCCESS) {
        call->next = c->one_sided;
        c->one_sided = call;
        c->queued++;
        c->stream = stream;
        sim_object_hold(&c->object);
    }
    reception_unlock();
    if (result != HCCL_SUCCESS) {
        discard(call);
        return result;
    }
    int code = sim_enqueue(stream, &call->task);
    return code == 0 ? HCCL_SUCCESS : sim_fail(HCCL_E_RUNTIME, "%s: the stream takes no task (%d)", function, code);
}

static HcclResult check_call(const char *function, struct communicator *c, uint32_t peer, const HcclOneSideOpDesc *desc,
                             uint32_t count, aclrtStream stream)
{
    if (peer >= c->ranks || peer == c->rank)
        return sim_fail(HCCL_E_PARA, "%s: rank %u of %u, the own one is %u", function, peer, c->ranks, c->rank);
    if (count > HCCL_ONE_SIDED_DESCRIPTORS_MAX)
        return sim_fail(HCCL_E_PARA, "%s: %u descriptors, at most %d go into one call", function, count,
                        HCCL_ONE_SIDED_DESCRIPTORS_MAX);
    if ((desc == NULL && count > 0) || stream == NULL)
        return sim_fail(HCCL_E_PTR, "%s: no descriptors, or no stream", function);
    reception_lock();
    bool prepared = c->prepared;
    reception_unlock();
    return prepared ? HCCL_SUCCESS : sim_fail(HCCL_E_PARA, "%s: \"%s\" is not prepared", function, c->name);
}

static HcclResult batch(const char *function, bool put, HcclComm comm, uint32_t peer, const HcclOneSideOpDesc *desc,
                        uint32_t count, aclrtStream handle)
{
    struct sim_context *context;
    struct communicator *c;
    struct sim_stream *stream = NULL;
    struct one_sided_call *call = NULL;
    HcclResult result = communicator_enter(function, comm, false, &context, &c);
    if (result != HCCL_SUCCESS)
        return result;
    result = check_call(function, c, peer, desc, count, handle);
    if (result == HCCL_SUCCESS && sim_stream_get(function, handle, context, &stream) != 0)
        result = HCCL_E_PARA;
    if (result == HCCL_SUCCESS && count > 0 && (call = new_call(function, &c->links[peer], put, count)) == NULL)
        result = sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
    if (call != NULL && (result = fill(call, desc, count)) != HCCL_SUCCESS)
        discard(call);
    else if (call != NULL)
        result = submit(call, stream);
    if (stream != NULL)
        sim_stream_put(stream);
    communicator_leave(c, false);
    return result;
}

SIM_API HcclResult HcclBatchPut(HcclComm comm, uint32_t peer, HcclOneSideOpDesc *desc, uint32_t count,
                                aclrtStream stream)
{
    return batch("HcclBatchPut", true, comm, peer, desc, count, stream);
}

SIM_API HcclResult HcclBatchGet(HcclComm comm, uint32_t peer, HcclOneSideOpDesc *desc, uint32_t count,
                                aclrtStream stream)
{
    return batch("HcclBatchGet", false, comm, peer, desc, count, stream);
}
