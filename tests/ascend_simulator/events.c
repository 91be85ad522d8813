/* Events. The "Ex" kind takes a new generation with each record, and a wait binds to the generation of its moment. The
   old kind is one flag, set by a record and cleared by a reset, and there are only so many of them. */
#include "internal.h"

#include <stdlib.h>

#define KNOWN_FLAGS 0x7bu

struct waiter { /* a task that waits; in its event's list while it does */
    struct sim_task *task;
    struct waiter *next;
};

struct sim_event {
    struct sim_object object;
    struct sim_device *device;
    uint32_t flags;
    bool is_old;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* to host threads that synchronise */
    struct waiter *waiters; /* tasks */
    uint64_t recorded;      /* generations taken so far */
    uint64_t completed;     /* the highest that was reached */
    uint64_t time;          /* of that, by sim_now */
    bool set;               /* old kind */
    struct sim_event *next, *previous;
};

struct event_task {
    struct sim_task task;
    struct sim_event *event;
    uint64_t generation;
    uint64_t limit; /* nanoseconds a wait may take; 0: no limit */
};

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_event *all; /* those with a handle */
static atomic_uint default_wait; /* seconds, of aclrtSetOpWaitTimeout */

/* ---- life ---- */

static void release(struct sim_object *object)
{
    struct sim_event *event = (struct sim_event *)object;
    pthread_cond_destroy(&event->changed);
    pthread_mutex_destroy(&event->lock);
    free(event);
}

static size_t count_events(const struct sim_device *device, bool only_old)
{
    size_t count = 0;
    pthread_mutex_lock(&all_lock);
    for (struct sim_event *event = all; event; event = event->next)
        count += event->device == device && (event->is_old || !only_old);
    pthread_mutex_unlock(&all_lock);
    return count;
}

size_t sim_events_alive(const struct sim_device *device)
{
    return count_events(device, false);
}

static void unlink_event(struct sim_event *event)
{
    pthread_mutex_lock(&all_lock);
    if (event->next)
        event->next->previous = event->previous;
    if (event->previous)
        event->previous->next = event->next;
    else
        all = event->next;
    pthread_mutex_unlock(&all_lock);
    sim_count("live.events", -1);
    sim_object_put(&event->object);
}

void sim_events_end(const struct sim_device *device)
{
    for (;;) {
        pthread_mutex_lock(&all_lock);
        struct sim_event *event = all;
        while (event && event->device != device)
            event = event->next;
        pthread_mutex_unlock(&all_lock);
        if (!event)
            return;
        if (sim_handle_close(event->object.handle))
            unlink_event(event);
    }
}

static int create(const char *function, aclrtEvent *handle, uint32_t flags, bool is_old)
{
    struct sim_context *context;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "%s: event is null", function);
    if (flags & ~KNOWN_FLAGS || !flags)
        return sim_fail(ACL_PARAM_INVALID, "%s: flag %#x", function, flags);
    if (flags & ACL_EVENT_IPC)
        return sim_fail(ACL_FEATURE_NOT_SUPPORT, "%s: events between processes are not simulated", function);
    struct sim_device *device = sim_context_device(context);
    if (is_old && count_events(device, true) >= (size_t)sim_knob(SIM_EVENTS))
        return sim_fail(ACL_NO_EVENT_RESOURCE, "%s: the device's %ld events are used up", function,
                        sim_knob(SIM_EVENTS));
    struct sim_event *event = calloc(1, sizeof *event);
    if (!event || !sim_handle_make(&event->object, SIM_EVENT_HANDLE, release)) {
        free(event);
        return sim_fail(ACL_BAD_ALLOC, "%s: no host memory", function);
    }
    event->device = device;
    event->flags = flags;
    event->is_old = is_old;
    pthread_mutex_init(&event->lock, NULL);
    sim_condition_init(&event->changed);
    pthread_mutex_lock(&all_lock);
    event->next = all;
    if (all)
        all->previous = event;
    all = event;
    pthread_mutex_unlock(&all_lock);
    sim_count("live.events", 1);
    *handle = event->object.handle;
    return 0;
}

