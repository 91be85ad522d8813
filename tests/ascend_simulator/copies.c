/* Copies and fills: what hardware demands of their arguments, and bytes that move in pieces. */
#include "internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define COPY_ALIGNMENT 64

struct copy_task {
    struct sim_task task; /* uses[0]: destination, uses[1]: source */
    int value;            /* of a fill */
};

/* ---- moving bytes ---- */

static int look(struct sim_task *task, const struct sim_copy *copy)
{
    if (task && sim_task_aborted(task))
        return ACL_STREAM_ABORT;
    return copy->check ? copy->check(copy->about) : 0;
}

int sim_copy_pieces(struct sim_task *task, const struct sim_copy *copy, struct sim_fault fault)
{
    if (fault.action == SIM_CODE)
        return sim_fail(fault.code, "ordered by LLMDD_SIM_FAULTS");
    size_t piece = (size_t)sim_knob(SIM_PIECE_KIB) * KIB, size = fault.action == SIM_HALF ? copy->size / 2 : copy->size;
    int code = look(task, copy);
    for (size_t done = 0; done < size && !code && fault.action != SIM_DROP; done += piece) {
        size_t count = size - done < piece ? size - done : piece;
        memmove(copy->to + done, copy->from + done, count);
        if (done + count < size)
            sched_yield(); /* somebody else may come in between; on a busy machine that costs milliseconds */
        code = look(task, copy);
    }
    if (!code && fault.action == SIM_HALF)
        return sim_fail(fault.code, "half of it was copied, as ordered by LLMDD_SIM_FAULTS");
    if (!code && fault.action == SIM_CORRUPT && size)
        copy->to[sim_random_below(size)] ^= 0x5a;
    return code;
}

static int check_uses(void *about)
{
    struct sim_task *task = about;
    int code = 0;
    for (size_t i = 0; i < task->use_count && !code; i++)
        code = sim_view_check(task->what, &task->uses[i].view);
    return code;
}

/* `within`: the task itself on a stream, NULL for a copy on the caller's thread. */
static int move(struct sim_task *task, struct sim_task *within, int device)
{
    struct sim_copy copy = {task->uses[0].view.bytes, task->uses[1].view.bytes, task->uses[0].view.size, check_uses,
                            task};
    return sim_copy_pieces(within, &copy, sim_fault("exec.copy", device, within, NULL, NULL));
}

static int run_copy(struct sim_task *task)
{
    return move(task, task, sim_stream_device(task->stream)->id);
}

static int fill(struct sim_task *task, struct sim_task *within, int value)
{
    struct sim_view *view = &task->uses[0].view;
    size_t piece = (size_t)sim_knob(SIM_PIECE_KIB) * KIB;
    int code = check_uses(task);
    for (size_t done = 0; done < view->size && !code; done += piece) {
        size_t rest = view->size - done;
        memset(view->bytes + done, value, rest < piece ? rest : piece);
        if (piece < rest)
            sched_yield();
        code = within && sim_task_aborted(within) ? ACL_STREAM_ABORT : check_uses(task);
    }
    return code;
}

static int run_fill(struct sim_task *task)
{
    return fill(task, task, ((struct copy_task *)task)->value);
}

static void end_copy(struct sim_task *task, int code)
{
    (void)code;
    free(task);
}

/* ---- what hardware demands ---- */

static bool on_device(const struct sim_view *view)
{
    return view->where == SIM_DEVICE || view->where == SIM_IMPORTED;
}

static const char *side(const struct sim_view *view)
{
    return on_device(view) ? "device" : "host";
}

static int check_kind(const char *function, const struct sim_view *to, const struct sim_view *from, int kind)
{
    int real = (on_device(from) ? 2 : 0) | (on_device(to) ? 1 : 0); /* the first four kinds in their order */
    if (kind == ACL_DEFAULT || kind == real)
        return 0;
    return sim_misuse("wrong_kind", ACL_PARAM_INVALID, "%s: kind %d, but the copy goes from %s to %s", function, kind,
                      side(from), side(to));
}

static int check_overlap(const char *function, const struct sim_view *to, const struct sim_view *from)
{
    uintptr_t one = (uintptr_t)to->address, other = (uintptr_t)from->address;
    if (one >= other + from->size || other >= one + to->size)
        return 0;
    return sim_misuse("overlap_copy", ACL_PARAM_INVALID, "%s: %zu bytes at %p and at %p overlap", function, to->size,
                      to->address, from->address);
}

