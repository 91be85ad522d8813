/* How two ranks find each other: the higher one dials the door of the lower one and names the communicator. */
#include "communicator.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DIAL_MS 100
#define REDIAL_NS 2000000ull

/* A listening socket that all communicators of the process with this address share. */
struct door {
    struct door *next;
    struct socket *socket;
    int holders;
    char address[ADDRESS_BYTES];
};

struct hello {
    char key[KEY_BYTES];
    char name[HCCL_NAME_BYTES];
    char version[32];
    uint64_t digest;
    uint32_t from, to, ranks, physical;
};

/* Somebody at a door whose communicator does not exist here yet. */
struct caller {
    struct caller *next;
    struct socket *socket;
    bool spoke;
    struct hello hello;
};

static struct door *doors;
static struct caller *callers;

static void link_frame(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd);
static void link_end(struct socket *socket, void *owner);

/* ---- callers at the door ---- */

static void forget_caller(struct caller *caller)
{
    for (struct caller **at = &callers; *at != NULL; at = &(*at)->next)
        if (*at == caller) {
            *at = caller->next;
            break;
        }
    free(caller);
}

/* NULL when the two belong together. */
static const char *difference(const struct communicator *c, const struct hello *hello)
{
    if (strcmp(hello->version, SIM_VERSION) != 0)
        return "versions of the simulator";
    if (hello->digest != c->digest)
        return "rank tables";
    if (strcmp(hello->name, c->name) != 0)
        return "names";
    if (hello->ranks != c->ranks)
        return "numbers of ranks";
    if (hello->physical != c->members[hello->from].physical)
        return "devices";
    return NULL;
}

static void refuse_link(struct link *link, const char *what)
{
    link->refused = HCCL_E_PARA;
    snprintf(link->reason, sizeof link->reason, "rank %u and rank %u have different %s", link->communicator->rank,
             link->peer, what);
    communicator_wake(link->communicator);
}

static void take_in(struct caller *caller, struct link *link)
{
    struct socket *socket = caller->socket;
    const char *what = difference(link->communicator, &caller->hello);
    forget_caller(caller);
    if (what != NULL) {
        refuse_link(link, what);
        socket_send(socket, (struct frame){.kind = FRAME_REFUSED, .body = (uint32_t)strlen(what)}, what, -1);
        socket_finish(socket);
        return;
    }
    link->socket = socket;
    link->met = true;
    socket_serve(socket, link_frame, link_end, link);
    socket_send(socket, (struct frame){.kind = FRAME_WELCOME}, NULL, -1);
    if (link->cut_when_met)
        socket_cut(socket);
    communicator_wake(link->communicator);
}

/* The link that the caller asks for, if it is free: a dead one stays dead, its successor has another communicator. */
static struct link *wanted_link(const struct hello *hello)
{
    for (struct communicator *c = communicator_list(); c != NULL; c = c->next) {
        if (!c->members_known || strcmp(c->key, hello->key) != 0 || c->rank != hello->to || hello->from <= c->rank ||
            hello->from >= c->ranks)
            continue;
        struct link *link = &c->links[hello->from];
        if (!c->closing && !link->met && link->refused == 0)
            return link;
    }
    return NULL;
}

static void caller_frame(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd)
{
    struct caller *caller = owner;
    (void)fd;
    if (caller->spoke || frame->kind != FRAME_HELLO || frame->body != sizeof caller->hello) {
        forget_caller(caller);
        socket_close(socket);
        return;
    }
    memcpy(&caller->hello, body, sizeof caller->hello);
    caller->hello.key[KEY_BYTES - 1] = caller->hello.name[HCCL_NAME_BYTES - 1] = '\0';
    caller->hello.version[sizeof caller->hello.version - 1] = '\0';
    caller->spoke = true;
    struct link *link = wanted_link(&caller->hello);
    if (link != NULL)
        take_in(caller, link);
}

static void caller_end(struct socket *socket, void *owner)
{
    (void)socket;
    forget_caller(owner);
}

