/* Codes with a text for each thread, and the report of misuse. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum misuse_mode { ABORT, ERROR, LOG };

static atomic_int mode = ABORT;

static __thread char text[1024];
static __thread bool unread;
static __thread char copy[1024]; /* what was handed out last: it stays until the next reading */
static __thread int last_code;

static atomic_bool is_shared;
static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static char shared_text[1024];
static bool shared_unread;

int sim_misuse_mode(const char *word)
{
    static const char *const words[] = {"abort", "error", "log"};
    for (int i = 0; i < 3; i++)
        if (!strcmp(word, words[i])) {
            atomic_store(&mode, i);
            return 0;
        }
    return -1;
}

static void store(int code, const char *format, va_list arguments)
{
    size_t length = (size_t)snprintf(text, sizeof text, "[%d] ", code);
    vsnprintf(text + length, sizeof text - length, format, arguments);
    unread = true;
    last_code = code;
    if (atomic_load(&is_shared)) {
        pthread_mutex_lock(&shared_lock);
        memcpy(shared_text, text, sizeof shared_text);
        shared_unread = true;
        pthread_mutex_unlock(&shared_lock);
    }
}

/* The process's text into this thread's copy; false if there is none. */
static bool take_shared(void)
{
    pthread_mutex_lock(&shared_lock);
    bool any = shared_unread;
    shared_unread = false;
    memcpy(copy, shared_text, sizeof copy);
    pthread_mutex_unlock(&shared_lock);
    return any;
}

const char *sim_failure_text(void)
{
    return text;
}

void sim_share_failures(bool shared)
{
    atomic_store(&is_shared, shared);
}

int sim_fail(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    store(code, format, arguments);
    va_end(arguments);
    return code;
}

/* One write, so that reports of several threads and processes stay whole. */
static void report(const char *name)
{
    char line[1200];
    int length =
        snprintf(line, sizeof line, "ascend simulator: misuse %s in process %d: %s\n", name, (int)getpid(), text);
    if (length > (int)sizeof line)
        length = sizeof line;
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)length);
    (void)ignored;
}

static int misuse(const char *name, int code, const char *format, va_list arguments)
{
    char counter[64];
    store(code, format, arguments);
    snprintf(counter, sizeof counter, "misuse.%s", name);
    if (!sim_forked()) /* in the child another thread's lock may be held for ever */
        sim_count(counter, 1);
    int now = atomic_load(&mode);
    if (now != ERROR)
        report(name);
    if (now == ABORT)
        abort();
    return now == LOG ? 0 : code;
}

int sim_misuse(const char *name, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int result = misuse(name, code, format, arguments);
    va_end(arguments);
    return result;
}

int sim_refuse(const char *name, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    misuse(name, code, format, arguments);
    va_end(arguments);
    return code;
}

SIM_API const char *aclGetRecentErrMsg(void)
{
    if (atomic_load(&is_shared))
        return take_shared() ? copy : NULL;
    if (!unread)
        return NULL;
    memcpy(copy, text, sizeof copy);
    unread = false;
    return copy;
}

SIM_API aclError aclrtPeekAtLastError(int level)
{
    return level == 0 ? last_code : ACL_PARAM_INVALID;
}

SIM_API aclError aclrtGetLastError(int level)
{
    int code = aclrtPeekAtLastError(level);
    if (level == 0)
        last_code = 0;
    return code;
}
