/* Handles are numbers that stand for objects: no address at all, never used twice, different in each process. Whatever
   a program passes can be looked up, and be told from what was closed. */
#include "internal.h"

#include <stdlib.h>
#include <unistd.h>

#define MARK ((uintptr_t)0xac << 48)
#define INDEX_SHIFT 4
#define SALT_SHIFT 32

struct place {
    struct sim_object *object; /* NULL: closed */
    enum sim_kind kind;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct place *places;
static size_t used, room;

static uintptr_t salt(void)
{
    return (uintptr_t)(getpid() & 0xffff) << SALT_SHIFT;
}

/* Under the lock. NULL if it is no handle of this process and kind. */
static struct place *look_up(void *handle, enum sim_kind kind)
{
    uintptr_t number = (uintptr_t)handle ^ (MARK | salt());
    size_t index = number >> INDEX_SHIFT;
    if (number & ((1u << INDEX_SHIFT) - 1) || index >= used || places[index].kind != kind)
        return NULL;
    return &places[index];
}

void *sim_handle_make(struct sim_object *object, enum sim_kind kind, void (*release)(struct sim_object *))
{
    void *handle = NULL;
    pthread_mutex_lock(&lock);
    if (used == room) {
        size_t more = room ? 2 * room : 256;
        struct place *larger = realloc(places, more * sizeof *larger);
        if (larger) {
            places = larger;
            room = more;
        }
    }
    if (used < room) {
        places[used] = (struct place){object, kind};
        handle = (void *)((MARK | salt()) ^ ((uintptr_t)used++ << INDEX_SHIFT));
        atomic_init(&object->holders, 1);
        object->kind = kind;
        object->handle = handle;
        object->free = release;
    }
    pthread_mutex_unlock(&lock);
    return handle;
}

struct sim_object *sim_handle_get(void *handle, enum sim_kind kind)
{
    pthread_mutex_lock(&lock);
    struct place *place = look_up(handle, kind);
    struct sim_object *object = place ? place->object : NULL;
    if (object)
        sim_object_hold(object);
    pthread_mutex_unlock(&lock);
    return object;
}

bool sim_handle_closed(void *handle, enum sim_kind kind)
{
    pthread_mutex_lock(&lock);
    struct place *place = look_up(handle, kind);
    bool closed = place && !place->object;
    pthread_mutex_unlock(&lock);
    return closed;
}

bool sim_handle_close(void *handle)
{
    bool closed = false;
    pthread_mutex_lock(&lock);
    uintptr_t index = ((uintptr_t)handle ^ (MARK | salt())) >> INDEX_SHIFT;
    if (index < used && places[index].object) {
        places[index].object = NULL;
        closed = true;
    }
    pthread_mutex_unlock(&lock);
    return closed;
}

void sim_object_hold(struct sim_object *object)
{
    atomic_fetch_add(&object->holders, 1);
}

void sim_object_put(struct sim_object *object)
{
    if (atomic_fetch_sub(&object->holders, 1) == 1)
        object->free(object);
}
