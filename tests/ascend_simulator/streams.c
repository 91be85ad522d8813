/* Streams: queues of tasks, each with a thread of its own that runs them in order. */
#include "internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define KNOWN_FLAGS 0x3fu

struct sim_stream {
    struct sim_object object;
    struct sim_context *context;
    int id;
    bool is_default;
    pthread_mutex_t lock;
    pthread_cond_t work; /* to the worker, and to its task that waits */
    pthread_cond_t done; /* to those who synchronise */
    struct sim_task *head, *tail;
    struct sim_task *running;
    uint64_t enqueued, finished; /* how many so far; a dropped task counts as finished */
    int first_error;
    char error_text[512];
    bool aborted;  /* nothing runs any more */
    bool quitting; /* being destroyed */
    bool has_worker;
    pthread_t worker;
    int abort_descriptor; /* -1 until asked for */
    struct sim_stream *next, *previous;
};

static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_stream *all; /* those not destroyed yet; each is held by the list */
static int next_id;

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t idle_condition;
static pthread_once_t idle_once = PTHREAD_ONCE_INIT;
static uint64_t pending; /* tasks of all streams that have not ended */

static pthread_mutex_t uses_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_task *using; /* tasks that touch memory */

/* ---- what tasks touch ---- */

void sim_uses_begin(struct sim_task *task)
{
    if (!task->use_count)
        return;
    pthread_mutex_lock(&uses_lock);
    task->previous_use = NULL;
    task->next_use = using;
    if (using)
        using->previous_use = task;
    using = task;
    pthread_mutex_unlock(&uses_lock);
}

void sim_uses_end(struct sim_task *task)
{
    if (!task->use_count)
        return;
    pthread_mutex_lock(&uses_lock);
    if (task->next_use)
        task->next_use->previous_use = task->previous_use;
    if (task->previous_use)
        task->previous_use->next_use = task->next_use;
    else
        using = task->next_use;
    pthread_mutex_unlock(&uses_lock);
    for (size_t i = 0; i < task->use_count; i++)
        sim_view_close(&task->uses[i].view);
}

static const char *find_use(const void *address, size_t size, bool only_writes)
{
    const char *what = NULL;
    uintptr_t begin = (uintptr_t)address;
    pthread_mutex_lock(&uses_lock);
    for (struct sim_task *task = using; task && !what; task = task->next_use)
        for (size_t i = 0; i < task->use_count && !what; i++) {
            const struct sim_use *use = &task->uses[i];
            uintptr_t other = (uintptr_t)use->view.address;
            if ((use->writes || !only_writes) && begin < other + use->view.size && other < begin + size)
                what = task->what;
        }
    pthread_mutex_unlock(&uses_lock);
    return what;
}

const char *sim_written_by(const void *address, size_t size)
{
    return find_use(address, size, true);
}

const char *sim_used_by(const void *address, size_t size)
{
    return find_use(address, size, false);
}

/* ---- how much is queued in the process ---- */

static void make_idle_condition(void)
{
    sim_condition_init(&idle_condition);
}

static void count_pending(int64_t more)
{
    pthread_once(&idle_once, make_idle_condition);
    pthread_mutex_lock(&idle_lock);
    pending += (uint64_t)more;
    if (!pending)
        pthread_cond_broadcast(&idle_condition);
    pthread_mutex_unlock(&idle_lock);
}

bool sim_streams_idle(uint64_t deadline)
{
    pthread_once(&idle_once, make_idle_condition);
    pthread_mutex_lock(&idle_lock);
    bool in_time = true;
    while (pending && in_time)
        in_time = sim_condition_wait(&idle_condition, &idle_lock, deadline);
    bool idle = !pending;
    pthread_mutex_unlock(&idle_lock);
    return idle;
}

/* ---- running ---- */

static void end_task(struct sim_task *task, int code)
{
    sim_uses_end(task);
    free(task->uses);
    task->end(task, code);
    count_pending(-1);
}

/* Until its time has come; false if the stream was aborted meanwhile. Under the lock. */
static bool wait_for_start(struct sim_stream *stream, const struct sim_task *task)
{
    while (!stream->aborted && sim_now() < task->not_before)
        sim_condition_wait(&stream->work, &stream->lock, task->not_before);
    return !stream->aborted;
}

