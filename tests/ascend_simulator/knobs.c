/* Everything that can be set from outside: LLMDD_SIM_*, and the visible devices of the vendor's own variable. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

#define PREFIX "LLMDD_SIM_"
#define TEXT_ROOM 512

struct number_knob {
    const char *name;
    long least, most, usual;
    bool fixed; /* read at aclInit and not changed afterwards */
    atomic_long value;
};

struct text_knob {
    const char *name;
    const char *usual;
    bool fixed;
    char value[TEXT_ROOM];
};

static struct number_knob numbers[SIM_NUMBER_KNOBS] = {
    [SIM_DEVICES] = {"DEVICES", 0, SIM_MAX_DEVICES, 8, true, 0},
    [SIM_HBM_MIB] = {"HBM_MIB", 1, 65536, 1024, true, 0},
    [SIM_SEED] = {"SEED", 0, 0x7fffffffffffffff, 1, true, 0},
    [SIM_HOST_VISIBLE] = {"HOST_VISIBLE", 0, 1, 0, true, 0},
    [SIM_HUGE_OFFSET] = {"HUGE_OFFSET", 0, 1 << 20, 0, false, 0},
    [SIM_QUARANTINE_MIB] = {"QUARANTINE_MIB", 0, 65536, 64, true, 0},
    [SIM_MIN_DELAY_US] = {"MIN_DELAY_US", 0, 60000000, 50, false, 0},
    [SIM_JITTER_US] = {"JITTER_US", 0, 60000000, 0, false, 0},
    [SIM_PIECE_KIB] = {"PIECE_KIB", 1, 1 << 20, 256, false, 0},
    [SIM_EVENTS] = {"EVENTS", 0, 1 << 20, 65536, false, 0},
    [SIM_STREAMS] = {"STREAMS", 0, 1 << 20, 1984, false, 0},
    [SIM_DEAD_PEER_CODE] = {"DEAD_PEER_CODE", 1, 999999, ACL_SUSPECT_REMOTE_ERROR, false, 0},
    [SIM_SETDEVICE_MS] = {"SETDEVICE_MS", 0, 60000, 20, false, 0},
    [SIM_SERVER] = {"SERVER", 0, 255, 0, true, 0},
};

static struct text_knob texts[SIM_TEXT_KNOBS] = {
    [SIM_WORLD] = {"WORLD", "", true, ""},         [SIM_SOC] = {"SOC", "Ascend910B3", true, ""},
    [SIM_HCCS] = {"HCCS", "all", false, ""},       [SIM_LINK] = {"LINK", "hccs", false, ""},
    [SIM_HCCN_CONF] = {"HCCN_CONF", "", true, ""},
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double time_scale; /* under the lock */

long sim_knob(enum sim_knob knob)
{
    return atomic_load_explicit(&numbers[knob].value, memory_order_relaxed);
}

double sim_time_scale(void)
{
    pthread_mutex_lock(&lock);
    double scale = time_scale;
    pthread_mutex_unlock(&lock);
    return scale;
}

void sim_knob_text(enum sim_text_knob knob, char *text, size_t room)
{
    pthread_mutex_lock(&lock);
    snprintf(text, room, "%s", texts[knob].value);
    pthread_mutex_unlock(&lock);
}

bool sim_is_a3(void)
{
    char soc[TEXT_ROOM];
    sim_knob_text(SIM_SOC, soc, sizeof soc);
    return !strncmp(soc, "Ascend910_93", 12);
}

static int set_number(struct number_knob *knob, const char *text)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < knob->least || value > knob->most ||
        (knob == &numbers[SIM_HUGE_OFFSET] && value % 64)) /* addresses are multiples of 64 in any case */
        return sim_fail(ACL_INVALID_FILE, PREFIX "%s='%s': not a number between %ld and %ld", knob->name, text,
                        knob->least, knob->most);
    atomic_store(&knob->value, value);
    return 0;
}

/* "all", "none", or "0-1,2-3". */
static bool are_pairs(const char *text)
{
    if (!strcmp(text, "all") || !strcmp(text, "none"))
        return true;
    for (;;) {
        int one, other, read = 0;
        if (sscanf(text, "%d-%d%n", &one, &other, &read) != 2 || one < 0 || other < 0 || one == other)
            return false;
        text += read;
        if (!*text)
            return true;
        if (*text++ != ',')
            return false;
    }
}

/* The world becomes a part of socket names, whose length is limited. */
static bool is_world(const char *text)
{
    return strlen(text) <= 32 &&
           strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == strlen(text);
}

