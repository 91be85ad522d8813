/* All memory the simulator knows, sorted by address: what is alive, and for a while what was. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REMEMBERED 4096

struct past { /* a range that was freed */
    uintptr_t address;
    size_t size;
    uint64_t number;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_range **table;
static size_t used, room;
static uint64_t made;
static struct past pasts[REMEMBERED];
static size_t past_next;

/* Index of the first range that ends behind the address. Under the lock. */
static size_t position(uintptr_t address)
{
    size_t low = 0, high = used;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table[middle]->address + table[middle]->size <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static const char *counter_of(const struct sim_range *range)
{
    return range->where == SIM_DEVICE     ? "live.allocations"
           : range->where == SIM_IMPORTED ? "live.imports"
                                          : "live.host";
}

int sim_range_add(struct sim_range *range)
{
    int code = 0;
    pthread_mutex_lock(&lock);
    if (used == room) {
        size_t more = room ? 2 * room : 256;
        struct sim_range **larger = realloc(table, more * sizeof(*larger));
        if (larger) {
            table = larger;
            room = more;
        } else {
            code = ACL_BAD_ALLOC;
        }
    }
    if (!code) {
        size_t place = position(range->address);
        memmove(table + place + 1, table + place, (used++ - place) * sizeof(*table));
        table[place] = range;
        range->number = ++made;
        atomic_store(&range->holders, 1);
        atomic_store(&range->state, SIM_LIVE);
    }
    pthread_mutex_unlock(&lock);
    if (!code)
        sim_count(counter_of(range), 1);
    return code ? sim_fail(code, "no host memory for the table of ranges") : 0;
}

struct sim_range *sim_range_find(const void *address)
{
    struct sim_range *found = NULL;
    pthread_mutex_lock(&lock);
    size_t place = position((uintptr_t)address);
    if (place < used && table[place]->address <= (uintptr_t)address) {
        found = table[place];
        atomic_fetch_add(&found->holders, 1);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* Under the lock. */
static void take(size_t place)
{
    struct sim_range *range = table[place];
    memmove(table + place, table + place + 1, (--used - place) * sizeof(*table));
    atomic_store(&range->state, SIM_FREED);
    pasts[past_next++ % REMEMBERED] = (struct past){range->address, range->size, range->number};
}

bool sim_range_take(struct sim_range *range)
{
    bool taken = false;
    pthread_mutex_lock(&lock);
    size_t place = position(range->address);
    if (place < used && table[place] == range) {
        take(place);
        taken = true;
    }
    pthread_mutex_unlock(&lock);
    if (taken)
        sim_count(counter_of(range), -1);
    return taken;
}

static bool belongs(const struct sim_range *range, const struct sim_device *device)
{
    return device ? range->device == device : range->where == SIM_PINNED;
}

struct sim_range *sim_range_take_any(const struct sim_device *device)
{
    struct sim_range *taken = NULL;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < used && !taken; i++)
        if (belongs(table[i], device)) {
            taken = table[i];
            take(i);
        }
    pthread_mutex_unlock(&lock);
    if (taken)
        sim_count(counter_of(taken), -1);
    return taken;
}

size_t sim_ranges_alive(const struct sim_device *device)
{
    size_t count = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < used; i++)
        count += belongs(table[i], device);
    pthread_mutex_unlock(&lock);
    return count;
}

void sim_range_put(struct sim_range *range)
{
    if (atomic_fetch_sub(&range->holders, 1) == 1)
        range->free(range);
}

static void words(char *text, size_t length, uint64_t number, uintptr_t address, size_t size, int device,
                  enum sim_where where)
{
    static const char *const kinds[] = {"memory", "pinned host memory", "allocation", "import"};
    int written = snprintf(text, length, "%s %lu (%zu bytes at %#lx", kinds[where], (unsigned long)number, size,
                           (unsigned long)address);
    if (written > 0 && (size_t)written < length)
        snprintf(text + written, length - (size_t)written, device < 0 ? ")" : ", device %d)", device);
}

const char *sim_range_words(const struct sim_range *range, char *text, size_t length)
{
    words(text, length, range->number, range->address, range->size, range->device ? range->device->id : -1,
          range->where);
    return text;
}

bool sim_range_was(const void *address, char *text, size_t length, bool *at_begin)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < REMEMBERED && i < past_next && !found; i++) {
        const struct past *past = &pasts[(past_next - 1 - i) % REMEMBERED];
        if ((uintptr_t)address - past->address >= past->size)
            continue;
        found = true;
        *at_begin = (uintptr_t)address == past->address;
        words(text, length, past->number, past->address, past->size, -1, SIM_PAGEABLE);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* The process is about to end by a wild access: a torn table is a smaller evil than a lock that is held. */
__attribute__((no_sanitize("thread"))) void sim_range_describe_unlocked(uintptr_t address, char *text, size_t length)
{
    for (size_t i = 0; i < used; i++)
        if (address - table[i]->address < table[i]->size) {
            sim_range_words(table[i], text, length);
            return;
        }
    snprintf(text, length, "no allocation");
}

static int not_alive(const char *what, const void *address, size_t size)
{
    char text[160];
    bool at_begin;
    if (sim_range_was(address, text, sizeof text, &at_begin))
        return sim_refuse("use_after_free", ACL_PARAM_INVALID, "%s %p lies in %s, which was freed", what, address,
                          text);
    return sim_refuse("out_of_bounds", ACL_PARAM_INVALID, "%s %p, %zu bytes: device address in no allocation", what,
                      address, size);
}

int sim_view_open(const char *what, const void *address, size_t size, struct sim_view *view)
{
    *view = (struct sim_view){.where = SIM_PAGEABLE,
                              .address = address,
                              .bytes = (unsigned char *)(uintptr_t)address,
                              .size = size};
    struct sim_range *range = sim_range_find(address);
    if (!range)
        return sim_is_device_address(address) ? not_alive(what, address, size) : 0;
    char text[160];
    size_t begin = (uintptr_t)address - range->address;
    int code = 0;
    if (size > range->size - begin)
        code = sim_refuse("out_of_bounds", ACL_PARAM_INVALID, "%s %p: %zu bytes from byte %zu on leave %s", what,
                          address, size, begin, sim_range_words(range, text, sizeof text));
    if (code) {
        sim_range_put(range);
        return code;
    }
    view->range = range;
    view->where = range->where;
    view->device = range->device;
    view->bytes = range->bytes + begin;
    view->offset = range->offset + begin;
    return 0;
}

void sim_view_close(struct sim_view *view)
{
    if (view->range)
        sim_range_put(view->range);
    view->range = NULL;
}

/* The owner of imported memory never sends anything: an end of file is its death. */
static bool owner_gone(const struct sim_range *range)
{
    char byte;
    ssize_t got = recv(range->connection, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

int sim_view_check(const char *what, const struct sim_view *view)
{
    char text[160];
    if (!view->range)
        return 0;
    if (atomic_load(&view->range->state) != SIM_LIVE)
        return sim_refuse("use_after_free", ACL_DEVICE_MEM_ERROR, "%s: %s was freed before the task ended", what,
                          sim_range_words(view->range, text, sizeof text));
    if (view->where == SIM_IMPORTED && owner_gone(view->range))
        return sim_fail((int)sim_knob(SIM_DEAD_PEER_CODE), "%s: the owner of %s is gone", what,
                        sim_range_words(view->range, text, sizeof text));
    return 0;
}