static void keep_error(struct sim_stream *stream, int code, const char *what, const char *text)
{
    if (!code || stream->first_error)
        return;
    stream->first_error = code;
    snprintf(stream->error_text, sizeof stream->error_text, "%s failed: %s", what, text);
}

/* Called and left with the lock held, which is given up while the task runs. */
static void run_head(struct sim_stream *stream)
{
    struct sim_task *task = stream->head;
    stream->head = task->next;
    if (!stream->head)
        stream->tail = NULL;
    stream->running = task;
    pthread_mutex_unlock(&stream->lock);
    const char *what = task->what;
    int code = task->run(task);
    if (code < 0 || code == ACL_STREAM_ABORT)
        sim_fail(code, "%s: ended by abort or stop of stream %d", what, stream->id);
    /* It stays the running one until everything of it is gone: an abort that returns means that nothing is touched
       any more. */
    end_task(task, code);
    pthread_mutex_lock(&stream->lock);
    stream->running = NULL;
    stream->finished++;
    keep_error(stream, code, what, sim_failure_text());
    pthread_cond_broadcast(&stream->done);
}

static void *work(void *argument)
{
    struct sim_stream *stream = argument;
    sim_bind_thread(stream->context);
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (!stream->head && !stream->quitting)
            pthread_cond_wait(&stream->work, &stream->lock);
        if (!stream->head)
            break;
        if (wait_for_start(stream, stream->head))
            run_head(stream);
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

/* Under the lock. */
static int start_worker(struct sim_stream *stream)
{
    if (stream->has_worker)
        return 0;
    char name[16];
    snprintf(name, sizeof name, "sim-stream-%d", stream->id % 1000);
    if (sim_thread_start(&stream->worker, name, work, stream))
        return sim_fail(ACL_NO_STREAM_RESOURCE, "no thread for stream %d", stream->id);
    stream->has_worker = true;
    return 0;
}

int sim_enqueue(struct sim_stream *stream, struct sim_task *task)
{
    task->stream = stream;
    task->next = NULL;
    task->stopped = task->woken = false;
    uint64_t delay = (uint64_t)sim_knob(SIM_MIN_DELAY_US) + sim_random_below((uint64_t)sim_knob(SIM_JITTER_US) + 1);
    task->not_before = sim_now() + delay * 1000;
    count_pending(1);
    sim_uses_begin(task);
    pthread_mutex_lock(&stream->lock);
    int code = 0;
    if (stream->aborted || stream->quitting)
        code = sim_fail(ACL_STREAM_ABORT, "%s: stream %d was %s", task->what, stream->id,
                        stream->aborted ? "aborted" : "destroyed");
    if (!code)
        code = start_worker(stream);
    if (!code) {
        if (stream->tail)
            stream->tail->next = task;
        else
            stream->head = task;
        stream->tail = task;
        stream->enqueued++;
        pthread_cond_broadcast(&stream->work);
    }
    pthread_mutex_unlock(&stream->lock);
    if (code)
        end_task(task, code);
    return code;
}

/* ---- for tasks ---- */

bool sim_task_aborted(struct sim_task *task)
{
    struct sim_stream *stream = task->stream;
    pthread_mutex_lock(&stream->lock);
    bool aborted = stream->aborted || task->stopped;
    pthread_mutex_unlock(&stream->lock);
    return aborted;
}

bool sim_task_released(struct sim_task *task)
{
    struct sim_stream *stream = task->stream;
    pthread_mutex_lock(&stream->lock);
    bool released = stream->aborted || task->stopped || stream->quitting;
    pthread_mutex_unlock(&stream->lock);
    return released;
}

bool sim_task_wait(struct sim_task *task, uint64_t deadline)
{
    struct sim_stream *stream = task->stream;
    pthread_mutex_lock(&stream->lock);
    if (!stream->aborted && !task->stopped && !task->woken)
        sim_condition_wait(&stream->work, &stream->lock, deadline);
    task->woken = false;
    bool aborted = stream->aborted || task->stopped;
    pthread_mutex_unlock(&stream->lock);
    return aborted;
}

void sim_task_wake(struct sim_task *task)
{
    struct sim_stream *stream = task->stream;
    pthread_mutex_lock(&stream->lock);
    task->woken = true;
    pthread_cond_broadcast(&stream->work);
    pthread_mutex_unlock(&stream->lock);
}

int sim_task_abort_descriptor(struct sim_task *task)
{
    struct sim_stream *stream = task->stream;
    pthread_mutex_lock(&stream->lock);
    if (stream->abort_descriptor < 0)
        stream->abort_descriptor = eventfd(stream->aborted || task->stopped, EFD_CLOEXEC | EFD_NONBLOCK);
    int descriptor = stream->abort_descriptor;
    pthread_mutex_unlock(&stream->lock);
    return descriptor;
}

/* ---- waiting ---- */

/* 0, or the first error with its text for this thread. Under the lock. */
static int stored_error(const char *function, const struct sim_stream *stream)
{
    if (!stream->first_error)
        return 0;
    return sim_fail(stream->first_error, "%s: stream %d: %s", function, stream->id, stream->error_text);
}

int sim_stream_drain(const char *function, struct sim_stream *stream, uint64_t deadline)
{
    pthread_mutex_lock(&stream->lock);
    uint64_t last = stream->enqueued;
    bool in_time = true, was_aborted = stream->aborted;
    while (stream->finished < last && !stream->aborted && in_time)
        in_time = sim_condition_wait(&stream->done, &stream->lock, deadline);
    int code;
    if (stream->aborted && !was_aborted)
        code = sim_fail(ACL_STREAM_ABORT, "%s: stream %d was aborted during the wait", function, stream->id);
    else if (stream->finished < last && !stream->aborted)
        code = sim_fail(ACL_STREAM_SYNC_TIMEOUT, "%s: stream %d: time is up, %lu tasks are not done", function,
                        stream->id, (unsigned long)(last - stream->finished));
    else
        code = stored_error(function, stream);
    pthread_mutex_unlock(&stream->lock);
    return code;
}

/* The n-th stream of the device, held; NULL behind the last. */
static struct sim_stream *stream_at(const struct sim_device *device, size_t n)
{
    pthread_mutex_lock(&all_lock);
    struct sim_stream *stream = all;
    while (stream && (sim_context_device(stream->context) != device || n--))
        stream = stream->next;
    if (stream)
        sim_stream_hold(stream);
    pthread_mutex_unlock(&all_lock);
    return stream;
}

int sim_device_drain(const char *function, struct sim_context *context, uint64_t deadline)
{
    struct sim_stream *stream;
    int result = 0;
    for (size_t n = 0; (stream = stream_at(sim_context_device(context), n)); n++) {
        int code = sim_stream_drain(function, stream, deadline);
        result = result ? result : code;
        sim_stream_put(stream);
    }
    return result;
}

/* ---- beginning and end ---- */

static void release(struct sim_object *object)
{
    struct sim_stream *stream = (struct sim_stream *)object;
    if (stream->abort_descriptor >= 0)
        close(stream->abort_descriptor);
    pthread_cond_destroy(&stream->work);
    pthread_cond_destroy(&stream->done);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

static void link_stream(struct sim_stream *stream)
{
    pthread_mutex_lock(&all_lock);
    stream->id = next_id++;
    stream->next = all;
    if (all)
        all->previous = stream;
    all = stream;
    pthread_mutex_unlock(&all_lock);
    if (!stream->is_default)
        sim_count("live.streams", 1);
}

static void unlink_stream(struct sim_stream *stream)
{
    pthread_mutex_lock(&all_lock);
    if (stream->next)
        stream->next->previous = stream->previous;
    if (stream->previous)
        stream->previous->next = stream->next;
    else
        all = stream->next;
    pthread_mutex_unlock(&all_lock);
    if (!stream->is_default)
        sim_count("live.streams", -1);
}

int sim_stream_make(struct sim_context *context, uint32_t flags, bool is_default, struct sim_stream **made)
{
    (void)flags; /* how fast the vendor launches and waits */
    struct sim_stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return sim_fail(ACL_BAD_ALLOC, "no memory for a stream");
    stream->context = context;
    stream->is_default = is_default;
    stream->abort_descriptor = -1;
    pthread_mutex_init(&stream->lock, NULL);
    sim_condition_init(&stream->work);
    sim_condition_init(&stream->done);
    if (!sim_handle_make(&stream->object, SIM_STREAM_HANDLE, release)) {
        release(&stream->object);
        return sim_fail(ACL_BAD_ALLOC, "no memory for a stream");
    }
    link_stream(stream);
    *made = stream;
    return 0;
}

/* Takes the queue away and stops the running task; gives what is to be ended. Under the lock. */
static struct sim_task *take_queue(struct sim_stream *stream)
{
    struct sim_task *dropped = stream->head;
    stream->head = stream->tail = NULL;
    stream->aborted = true;
    keep_error(stream, ACL_STREAM_ABORT, "abort", "the stream was aborted");
    if (stream->abort_descriptor >= 0)
        eventfd_write(stream->abort_descriptor, 1);
    pthread_cond_broadcast(&stream->work);
    pthread_cond_broadcast(&stream->done);
    return dropped;
}

/* Returns when no task of the stream touches anything any more. */
static void abort_stream(struct sim_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    struct sim_task *dropped = take_queue(stream);
    pthread_mutex_unlock(&stream->lock);
    uint64_t count = 0;
    while (dropped) {
        struct sim_task *task = dropped;
        dropped = task->next;
        end_task(task, ACL_STREAM_ABORT);
        count++;
    }
    pthread_mutex_lock(&stream->lock);
    stream->finished += count;
    while (stream->running)
        pthread_cond_wait(&stream->done, &stream->lock);
    pthread_mutex_unlock(&stream->lock);
}

/* After its tasks, or after an abort. The caller has closed the handle, so that it is the only one here. */
static void end_stream(struct sim_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    stream->quitting = true;
    pthread_cond_broadcast(&stream->work);
    pthread_mutex_unlock(&stream->lock);
    if (stream->has_worker)
        pthread_join(stream->worker, NULL);
    unlink_stream(stream);
    sim_stream_put(stream); /* what sim_stream_make gave */
}

/* Held, or NULL. */
static struct sim_stream *any_of(const struct sim_context *context)
{
    pthread_mutex_lock(&all_lock);
    struct sim_stream *stream = all;
    while (stream && stream->context != context)
        stream = stream->next;
    if (stream)
        sim_stream_hold(stream);
    pthread_mutex_unlock(&all_lock);
    return stream;
}

void sim_streams_end(struct sim_context *context)
{
    struct sim_stream *stream;
    while ((stream = any_of(context))) {
        if (sim_handle_close(stream->object.handle)) {
            abort_stream(stream);
            end_stream(stream);
        } else {
            sched_yield(); /* another thread is destroying it at this moment */
        }
        sim_stream_put(stream);
    }
}

static size_t count_streams(const struct sim_device *device, const struct sim_context *context)
{
    size_t count = 0;
    pthread_mutex_lock(&all_lock);
    for (struct sim_stream *stream = all; stream; stream = stream->next)
        count += !stream->is_default &&
                 (context ? stream->context == context : sim_context_device(stream->context) == device);
    pthread_mutex_unlock(&all_lock);
    return count;
}

size_t sim_streams_alive(const struct sim_device *device)
{
    return count_streams(device, NULL);
}

size_t sim_context_streams_alive(const struct sim_context *context)
{
    return count_streams(NULL, context);
}

/* ---- for the other files ---- */

int sim_stream_get(const char *function, aclrtStream handle, struct sim_context *context, struct sim_stream **found)
{
    if (!handle) {
        *found = sim_context_default_stream(context);
        sim_stream_hold(*found);
        return 0;
    }
    struct sim_stream *stream = (struct sim_stream *)sim_handle_get(handle, SIM_STREAM_HANDLE);
    if (!stream) {
        bool closed = sim_handle_closed(handle, SIM_STREAM_HANDLE);
        return sim_refuse(closed ? "use_after_free" : "wrong_device", ACL_STREAM_CONTEXT, "%s: %p is no stream%s",
                          function, handle, closed ? " any more: it was destroyed" : " of this process");
    }
    if (stream->context != context) {
        int code = sim_refuse("wrong_device", ACL_STREAM_CONTEXT,
                              "%s: stream %d belongs to a context of device %d, not to the thread's", function,
                              stream->id, sim_stream_device(stream)->id);
        sim_stream_put(stream);
        return code;
    }
    *found = stream;
    return 0;
}

void sim_stream_hold(struct sim_stream *stream)
{
    sim_object_hold(&stream->object);
}

void sim_stream_put(struct sim_stream *stream)
{
    sim_object_put(&stream->object);
}

struct sim_device *sim_stream_device(struct sim_stream *stream)
{
    return sim_context_device(stream->context);
}

int sim_stream_id(struct sim_stream *stream)
{
    return stream->id;
}

void *sim_stream_handle(struct sim_stream *stream)
{
    return stream->object.handle;
}

/* ---- what the program calls ---- */

static int create(const char *function, aclrtStream *handle, uint32_t priority, uint32_t flags)
{
    struct sim_context *context;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "%s: stream is null", function);
    if (priority || flags & ~KNOWN_FLAGS)
        return sim_fail(ACL_PARAM_INVALID, "%s: priority %u (must be 0), flags %#x", function, priority, flags);
    if (sim_streams_alive(sim_context_device(context)) >= (size_t)sim_knob(SIM_STREAMS))
        return sim_fail(ACL_NO_STREAM_RESOURCE, "%s: the device's %ld streams are used up", function,
                        sim_knob(SIM_STREAMS));
    struct sim_stream *stream;
    code = sim_stream_make(context, flags, false, &stream);
    if (!code)
        *handle = stream->object.handle;
    return code;
}

SIM_API aclError aclrtCreateStream(aclrtStream *stream)
{
    return create(__func__, stream, 0, 0);
}

SIM_API aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags)
{
    return create(__func__, stream, priority, flags);
}