static int set_text(enum sim_text_knob which, const char *text)
{
    bool fits = strlen(text) < TEXT_ROOM;
    if (which == SIM_HCCS)
        fits = fits && are_pairs(text);
    else if (which == SIM_LINK)
        fits = !strcmp(text, "hccs") || !strcmp(text, "roce");
    else if (which == SIM_WORLD)
        fits = is_world(text);
    else if (which == SIM_SOC)
        fits = fits && *text;
    if (!fits)
        return sim_fail(ACL_INVALID_FILE, PREFIX "%s='%s' is not what this knob takes", texts[which].name, text);
    pthread_mutex_lock(&lock);
    snprintf(texts[which].value, TEXT_ROOM, "%s", text);
    pthread_mutex_unlock(&lock);
    return 0;
}

static int set_time_scale(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value > 0 && value <= 1000))
        return sim_fail(ACL_INVALID_FILE, PREFIX "TIME_SCALE='%s': not a number above 0 and up to 1000", text);
    pthread_mutex_lock(&lock);
    time_scale = value;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* `name` without the prefix. `later`: after aclInit, when fixed knobs do not move any more. */
static int set(const char *name, const char *text, bool later)
{
    for (int i = 0; i < SIM_NUMBER_KNOBS; i++)
        if (!strcmp(name, numbers[i].name)) {
            if (later && numbers[i].fixed)
                return sim_fail(ACL_PARAM_INVALID, PREFIX "%s is read by aclInit only", name);
            return set_number(&numbers[i], text);
        }
    for (int i = 0; i < SIM_TEXT_KNOBS; i++)
        if (!strcmp(name, texts[i].name)) {
            if (later && texts[i].fixed)
                return sim_fail(ACL_PARAM_INVALID, PREFIX "%s is read by aclInit only", name);
            return set_text((enum sim_text_knob)i, text);
        }
    if (!strcmp(name, "TIME_SCALE"))
        return set_time_scale(text);
    if (!strcmp(name, "FAULTS"))
        return sim_faults_parse(text);
    if (!strcmp(name, "MISUSE"))
        return sim_misuse_mode(text) ? sim_fail(ACL_INVALID_FILE, PREFIX "MISUSE='%s': not abort, error or log", text)
                                     : 0;
    return sim_fail(ACL_INVALID_FILE, PREFIX "%s: no such knob", name);
}

static int set_usual(void)
{
    int code = set_time_scale("0.01");
    for (int i = 0; i < SIM_NUMBER_KNOBS; i++)
        atomic_store(&numbers[i].value, numbers[i].usual);
    for (int i = 0; i < SIM_TEXT_KNOBS && !code; i++)
        code = set_text((enum sim_text_knob)i, texts[i].usual);
    sim_misuse_mode("abort");
    return code ? code : sim_faults_parse("");
}

int sim_knobs_load(void)
{
    int code = set_usual();
    for (char **variable = environ; *variable && !code; variable++) {
        if (strncmp(*variable, PREFIX, strlen(PREFIX)))
            continue;
        const char *equals = strchr(*variable, '=');
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)(equals - *variable - (long)strlen(PREFIX)),
                 *variable + strlen(PREFIX));
        code = set(name, equals + 1, false);
    }
    return code;
}

SIM_API int llmdd_sim_set(const char *knob, const char *value)
{
    if (!sim_running())
        return sim_fail(ACL_UNINITIALIZE,
                        "llmdd_sim_set: aclInit was not called, which reads all knobs from the environment");
    if (!knob || !value)
        return sim_fail(ACL_INVALID_PARAM, "llmdd_sim_set: null");
    return set(strncmp(knob, PREFIX, strlen(PREFIX)) ? knob : knob + strlen(PREFIX), value, true);
}

/* One id of the list at *text, which is advanced behind it and its comma; -1 at the first entry that is none. */
static long next_visible(const char **text)
{
    size_t digits = strspn(*text, "0123456789");
    if (!digits || digits > 6 || ((*text)[digits] && (*text)[digits] != ','))
        return -1;
    long id = strtol(*text, NULL, 10);
    *text += digits + ((*text)[digits] == ',');
    return id;
}

size_t sim_visible_devices(int *physical, size_t room)
{
    long all = sim_knob(SIM_DEVICES), last = -1;
    size_t count = 0;
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!list) {
        for (; count < room && (long)count < all; count++)
            physical[count] = (int)count;
        return count;
    }
    while (*list && count < room) {
        long id = next_visible(&list);
        if (id <= last || id >= all)
            break; /* the first bad entry ends the list; out of order is bad */
        physical[count++] = (int)(last = id);
    }
    return count;
}