/* Imported from another device, memory serves asynchronous copies between devices and nothing else. */
static int check_import(const char *function, const struct sim_view *one, const struct sim_view *other, int kind,
                        bool at_once)
{
    if (one->where != SIM_IMPORTED || one->range->physical == one->device->physical)
        return 0;
    const char *what = at_once ? "a synchronous copy" : kind == ACL_DEFAULT ? "a copy of kind default" : NULL;
    if (!on_device(other))
        what = "a copy between host and device";
    return what ? sim_refuse("wrong_kind", ACL_PARAM_INVALID,
                             "%s: %p was imported from another device and does not serve %s", function, one->address,
                             what)
                : 0;
}

/* May `own`, which carries the copy out, reach the memory? */
static int check_device(const char *function, const struct sim_view *view, const struct sim_view *other,
                        struct sim_device *own)
{
    char text[160];
    if (!on_device(view) || view->device == own)
        return 0;
    if (!on_device(other) || view->where == SIM_IMPORTED)
        return sim_refuse("wrong_device", ACL_PARAM_INVALID, "%s: %s, but the current device is %d", function,
                          sim_range_words(view->range, text, sizeof text), own->id);
    if (sim_peer_enabled(own, view->device))
        return 0;
    return sim_refuse("wrong_device", ACL_PARAM_INVALID, "%s: %s: access to this peer is not enabled on device %d",
                      function, sim_range_words(view->range, text, sizeof text), own->id);
}

static int check_places(const char *function, const struct sim_view *to, const struct sim_view *from, int kind,
                        bool at_once, struct sim_device *own)
{
    int code = check_kind(function, to, from, kind);
    if (!code)
        code = check_overlap(function, to, from);
    if (!code)
        code = check_import(function, to, from, kind, at_once);
    if (!code)
        code = check_import(function, from, to, kind, at_once);
    if (!code)
        code = check_device(function, to, from, own);
    return code ? code : check_device(function, from, to, own);
}

/* Before places are looked at; `nothing` says that there is nothing to do. */
static int check_sizes(const char *function, const void *to, size_t most, const void *from, size_t count, int kind,
                       bool *nothing)
{
    *nothing = count == 0 || to == from;
    if (kind < ACL_HOST_TO_HOST || kind > ACL_DEFAULT)
        return sim_fail(ACL_INVALID_PARAM, "%s: kind %d", function, kind);
    if (*nothing)
        return 0;
    if (!to || !from)
        return sim_fail(ACL_INVALID_PARAM, "%s: %s is null", function, to ? "src" : "dst");
    if (count > most)
        return sim_fail(ACL_PARAM_INVALID, "%s: count %zu is larger than destMax %zu", function, count, most);
    return 0;
}

/* ---- making tasks ---- */

static void discard(struct copy_task *task)
{
    if (!task)
        return;
    for (size_t i = 0; i < task->task.use_count; i++)
        sim_view_close(&task->task.uses[i].view);
    free(task->task.uses);
    free(task);
}

/* With both places found and held; NULL with a code. */
static struct copy_task *make_copy(const char *function, void *to, const void *from, size_t count, int *code)
{
    struct copy_task *task = calloc(1, sizeof *task);
    struct sim_use *uses = calloc(2, sizeof *uses);
    if (!task || !uses) {
        free(task);
        free(uses);
        *code = sim_fail(ACL_BAD_ALLOC, "%s: no host memory", function);
        return NULL;
    }
    task->task =
        (struct sim_task){.what = function, .run = run_copy, .end = end_copy, .uses = uses, .use_count = from ? 2 : 1};
    uses[0].writes = true;
    *code = sim_view_open(function, to, count, &uses[0].view);
    if (!*code && from)
        *code = sim_view_open(function, from, count, &uses[1].view);
    if (*code) {
        discard(task);
        return NULL;
    }
    return task;
}

/* A place that a queued task still writes: the synchronise is missing. */
static int check_busy(const char *function, const struct sim_task *task)
{
    for (size_t i = 0; i < task->use_count; i++) {
        const struct sim_view *view = &task->uses[i].view;
        const char *writer = sim_written_by(view->address, view->size);
        int code = writer ? sim_misuse("busy_buffer_read", ACL_PARAM_INVALID,
                                       "%s: %zu bytes at %p are still written by a queued %s", function, view->size,
                                       view->address, writer)
                          : 0;
        if (code)
            return code;
    }
    return 0;
}

/* ---- what the program calls ---- */