/* A call that hangs by order ends with its stream. */
static bool is_released(void *about)
{
    struct sim_stream *stream = about;
    pthread_mutex_lock(&stream->lock);
    bool released = stream->aborted || stream->quitting;
    pthread_mutex_unlock(&stream->lock);
    return released;
}

/* Common to all below: enters, finds the stream of a handle that must not be null where `named` says so. */
static int enter(const char *function, unsigned needs, aclrtStream handle, bool named, struct sim_stream **stream)
{
    struct sim_context *context;
    int code = sim_enter(function, SIM_NEEDS_CONTEXT | SIM_FAULT_LATER | needs, &context);
    if (code)
        return code;
    if (named && !handle)
        return sim_fail(ACL_INVALID_PARAM, "%s: stream is null", function);
    code = sim_stream_get(function, handle, context, stream);
    if (code)
        return code;
    struct sim_fault fault = sim_fault(function, sim_stream_device(*stream)->id, NULL, is_released, *stream);
    if (fault.action == SIM_CODE) {
        code = sim_fail(fault.code, "%s: ordered by LLMDD_SIM_FAULTS", function);
        sim_stream_put(*stream);
    }
    return code;
}

static int destroy(const char *function, aclrtStream handle, bool by_force)
{
    struct sim_stream *stream;
    int code = enter(function, SIM_BLOCKS, handle, true, &stream);
    if (code)
        return code;
    if (stream->is_default)
        code = sim_fail(ACL_PARAM_INVALID, "%s: the default stream cannot be destroyed", function);
    else if (!sim_handle_close(handle))
        code = sim_refuse("double_free", ACL_PARAM_INVALID, "%s: stream %d was destroyed by another thread", function,
                          stream->id);
    else {
        if (by_force)
            abort_stream(stream);
        end_stream(stream);
    }
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtDestroyStream(aclrtStream stream)
{
    return destroy(__func__, stream, false);
}

SIM_API aclError aclrtDestroyStreamForce(aclrtStream stream)
{
    return destroy(__func__, stream, true);
}

SIM_API aclError aclrtSynchronizeStream(aclrtStream handle)
{
    struct sim_stream *stream;
    int code = enter(__func__, SIM_BLOCKS, handle, false, &stream);
    if (code)
        return code;
    code = sim_misuse("unbounded_wait", ACL_PARAM_INVALID, "aclrtSynchronizeStream: waits without limit");
    if (!code)
        code = sim_stream_drain(__func__, stream, UINT64_MAX);
    sim_stream_put(stream);
    return code;
}

/* Milliseconds as the calls take them: 0, or why not. -1 is refused, since it has no limit. */
int sim_check_timeout(const char *function, int32_t timeout, bool zero_is_defined)
{
    if (timeout < -1)
        return sim_fail(ACL_PARAM_INVALID, "%s: timeout %d", function, timeout);
    if (timeout == -1)
        return sim_misuse("unbounded_wait", ACL_PARAM_INVALID, "%s: timeout -1 waits without limit", function);
    if (timeout == 0 && !zero_is_defined)
        return sim_misuse("unbounded_wait", ACL_PARAM_INVALID,
                          "%s: nobody says whether timeout 0 means no wait or no limit", function);
    return 0;
}

uint64_t sim_deadline(int32_t timeout)
{
    return timeout < 0 ? UINT64_MAX : sim_now() + (uint64_t)timeout * 1000000;
}

SIM_API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout)
{
    struct sim_stream *stream;
    int code = enter(__func__, SIM_BLOCKS, handle, false, &stream);
    if (code)
        return code;
    code = sim_check_timeout(__func__, timeout, false);
    if (!code)
        code = sim_stream_drain(__func__, stream, sim_deadline(timeout));
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtSynchronizeDevice(void)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT | SIM_BLOCKS, &context);
    if (!code)
        code = sim_misuse("unbounded_wait", ACL_PARAM_INVALID, "aclrtSynchronizeDevice: waits without limit");
    return code ? code : sim_device_drain(__func__, context, UINT64_MAX);
}