SIM_API aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flags)
{
    return create(__func__, event, flags, false);
}

SIM_API aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flags)
{
    return create(__func__, event, flags, true);
}

SIM_API aclError aclrtCreateEvent(aclrtEvent *event)
{
    return create(__func__, event, ACL_EVENT_SYNC | ACL_EVENT_TIME_LINE, true);
}

static int get(const char *function, aclrtEvent handle, struct sim_event **event)
{
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "%s: event is null", function);
    *event = (struct sim_event *)sim_handle_get(handle, SIM_EVENT_HANDLE);
    if (*event)
        return 0;
    bool closed = sim_handle_closed(handle, SIM_EVENT_HANDLE);
    return sim_refuse(closed ? "use_after_free" : "wrong_device", ACL_PARAM_INVALID, "%s: %p is no event%s", function,
                      handle, closed ? " any more: it was destroyed" : " of this process");
}

static void put(struct sim_event *event)
{
    sim_object_put(&event->object);
}

SIM_API aclError aclrtDestroyEvent(aclrtEvent handle)
{
    struct sim_event *event;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (!code)
        code = get(__func__, handle, &event);
    if (code)
        return code;
    if (sim_handle_close(handle))
        unlink_event(event);
    else
        code = sim_refuse("double_free", ACL_PARAM_INVALID, "aclrtDestroyEvent: %p was destroyed by another thread",
                          handle);
    put(event);
    return code;
}

/* ---- tasks ---- */

static void end_task(struct sim_task *task, int code)
{
    (void)code; /* a record that was dropped leaves its generation open: who waits for it waits */
    struct event_task *own = (struct event_task *)task;
    put(own->event);
    free(own);
}

/* Under the event's lock. */
static bool is_reached(const struct sim_event *event, uint64_t generation)
{
    return event->is_old ? event->set : event->completed >= generation;
}

static void tell_waiters(struct sim_event *event)
{
    pthread_cond_broadcast(&event->changed);
    for (struct waiter *waiter = event->waiters; waiter; waiter = waiter->next)
        sim_task_wake(waiter->task);
}

static int run_record(struct sim_task *task)
{
    struct event_task *own = (struct event_task *)task;
    struct sim_event *event = own->event;
    struct sim_fault fault = sim_fault("exec.event", event->device->id, task, NULL, NULL);
    if (fault.action == SIM_CODE)
        return sim_fail(fault.code, "%s: ordered by LLMDD_SIM_FAULTS", task->what);
    if (fault.action == SIM_DROP)
        return 0;
    pthread_mutex_lock(&event->lock);
    event->time = sim_now();
    event->set = true;
    if (own->generation > event->completed)
        event->completed = own->generation;
    tell_waiters(event);
    pthread_mutex_unlock(&event->lock);
    return 0;
}

static int run_reset(struct sim_task *task)
{
    struct sim_event *event = ((struct event_task *)task)->event;
    pthread_mutex_lock(&event->lock);
    event->set = false;
    pthread_mutex_unlock(&event->lock);
    return 0;
}

static void leave(struct sim_event *event, struct waiter *waiter)
{
    struct waiter **link = &event->waiters;
    while (*link != waiter)
        link = &(*link)->next;
    *link = waiter->next;
}

static int run_wait(struct sim_task *task)
{
    struct event_task *own = (struct event_task *)task;
    struct sim_event *event = own->event;
    uint64_t deadline = own->limit ? sim_now() + own->limit : UINT64_MAX;
    pthread_mutex_lock(&event->lock);
    struct waiter waiter = {task, event->waiters};
    event->waiters = &waiter;
    bool aborted = false;
    while (!is_reached(event, own->generation) && !aborted && sim_now() < deadline) {
        pthread_mutex_unlock(&event->lock);
        aborted = sim_task_wait(task, deadline);
        pthread_mutex_lock(&event->lock);
    }
    leave(event, &waiter);
    bool reached = is_reached(event, own->generation);
    pthread_mutex_unlock(&event->lock);
    if (reached)
        return 0;
    return aborted ? ACL_STREAM_ABORT : sim_fail(ACL_WAIT_TIMEOUT, "%s: the event did not come in time", task->what);
}

