/* Contexts: what a thread's calls belong to. Those that ended stay as empty shells, so that a thread which still names
   one can be told so. */
#include "internal.h"

#include <stdlib.h>

struct sim_context {
    struct sim_object object;
    struct sim_device *device;
    struct sim_stream *default_stream;
    bool is_default;
    atomic_bool alive;
    struct sim_context *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_context *all;
static __thread struct sim_context *current;

static void keep(struct sim_object *object)
{
    (void)object; /* a shell costs less than the care that freeing it would need */
}

struct sim_context *sim_context_make(struct sim_device *device, bool is_default)
{
    struct sim_context *context = calloc(1, sizeof *context);
    if (!context)
        return NULL;
    context->device = device;
    context->is_default = is_default;
    if (!sim_handle_make(&context->object, SIM_CONTEXT_HANDLE, keep) ||
        sim_stream_make(context, 0, true, &context->default_stream)) {
        sim_handle_close(context->object.handle);
        free(context);
        return NULL;
    }
    atomic_store(&context->alive, true);
    pthread_mutex_lock(&lock);
    context->next = all;
    all = context;
    pthread_mutex_unlock(&lock);
    return context;
}

bool sim_context_alive(struct sim_context *context)
{
    return context && atomic_load(&context->alive);
}

static void end(struct sim_context *context)
{
    if (!atomic_exchange(&context->alive, false))
        return;
    sim_handle_close(context->object.handle);
    sim_streams_end(context);
}

/* The first context of the device that is alive, or NULL. */
static struct sim_context *first_alive(const struct sim_device *device, bool explicit_only, size_t *count)
{
    struct sim_context *found = NULL;
    pthread_mutex_lock(&lock);
    for (struct sim_context *context = all; context; context = context->next)
        if (context->device == device && atomic_load(&context->alive) && !(explicit_only && context->is_default)) {
            found = context;
            if (count)
                ++*count;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

size_t sim_contexts_alive(const struct sim_device *device)
{
    size_t count = 0;
    first_alive(device, true, &count);
    return count;
}

void sim_contexts_end(const struct sim_device *device)
{
    for (struct sim_context *context; (context = first_alive(device, false, NULL));)
        end(context);
}

struct sim_context *sim_current_context(void)
{
    return sim_context_alive(current) ? current : NULL;
}

struct sim_device *sim_context_device(struct sim_context *context)
{
    return context->device;
}

struct sim_stream *sim_context_default_stream(struct sim_context *context)
{
    return context->default_stream;
}

void sim_bind_thread(struct sim_context *context)
{
    current = context;
}

SIM_API aclError aclrtCreateContext(aclrtContext *context, int32_t id)
{
    int code = sim_enter(__func__, SIM_BLOCKS, NULL);
    if (code)
        return code;
    if (!context)
        return sim_fail(ACL_INVALID_PARAM, "aclrtCreateContext: context is null");
    struct sim_device *device = sim_device(id);
    if (!device)
        return sim_fail(ACL_INVALID_DEVICEID, "aclrtCreateContext: deviceId %d: there are %d visible devices", id,
                        sim_device_count());
    code = sim_device_prepare(device);
    if (code)
        return code;
    struct sim_context *made = sim_context_make(device, false);
    if (!made)
        return sim_fail(ACL_BAD_ALLOC, "aclrtCreateContext: no memory");
    sim_bind_thread(made);
    *context = made->object.handle;
    return 0;
}

static struct sim_context *find(const char *function, aclrtContext handle, int *code)
{
    struct sim_context *context = (struct sim_context *)sim_handle_get(handle, SIM_CONTEXT_HANDLE);
    if (!context)
        *code = sim_refuse(sim_handle_closed(handle, SIM_CONTEXT_HANDLE) ? "use_after_free" : "wrong_device",
                           ACL_PARAM_INVALID, "%s: %p is no context%s", function, handle,
                           sim_handle_closed(handle, SIM_CONTEXT_HANDLE) ? " any more: it was destroyed" : "");
    return context;
}

SIM_API aclError aclrtDestroyContext(aclrtContext handle)
{
    int code = sim_enter(__func__, SIM_BLOCKS, NULL);
    if (code)
        return code;
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "aclrtDestroyContext: context is null");
    struct sim_context *context = find(__func__, handle, &code);
    if (!context)
        return code;
    if (context->is_default)
        return sim_fail(ACL_PARAM_INVALID,
                        "aclrtDestroyContext: the default context of device %d ends with aclrtResetDevice",
                        context->device->id);
    size_t streams = sim_context_streams_alive(context);
    if (streams)
        code =
            sim_misuse("leak", ACL_PARAM_INVALID, "aclrtDestroyContext: %zu streams of the context are left", streams);
    if (current == context)
        current = NULL;
    end(context);
    return code;
}

SIM_API aclError aclrtSetCurrentContext(aclrtContext handle)
{
    int code = sim_enter(__func__, 0, NULL);
    if (code)
        return code;
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "aclrtSetCurrentContext: context is null");
    struct sim_context *context = find(__func__, handle, &code);
    if (context)
        sim_bind_thread(context);
    return code;
}

SIM_API aclError aclrtGetCurrentContext(aclrtContext *handle)
{
    struct sim_context *context;
    int code = sim_enter(__func__, 0, &context);
    if (code)
        return code;
    if (!handle)
        return sim_fail(ACL_INVALID_PARAM, "aclrtGetCurrentContext: context is null");
    if (!context) /* no misuse: this is how one asks */
        return sim_fail(ACL_CONTEXT_NULL, "aclrtGetCurrentContext: this thread has no context");
    *handle = context->object.handle;
    return 0;
}

SIM_API aclError aclrtCtxGetCurrentDefaultStream(aclrtStream *stream)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!stream)
        return sim_fail(ACL_INVALID_PARAM, "aclrtCtxGetCurrentDefaultStream: stream is null");
    *stream = sim_stream_handle(context->default_stream);
    return 0;
}