SIM_API aclError aclrtMemcpy(void *to, size_t most, const void *from, size_t count, int kind)
{
    struct sim_context *context;
    bool nothing;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT | SIM_BLOCKS, &context);
    if (!code)
        code = check_sizes(__func__, to, most, from, count, kind, &nothing);
    if (code || nothing)
        return code;
    struct sim_device *own = sim_context_device(context);
    struct copy_task *task = make_copy(__func__, to, from, count, &code);
    if (!task)
        return code;
    code = check_places(__func__, &task->task.uses[0].view, &task->task.uses[1].view, kind, true, own);
    if (!code)
        code = check_busy(__func__, &task->task);
    if (code) {
        discard(task);
        return code;
    }
    sim_uses_begin(&task->task);
    code = move(&task->task, NULL, own->id);
    sim_uses_end(&task->task);
    discard(task);
    return code;
}

/* With pageable host memory the call waits for the stream and then copies itself. */
static int copy_pageable(const char *function, struct copy_task *task, struct sim_stream *stream)
{
    int code = sim_blocks(function);
    if (!code)
        code = sim_stream_drain(function, stream, UINT64_MAX);
    if (!code) {
        sim_uses_begin(&task->task);
        code = move(&task->task, NULL, sim_stream_device(stream)->id);
        sim_uses_end(&task->task);
    }
    discard(task);
    return code;
}

static int copy_on_stream(const char *function, struct copy_task *task, struct sim_stream *stream, int kind)
{
    const struct sim_view *to = &task->task.uses[0].view, *from = &task->task.uses[1].view;
    int code = check_places(function, to, from, kind, false, sim_stream_device(stream));
    bool both = on_device(to) && on_device(from);
    if (!code && both && ((uintptr_t)to->address | (uintptr_t)from->address) % COPY_ALIGNMENT)
        code = sim_misuse("unaligned", ACL_PARAM_INVALID,
                          "%s: from %p to %p: between devices both must be multiples of 64", function, from->address,
                          to->address);
    if (!code && to->where == SIM_PINNED && from->where == SIM_PINNED)
        code = sim_fail(ACL_FEATURE_NOT_SUPPORT, "%s: both sides are pinned host memory", function);
    if (code) {
        discard(task);
        return code;
    }
    if (to->where == SIM_PAGEABLE || from->where == SIM_PAGEABLE)
        return copy_pageable(function, task, stream);
    return sim_enqueue(stream, &task->task);
}

SIM_API aclError aclrtMemcpyAsync(void *to, size_t most, const void *from, size_t count, int kind, aclrtStream handle)
{
    struct sim_context *context;
    struct sim_stream *stream;
    bool nothing;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (!code)
        code = sim_stream_get(__func__, handle, context, &stream);
    if (code)
        return code;
    code = check_sizes(__func__, to, most, from, count, kind, &nothing);
    struct copy_task *task = code || nothing ? NULL : make_copy(__func__, to, from, count, &code);
    if (task)
        code = copy_on_stream(__func__, task, stream, kind);
    sim_stream_put(stream);
    return code;
}

/* Common to both fills: `nothing` or the task. */
static struct copy_task *make_fill(const char *function, void *to, size_t most, int value, size_t count,
                                   struct sim_device *own, int *code)
{
    if (!to)
        *code = sim_fail(ACL_INVALID_PARAM, "%s: devPtr is null", function);
    else if (count > most)
        *code = sim_fail(ACL_PARAM_INVALID, "%s: count %zu is larger than maxCount %zu", function, count, most);
    struct copy_task *task = *code || !count ? NULL : make_copy(function, to, NULL, count, code);
    if (!task)
        return NULL;
    task->value = value;
    task->task.run = run_fill;
    *code = check_device(function, &task->task.uses[0].view, &(struct sim_view){.where = SIM_PAGEABLE}, own);
    if (!*code)
        return task;
    discard(task);
    return NULL;
}

SIM_API aclError aclrtMemset(void *to, size_t most, int32_t value, size_t count)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT | SIM_BLOCKS, &context);
    if (code)
        return code;
    struct copy_task *task = make_fill(__func__, to, most, value, count, sim_context_device(context), &code);
    if (!task)
        return code;
    code = check_busy(__func__, &task->task);
    if (!code) {
        sim_uses_begin(&task->task);
        code = fill(&task->task, NULL, value);
        sim_uses_end(&task->task);
    }
    discard(task);
    return code;
}

SIM_API aclError aclrtMemsetAsync(void *to, size_t most, int32_t value, size_t count, aclrtStream handle)
{
    struct sim_context *context;
    struct sim_stream *stream;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (!code)
        code = sim_stream_get(__func__, handle, context, &stream);
    if (code)
        return code;
    struct copy_task *task = make_fill(__func__, to, most, value, count, sim_stream_device(stream), &code);
    if (task)
        code = sim_enqueue(stream, &task->task);
    sim_stream_put(stream);
    return code;
}
