/* Numbers by name, for tests: what was called, which fault struck, what is alive. */
#include "simulator.h"

#include <stdlib.h>
#include <string.h>

#define ROOM 1024 /* more names than there are functions, places and kinds of misuse together */

struct counter {
    char *name;
    int64_t value;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct counter counters[ROOM];

/* The counter's place, or the free one where it would stand. */
static struct counter *place(const char *name)
{
    uint32_t hash = 2166136261u;
    for (const char *letter = name; *letter; letter++)
        hash = (hash ^ (unsigned char)*letter) * 16777619u;
    struct counter *found = &counters[hash % ROOM];
    while (found->name && strcmp(found->name, name))
        found = found == &counters[ROOM - 1] ? counters : found + 1;
    return found;
}

void sim_count(const char *name, int64_t more)
{
    pthread_mutex_lock(&lock);
    struct counter *counter = place(name);
    if (!counter->name)
        counter->name = strdup(name);
    counter->value += more;
    pthread_mutex_unlock(&lock);
}

SIM_API uint64_t llmdd_sim_counter(const char *name)
{
    pthread_mutex_lock(&lock);
    struct counter *counter = place(name);
    uint64_t value = counter->name ? (uint64_t)counter->value : 0;
    pthread_mutex_unlock(&lock);
    return value;
}