static void at_the_door(struct socket *listener, void *owner, struct socket *accepted)
{
    (void)listener, (void)owner;
    struct caller *caller = calloc(1, sizeof *caller);
    if (caller == NULL) {
        socket_close(accepted);
        return;
    }
    *caller = (struct caller){.next = callers, .socket = accepted};
    callers = caller;
    socket_serve(accepted, caller_frame, caller_end, caller);
}

void meeting_admit_waiting(struct communicator *c)
{
    for (struct caller *caller = callers, *next; caller != NULL; caller = next) {
        next = caller->next;
        struct link *link = caller->spoke ? wanted_link(&caller->hello) : NULL;
        if (link != NULL && link->communicator == c)
            take_in(caller, link);
    }
}

/* Somebody with the same table and other name: that is why nobody came. */
static bool mistaken_caller(struct link *link)
{
    const struct communicator *c = link->communicator;
    for (struct caller *caller = callers; caller != NULL; caller = caller->next) {
        if (!caller->spoke || caller->hello.digest != c->digest || caller->hello.to != c->rank ||
            caller->hello.from != link->peer || c->digest == 0)
            continue;
        struct socket *socket = caller->socket;
        forget_caller(caller);
        refuse_link(link, "names");
        socket_send(socket, (struct frame){.kind = FRAME_REFUSED, .body = 5}, "names", -1);
        socket_finish(socket);
        return true;
    }
    return false;
}

/* ---- doors ---- */

const char *meeting_own_door(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static char address[ADDRESS_BYTES];
    pthread_mutex_lock(&lock);
    if (address[0] == '\0') {
        char nonce[17] = "";
        sim_nonce(nonce, sizeof nonce - 1);
        snprintf(address, sizeof address, "unix:hccl-door-%s", nonce);
    }
    pthread_mutex_unlock(&lock);
    return address;
}

static struct door *find_door(const char *address)
{
    struct door *door = doors;
    while (door != NULL && strcmp(door->address, address) != 0)
        door = door->next;
    return door;
}

HcclResult meeting_open_door(const char *function, struct communicator *c, int slot, const char *address)
{
    reception_lock();
    struct door *door = find_door(address);
    if (door == NULL && (door = calloc(1, sizeof *door)) != NULL) {
        snprintf(door->address, sizeof door->address, "%s", address);
        door->socket = socket_listen(address, at_the_door, door);
        if (door->socket == NULL) {
            int error = errno;
            reception_unlock();
            free(door);
            return sim_fail(HCCL_E_TCP_CONNECT, "%s: cannot listen at %s: %s%s", function, address, strerror(error),
                            error == EADDRINUSE ? " (processes that share a device need a device_port each)" : "");
        }
        door->next = doors;
        doors = door;
    }
    if (door != NULL)
        door->holders++;
    c->doors[slot] = door;
    reception_unlock();
    return door != NULL ? HCCL_SUCCESS : sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
}

unsigned meeting_door_port(struct communicator *c, int slot)
{
    reception_lock();
    unsigned port = socket_port(c->doors[slot]->socket);
    reception_unlock();
    return port;
}

static void close_door(struct door *door)
{
    if (--door->holders > 0)
        return;
    for (struct door **at = &doors; *at != NULL; at = &(*at)->next)
        if (*at == door) {
            *at = door->next;
            break;
        }
    socket_close(door->socket);
    free(door);
    while (doors == NULL && callers != NULL) {
        socket_close(callers->socket);
        forget_caller(callers);
    }
}

void meeting_close_doors(struct communicator *c)
{
    for (int slot = 0; slot < 2; slot++) {
        if (c->doors[slot] != NULL)
            close_door(c->doors[slot]);
        c->doors[slot] = NULL;
    }
}

/* ---- links ---- */

