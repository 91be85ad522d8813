/* Errors on order: LLMDD_SIM_FAULTS is a list, separated by ';', of <where>[#n][%p][@device]=<action>. */
#include "internal.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum what { CODE, DELAY, HANG, DROP, CORRUPT, HALF, KILL, STOP, END_OF_FILE, ASYNC };

#define BIT(what) (1u << (what))
#define ANYWHERE (BIT(CODE) | BIT(DELAY) | BIT(HANG) | BIT(KILL) | BIT(STOP))
#define BYTES (BIT(DROP) | BIT(CORRUPT) | BIT(HALF))
#define LINK (BIT(END_OF_FILE) | BIT(ASYNC))

static const struct {
    const char *name;
    enum what what;
    bool takes_number;
} actions[] = {
    {"code", CODE, true},        {"delay", DELAY, true}, {"hang", HANG, false}, {"drop", DROP, false},
    {"corrupt", CORRUPT, false}, {"half", HALF, false},  {"kill", KILL, false}, {"stop", STOP, false},
    {"eof", END_OF_FILE, false}, {"async", ASYNC, true},
};

static const struct {
    const char *name;
    unsigned allowed;
} points[] = {
    {"exec.copy", ANYWHERE | BYTES},        {"exec.send", ANYWHERE | BYTES | LINK},
    {"exec.recv", ANYWHERE | BYTES | LINK}, {"exec.put", ANYWHERE | BYTES | LINK},
    {"exec.get", ANYWHERE | BYTES | LINK},  {"exec.event", ANYWHERE | BIT(DROP)},
    {"link.meet", ANYWHERE | LINK},         {"link.peer", ANYWHERE | LINK},
};

struct entry {
    char where[64];
    long from, to; /* which occurrences, from 1 */
    double probability;
    int device; /* -1: any */
    enum what what;
    long number;
    long seen;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct entry *entries;
static size_t entry_count;
static atomic_size_t armed; /* entry_count to be read without the lock: nearly always zero */

/* The actions that the place knows; 0 if there is no such place. */
static unsigned allowed_at(const char *where)
{
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        if (!strcmp(where, points[i].name))
            return points[i].allowed;
    return sim_is_function(where) ? ANYWHERE : 0;
}

static const char *parse_where(struct entry *entry, const char *text)
{
    size_t length = strcspn(text, "#%@=");
    if (!length || length >= sizeof entry->where)
        return NULL;
    memcpy(entry->where, text, length);
    entry->where[length] = 0;
    return text + length;
}

/* #n, #n+, %p and @device, each at most once and in any order. */
static const char *parse_when(struct entry *entry, const char *text)
{
    char *end;
    while (*text && *text != '=') {
        char sign = *text++;
        if (sign == '%')
            entry->probability = strtod(text, &end);
        else if (sign == '#')
            entry->from = entry->to = strtol(text, &end, 10);
        else
            entry->device = (int)strtol(text, &end, 10);
        if (end == text || entry->from < 1 || entry->device < -1 ||
            !(entry->probability > 0 && entry->probability <= 1))
            return NULL;
        if (sign == '#' && *end == '+') {
            entry->to = __LONG_MAX__;
            end++;
        }
        text = end;
        if (*text && !strchr("#%@=", *text))
            return NULL;
    }
    return *text == '=' ? text + 1 : NULL;
}

static bool parse_action(struct entry *entry, const char *text)
{
    size_t length = strcspn(text, "(");
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strlen(actions[i].name) != length || strncmp(text, actions[i].name, length))
            continue;
        entry->what = actions[i].what;
        if (!actions[i].takes_number)
            return !text[length];
        int read = 0;
        return sscanf(text + length, "(%ld)%n", &entry->number, &read) == 1 && read && !text[length + (size_t)read] &&
               (entry->number > 0 || (entry->number == 0 && entry->what == DELAY));
    }
    return false;
}

static int parse_entry(struct entry *entry, const char *text)
{
    *entry = (struct entry){.from = 1, .to = __LONG_MAX__, .probability = 1, .device = -1};
    const char *rest = parse_where(entry, text);
    unsigned allowed = rest ? allowed_at(entry->where) : 0;
    if (!allowed)
        return sim_fail(ACL_INVALID_FILE, "LLMDD_SIM_FAULTS: '%s': no such place", text);
    rest = parse_when(entry, rest);
    if (!rest || !parse_action(entry, rest))
        return sim_fail(ACL_INVALID_FILE, "LLMDD_SIM_FAULTS: '%s' is not <where>[#n][%%p][@device]=<action>", text);
    if (!(allowed & BIT(entry->what)))
        return sim_fail(ACL_INVALID_FILE, "LLMDD_SIM_FAULTS: '%s': this place has no such action", text);
    return 0;
}