SIM_API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT | SIM_BLOCKS, &context);
    if (!code)
        code = sim_check_timeout(__func__, timeout, false);
    return code ? code : sim_device_drain(__func__, context, sim_deadline(timeout));
}

SIM_API aclError aclrtStreamQuery(aclrtStream handle, int *status)
{
    struct sim_stream *stream;
    if (!status)
        return sim_fail(ACL_INVALID_PARAM, "aclrtStreamQuery: status is null");
    int code = enter(__func__, 0, handle, false, &stream);
    if (code)
        return code;
    pthread_mutex_lock(&stream->lock);
    code = stored_error(__func__, stream);
    if (!code)
        *status = stream->finished == stream->enqueued ? ACL_STREAM_COMPLETE : ACL_STREAM_NOT_READY;
    pthread_mutex_unlock(&stream->lock);
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtStreamAbort(aclrtStream handle)
{
    struct sim_stream *stream;
    int code = enter(__func__, SIM_BLOCKS, handle, true, &stream);
    if (code)
        return code;
    abort_stream(stream);
    sim_stream_put(stream);
    return 0;
}

SIM_API aclError aclrtStreamStop(aclrtStream handle)
{
    struct sim_stream *stream;
    int code = enter(__func__, SIM_BLOCKS, handle, true, &stream);
    if (code)
        return code;
    if (stream->is_default)
        code = sim_fail(ACL_PARAM_INVALID, "aclrtStreamStop: not for the default stream");
    pthread_mutex_lock(&stream->lock);
    struct sim_task *stopped = code ? NULL : stream->running;
    uint64_t before = stream->finished;
    if (stopped) {
        stopped->stopped = true;
        if (stream->abort_descriptor >= 0)
            eventfd_write(stream->abort_descriptor, 1);
        pthread_cond_broadcast(&stream->work);
        while (stream->running == stopped && stream->finished == before)
            pthread_cond_wait(&stream->done, &stream->lock);
        uint64_t drained;
        if (stream->abort_descriptor >= 0 && !stream->aborted)
            eventfd_read(stream->abort_descriptor, &drained);
    }
    pthread_mutex_unlock(&stream->lock);
    sim_stream_put(stream);
    return code;
}

SIM_API aclError aclrtStreamGetId(aclrtStream handle, int32_t *id)
{
    struct sim_stream *stream;
    if (!id)
        return sim_fail(ACL_INVALID_PARAM, "aclrtStreamGetId: streamId is null");
    int code = enter(__func__, 0, handle, false, &stream);
    if (code)
        return code;
    *id = stream->id;
    sim_stream_put(stream);
    return 0;
}