/* Takes the held event over. */
static int enqueue(const char *function, struct sim_stream *stream, struct sim_event *event,
                   int (*run)(struct sim_task *), uint64_t generation, uint64_t limit)
{
    struct event_task *own = calloc(1, sizeof *own);
    if (!own) {
        put(event);
        return sim_fail(ACL_BAD_ALLOC, "%s: no host memory", function);
    }
    own->task.what = function;
    own->task.run = run;
    own->task.end = end_task;
    own->event = event;
    own->generation = generation;
    own->limit = limit;
    return sim_enqueue(stream, &own->task);
}

/* Both handles, held, of one device. */
static int get_both(const char *function, unsigned needs, aclrtEvent handle, aclrtStream stream_handle,
                    struct sim_event **event, struct sim_stream **stream)
{
    struct sim_context *context;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT | needs, &context);
    if (!code)
        code = get(function, handle, event);
    if (code)
        return code;
    code = sim_stream_get(function, stream_handle, context, stream);
    if (!code && sim_stream_device(*stream) != (*event)->device) {
        code = sim_refuse("wrong_device", ACL_STREAM_CONTEXT, "%s: the event is of device %d, the stream of device %d",
                          function, (*event)->device->id, sim_stream_device(*stream)->id);
        sim_stream_put(*stream);
    }
    if (code)
        put(*event);
    return code;
}

/* Takes the held event over, as enqueue does. A record that the stream refuses leaves the event as it was. */
static int record(struct sim_stream *stream, struct sim_event *event)
{
    sim_object_hold(&event->object);
    pthread_mutex_lock(&event->lock);
    uint64_t generation = ++event->recorded;
    pthread_mutex_unlock(&event->lock);
    int code = enqueue("aclrtRecordEvent", stream, event, run_record, generation, 0);
    pthread_mutex_lock(&event->lock);
    if (code && event->recorded == generation)
        event->recorded--;
    pthread_mutex_unlock(&event->lock);
    put(event);
    return code;
}

SIM_API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle)
{
    struct sim_event *event;
    struct sim_stream *stream;
    int code = get_both(__func__, 0, handle, stream_handle, &event, &stream);
    if (code)
        return code;
    if (event->is_old)
        code = sim_blocks(__func__);
    if (code) {
        put(event);
    } else {
        code = record(stream, event);
    }
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream_handle)
{
    struct sim_event *event;
    struct sim_stream *stream;
    int code = get_both(__func__, 0, handle, stream_handle, &event, &stream);
    if (code)
        return code;
    if (event->is_old) {
        code = enqueue(__func__, stream, event, run_reset, 0, 0);
    } else {
        code = sim_fail(ACL_PARAM_INVALID, "aclrtResetEvent: not for an event of aclrtCreateEventExWithFlag");
        put(event);
    }
    sim_stream_put(stream);
    return code;
}

/* The generation to wait for; misuse if there was no record at all. */
static int bind_wait(const char *function, struct sim_event *event, uint64_t *generation)
{
    pthread_mutex_lock(&event->lock);
    *generation = event->recorded;
    pthread_mutex_unlock(&event->lock);
    if (*generation)
        return 0;
    return sim_misuse("event_unrecorded", ACL_PARAM_INVALID,
                      "%s: the event was never recorded, so that nothing is waited for", function);
}

static int stream_wait(const char *function, aclrtStream stream_handle, aclrtEvent handle, uint64_t seconds)
{
    struct sim_event *event;
    struct sim_stream *stream;
    uint64_t generation = 0;
    int code = get_both(function, 0, handle, stream_handle, &event, &stream);
    if (code)
        return code;
    if (!(event->flags & ACL_EVENT_SYNC))
        code = sim_fail(ACL_PARAM_INVALID, "%s: the event was made without the flag SYNC", function);
    if (!code)
        code = bind_wait(function, event, &generation);
    if (code)
        put(event);
    else
        code = enqueue(function, stream, event, run_wait, generation, seconds * 1000000000u);
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    return stream_wait(__func__, stream, event, atomic_load(&default_wait));
}

