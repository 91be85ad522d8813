/* What tests look at without a stream: memory of devices, and whether anything is queued. */
#include "internal.h"

/* Byte by byte and unseen by ThreadSanitizer: a look that obeys no stream is a race by intention. */
__attribute__((no_sanitize("thread"))) static void move_unordered(volatile unsigned char *to,
                                                                  const volatile unsigned char *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        to[i] = from[i];
}

static int access_memory(const char *function, void *address, void *host, size_t size, bool write)
{
    struct sim_view view;
    int code = sim_enter(function, 0, NULL);
    if (!code)
        code = sim_view_open(function, address, size, &view);
    if (code)
        return code;
    if (view.where == SIM_PAGEABLE)
        return sim_fail(ACL_PARAM_INVALID, "%s: %p is no device memory", function, address);
    move_unordered(write ? view.bytes : host, write ? host : view.bytes, size);
    sim_view_close(&view);
    return 0;
}

SIM_API int llmdd_sim_read(void *address, void *host, size_t size)
{
    return access_memory(__func__, address, host, size, false);
}

SIM_API int llmdd_sim_write(void *address, const void *host, size_t size)
{
    return access_memory(__func__, address, (void *)(uintptr_t)host, size, true);
}

SIM_API int llmdd_sim_idle(int timeout)
{
    return sim_streams_idle(sim_deadline(timeout)) ? 0 : ACL_STREAM_SYNC_TIMEOUT;
}