static void link_frame(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd)
{
    struct link *link = owner;
    (void)socket;
    switch (frame->kind) {
    case FRAME_WELCOME:
        link->met = true;
        if (link->cut_when_met)
            socket_cut(socket);
        communicator_wake(link->communicator);
        break;
    case FRAME_REFUSED:
        refuse_link(link, body);
        break;
    case FRAME_GOODBYE:
        link->goodbye = true;
        communicator_wake(link->communicator);
        break;
    case FRAME_MEMORY:
        peer_memory_map(link, *fd);
        break;
    case FRAME_READ:
    case FRAME_WRITE:
    case FRAME_DONE:
        peer_memory_frame(link, frame, body);
        break;
    case FRAME_PREPARED:
    case FRAME_UNPREPARED:
        one_sided_frame(link, frame, body);
        break;
    default:
        send_receive_frame(link, frame, body);
    }
}

static void link_end(struct socket *socket, void *owner)
{
    struct link *link = owner;
    (void)socket;
    link->socket = NULL;
    if (link->met) {
        link->died_at = sim_now();
        peer_memory_lose(link);
        peer_memory_fail_requests(link);
    }
    communicator_wake(link->communicator);
}

static bool say_hello(struct link *link, int fd)
{
    struct communicator *c = link->communicator;
    link->socket = socket_adopt(fd, link_frame, link_end, link);
    if (link->socket == NULL) {
        close(fd);
        return false;
    }
    struct hello hello = {.digest = c->digest,
                          .from = c->rank,
                          .to = link->peer,
                          .ranks = c->ranks,
                          .physical = (uint32_t)c->device->physical};
    strcpy(hello.key, c->key);
    strcpy(hello.name, c->name);
    strcpy(hello.version, SIM_VERSION);
    socket_send(link->socket, (struct frame){.kind = FRAME_HELLO, .body = sizeof hello}, &hello, -1);
    return true;
}

/* One attempt to reach the lower rank; who is refused at once tries again a little later. */
static void dial(struct link *link, uint64_t deadline)
{
    struct communicator *c = link->communicator;
    char address[ADDRESS_BYTES];
    strcpy(address, c->members[link->peer].door);
    link->dialing = true;
    reception_unlock();
    int fd = socket_dial(address, DIAL_MS);
    reception_lock();
    link->dialing = false;
    if (fd >= 0 && !c->closing && say_hello(link, fd))
        return;
    if (fd >= 0 && c->closing)
        close(fd);
    uint64_t soon = sim_now() + REDIAL_NS;
    reception_wait(&c->changed, soon < deadline ? soon : deadline);
}

static HcclResult report_refusal(const char *function, struct link *link)
{
    return sim_refuse("comm_differs", link->refused, "%s: \"%s\": %s", function, link->communicator->name,
                      link->reason);
}

HcclResult meeting_await(const char *function, struct link *link, uint64_t deadline)
{
    struct communicator *c = link->communicator;
    while (!link->met && link->refused == 0) {
        if (c->closing)
            return sim_fail(HCCL_E_INTERNAL, "%s: the communicator was destroyed meanwhile", function);
        if (sim_now() >= deadline) {
            if (mistaken_caller(link))
                break;
            if (link->socket != NULL) { /* said hello, was not answered: no longer there */
                socket_close(link->socket);
                link->socket = NULL;
            }
            return sim_fail(HCCL_E_TIMEOUT, "%s: rank %u of \"%s\" did not come", function, link->peer, c->name);
        }
        if (c->rank > link->peer && link->socket == NULL && !link->dialing)
            dial(link, deadline);
        else
            reception_wait(&c->changed, deadline);
    }
    return link->refused != 0 ? report_refusal(function, link) : HCCL_SUCCESS;
}

void meeting_cut(struct link *link, struct sim_task *task)
{
    reception_lock();
    if (link->socket != NULL)
        socket_cut(link->socket);
    while (link->socket != NULL && !sim_task_aborted(task)) {
        reception_unlock();
        sim_task_wait(task, sim_now() + REDIAL_NS);
        reception_lock();
    }
    reception_unlock();
}

void meeting_part(struct link *link)
{
    if (link->socket != NULL) {
        if (link->met)
            socket_send(link->socket, (struct frame){.kind = FRAME_GOODBYE}, NULL, -1);
        socket_finish(link->socket);
        link->socket = NULL;
    }
    peer_memory_lose(link);
}