SIM_API aclError aclrtStreamWaitEventWithTimeout(aclrtStream stream, aclrtEvent event, int32_t seconds)
{
    if (seconds < 0)
        return sim_fail(ACL_PARAM_INVALID, "aclrtStreamWaitEventWithTimeout: timeout %d seconds", seconds);
    return stream_wait(__func__, stream, event, (uint64_t)seconds);
}

SIM_API aclError aclrtSetOpWaitTimeout(uint32_t seconds)
{
    int code = sim_enter(__func__, 0, NULL);
    if (!code)
        atomic_store(&default_wait, seconds);
    return code;
}

/* ---- the host looks and waits ---- */

SIM_API aclError aclrtQueryEventStatus(aclrtEvent handle, int *status)
{
    struct sim_event *event;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (!code)
        code = get(__func__, handle, &event);
    if (code)
        return code;
    if (!status) {
        put(event);
        return sim_fail(ACL_INVALID_PARAM, "aclrtQueryEventStatus: status is null");
    }
    pthread_mutex_lock(&event->lock);
    *status = is_reached(event, event->recorded) ? ACL_EVENT_COMPLETE : ACL_EVENT_NOT_READY;
    pthread_mutex_unlock(&event->lock);
    put(event);
    return 0;
}

static int synchronize(const char *function, aclrtEvent handle, int32_t timeout, bool unbounded)
{
    struct sim_event *event;
    uint64_t generation = 0;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT | SIM_BLOCKS, NULL);
    if (!code)
        code = get(function, handle, &event);
    if (code)
        return code;
    code = unbounded ? sim_misuse("unbounded_wait", ACL_PARAM_INVALID, "%s: waits without limit", function)
                     : sim_check_timeout(function, timeout, true);
    if (!code)
        code = bind_wait(function, event, &generation);
    if (code) {
        put(event);
        return code;
    }
    uint64_t deadline = sim_deadline(timeout);
    bool in_time = true;
    pthread_mutex_lock(&event->lock);
    while (!is_reached(event, generation) && in_time)
        in_time = sim_condition_wait(&event->changed, &event->lock, deadline);
    if (!is_reached(event, generation))
        code = sim_fail(ACL_EVENT_SYNC_TIMEOUT, "%s: time is up, the event is not reached", function);
    pthread_mutex_unlock(&event->lock);
    put(event);
    return code;
}

SIM_API aclError aclrtSynchronizeEvent(aclrtEvent event)
{
    return synchronize(__func__, event, -1, true);
}

SIM_API aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout)
{
    return synchronize(__func__, event, timeout, false);
}

/* When the event's last record was reached. */
static int time_of(const char *function, aclrtEvent handle, uint64_t *time)
{
    struct sim_event *event;
    int code = get(function, handle, &event);
    if (code)
        return code;
    pthread_mutex_lock(&event->lock);
    if (!(event->flags & ACL_EVENT_TIME_LINE))
        code = sim_fail(ACL_PARAM_INVALID, "%s: the event was made without the flag TIME_LINE", function);
    else if (!event->recorded || !is_reached(event, event->recorded))
        code = sim_fail(ACL_EVENT_NOT_COMPLETE, "%s: the event is not reached", function);
    *time = event->time;
    pthread_mutex_unlock(&event->lock);
    put(event);
    return code;
}

SIM_API aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end)
{
    uint64_t from, to;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (!code && !milliseconds)
        return sim_fail(ACL_INVALID_PARAM, "aclrtEventElapsedTime: ms is null");
    if (!code)
        code = time_of(__func__, start, &from);
    if (!code)
        code = time_of(__func__, end, &to);
    if (!code)
        *milliseconds = (float)((double)(int64_t)(to - from) / 1e6);
    return code;
}