int sim_faults_parse(const char *text)
{
    size_t most = 1, count = 0;
    for (const char *letter = text; *letter; letter++)
        most += *letter == ';';
    char *words = strdup(text), *place = words;
    struct entry *fresh = calloc(most, sizeof *fresh);
    int code = words && fresh ? 0 : sim_fail(ACL_BAD_ALLOC, "LLMDD_SIM_FAULTS: no memory");
    for (char *word; !code && (word = strsep(&place, ";"));)
        if (word[strspn(word, " \n")])
            code = parse_entry(&fresh[count++], word + strspn(word, " \n"));
    free(words);
    if (code) {
        free(fresh);
        return code;
    }
    pthread_mutex_lock(&lock);
    struct entry *old = entries;
    entries = fresh;
    entry_count = count;
    atomic_store(&armed, count);
    pthread_mutex_unlock(&lock);
    free(old);
    return 0;
}

/* Counts the occurrence at every entry it fits; the first one that strikes wins. */
static bool strikes(const char *where, int device, struct entry *found)
{
    bool struck = false;
    if (!atomic_load(&armed))
        return false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < entry_count; i++) {
        struct entry *entry = &entries[i];
        if (strcmp(entry->where, where) || (entry->device >= 0 && entry->device != device))
            continue;
        entry->seen++;
        if (struck || entry->seen < entry->from || entry->seen > entry->to)
            continue;
        if (entry->probability < 1 && (double)(sim_random() >> 11) * 0x1p-53 >= entry->probability)
            continue;
        *found = *entry;
        struck = true;
    }
    pthread_mutex_unlock(&lock);
    if (struck) {
        char counter[80];
        snprintf(counter, sizeof counter, "fault.%s", where);
        sim_count(counter, 1);
    }
    return struck;
}

static void rest(uint64_t until)
{
    struct timespec time = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL))
        ;
}

static struct sim_fault wait_in_task(struct sim_task *task, uint64_t until)
{
    while (!sim_task_released(task) && sim_now() < until)
        sim_task_wait(task, until);
    if (sim_task_released(task))
        return (struct sim_fault){SIM_CODE, ACL_STREAM_ABORT};
    return (struct sim_fault){SIM_NONE, 0};
}

static struct sim_fault hang_in_call(bool (*ended)(void *about), void *about)
{
    while (!sim_ending()) {
        if (ended && ended(about))
            return (struct sim_fault){SIM_CODE, ACL_STREAM_ABORT};
        rest(sim_now() + 1000000);
    }
    return (struct sim_fault){SIM_CODE, ACL_INTERNAL_ERROR};
}

struct sim_fault sim_fault(const char *where, int device, struct sim_task *task, bool (*ended)(void *about),
                           void *about)
{
    struct entry entry = {.what = CODE};
    if (!strikes(where, device, &entry))
        return (struct sim_fault){SIM_NONE, 0};
    uint64_t until = sim_now() + (uint64_t)entry.number * 1000000;
    switch (entry.what) {
    case CODE:
        return (struct sim_fault){SIM_CODE, (int)entry.number};
    case DELAY:
        if (task)
            return wait_in_task(task, until);
        rest(until);
        break;
    case HANG:
        return task ? wait_in_task(task, UINT64_MAX) : hang_in_call(ended, about);
    case DROP:
        return (struct sim_fault){SIM_DROP, 0};
    case CORRUPT:
        return (struct sim_fault){SIM_CORRUPT, 0};
    case HALF:
        return (struct sim_fault){SIM_HALF, ACL_SUSPECT_REMOTE_ERROR};
    case END_OF_FILE:
        return (struct sim_fault){SIM_EOF, 0};
    case ASYNC:
        return (struct sim_fault){SIM_ASYNC, (int)entry.number};
    case KILL:
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    case STOP:
        kill(getpid(), SIGSTOP);
    }
    return (struct sim_fault){SIM_NONE, 0};
}

int sim_fault_at_call(const char *function, int device)
{
    struct sim_fault fault = sim_fault(function, device, NULL, NULL, NULL);
    return fault.action == SIM_CODE ? sim_fail(fault.code, "%s: ordered by LLMDD_SIM_FAULTS", function) : 0;
}
