/* How bytes get to and from a peer's memory: through a mapping of its device's file on the same server, by requests
 * that the peer's reception answers otherwise. Who starts a copy does it, so that no peer ever writes here by itself
 * after a stop. */
#include "communicator.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define REQUEST_BYTES (256u << 10)

struct remote_request {
    struct remote_request *next;
    uint64_t number;
    struct sim_task *task;
    char *bytes; /* what was read */
    size_t size;
    bool done;
    int result;
};

static uint64_t last_request;

/* ---- the mapping ---- */

void peer_memory_send(struct link *link)
{
    if (link->memory_sent || link->socket == NULL || !socket_is_local(link->socket))
        return;
    int fd = sim_device_file(link->communicator->device);
    if (fd < 0)
        return;
    socket_send(link->socket, (struct frame){.kind = FRAME_MEMORY}, NULL, fd);
    link->memory_sent = true;
}

void peer_memory_map(struct link *link, int fd)
{
    struct stat status;
    if (fd < 0 || link->map != NULL || fstat(fd, &status) != 0)
        return;
    void *map = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return;
    pthread_rwlock_wrlock(&link->map_lock);
    link->map = map;
    link->map_size = (size_t)status.st_size;
    pthread_rwlock_unlock(&link->map_lock);
}

void peer_memory_lose(struct link *link)
{
    pthread_rwlock_wrlock(&link->map_lock);
    atomic_store(&link->dead, true);
    if (link->map != NULL)
        mmap(link->map, link->map_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    pthread_rwlock_unlock(&link->map_lock);
}

void peer_memory_free(struct link *link)
{
    if (link->map != NULL)
        munmap(link->map, link->map_size);
    link->map = NULL;
}

/* ---- copies through the mapping ---- */

struct mapped_copy {
    const struct peer_window *window;
    const struct sim_view *own;
    const char *what;
};

/* Between two pieces: lets the end of the peer come in, then looks for it. */
static int look(void *about)
{
    const struct mapped_copy *copy = about;
    const struct peer_window *window = copy->window;
    pthread_rwlock_unlock(&window->link->map_lock);
    bool cancelled = window->cancelled != NULL && window->cancelled(window->about);
    int code = sim_view_check(copy->what, copy->own);
    pthread_rwlock_rdlock(&window->link->map_lock);
    if (atomic_load(&window->link->dead))
        return PEER_GONE;
    return cancelled ? PEER_CANCELLED : code;
}

static int copy_mapped(struct sim_task *task, const struct peer_window *window, const struct sim_view *own, size_t at,
                       size_t size, bool to_peer, struct sim_fault fault)
{
    struct link *link = window->link;
    struct mapped_copy about = {window, own, task->what};
    pthread_rwlock_rdlock(&link->map_lock);
    int code;
    if (atomic_load(&link->dead)) {
        code = PEER_GONE;
    } else if (link->map == NULL || window->file_offset > link->map_size ||
               size > link->map_size - window->file_offset) {
        code = sim_fail(ACL_INTERNAL_ERROR, "%s: the peer's memory is not mapped", task->what);
    } else {
        unsigned char *here = own->bytes + at, *there = link->map + window->file_offset;
        struct sim_copy copy = {to_peer ? there : here, to_peer ? here : there, size, look, &about};
        code = sim_copy_pieces(task, &copy, fault);
    }
    pthread_rwlock_unlock(&link->map_lock);
    return code;
}

/* ---- copies by requests ---- */

static struct remote_request *find_request(struct link *link, uint64_t number)
{
    struct remote_request *request = link->requests;
    while (request != NULL && request->number != number)
        request = request->next;
    return request;
}

static void remove_request(struct link *link, struct remote_request *request)
{
    for (struct remote_request **at = &link->requests; *at != NULL; at = &(*at)->next)
        if (*at == request) {
            *at = request->next;
            break;
        }
}

void peer_memory_fail_requests(struct link *link)
{
    for (struct remote_request *request = link->requests; request != NULL; request = request->next) {
        request->done = true;
        request->result = PEER_GONE;
        sim_task_wake(request->task);
    }
}

static void await_request(const struct peer_window *window, struct remote_request *request)
{
    while (!request->done && !window->link->communicator->closing && !sim_task_aborted(request->task)) {
        reception_unlock();
        bool cancelled = window->cancelled != NULL && window->cancelled(window->about);
        if (!cancelled)
            sim_task_wait(request->task, UINT64_MAX);
        reception_lock();
        if (cancelled && !request->done) {
            request->done = true;
            request->result = PEER_CANCELLED;
        }
    }
    if (!request->done)
        request->result = sim_task_aborted(request->task) ? ACL_STREAM_ABORT : ACL_INTERNAL_ERROR;
}

/* One piece of at most REQUEST_BYTES, `offset` bytes behind the beginning of the window. */
static int ask(struct sim_task *task, const struct peer_window *window, size_t offset, char *bytes, size_t size,
               bool to_peer)
{
    struct link *link = window->link;
    struct remote_request request = {.task = task, .bytes = bytes, .size = size};
    struct frame frame = {.kind = to_peer ? FRAME_WRITE : FRAME_READ,
                          .body = to_peer ? (uint32_t)size : 0,
                          .flags = window->flags,
                          .value = {(uint64_t)window->kind, window->number, window->offset + offset, size}};
    reception_lock();
    if (link->socket == NULL) {
        reception_unlock();
        return PEER_GONE;
    }
    frame.number = request.number = ++last_request;
    request.next = link->requests;
    link->requests = &request;
    socket_send(link->socket, frame, bytes, -1);
    await_request(window, &request);
    remove_request(link, &request);
    reception_unlock();
    return request.result;
}

struct asked_copy {
    const struct peer_window *window;
    const struct sim_view *own;
    const char *what;
};

static int look_while_asking(void *about)
{
    const struct asked_copy *copy = about;
    if (copy->window->cancelled != NULL && copy->window->cancelled(copy->window->about))
        return PEER_CANCELLED;
    return sim_view_check(copy->what, copy->own);
}

/* A piece goes through a buffer, with the copy engine on the side of our own memory. */
static int copy_piece(struct sim_task *task, const struct peer_window *window, const struct sim_view *own, size_t at,
                      size_t done, char *buffer, size_t piece, bool to_peer)
{
    struct asked_copy about = {window, own, task->what};
    unsigned char *here = own->bytes + at + done;
    struct sim_copy copy = {to_peer ? (unsigned char *)buffer : here, to_peer ? here : (unsigned char *)buffer, piece,
                            look_while_asking, &about};
    const struct sim_fault none = {.action = SIM_NONE};
    int code = to_peer ? sim_copy_pieces(task, &copy, none) : 0;
    if (code == 0)
        code = ask(task, window, done, buffer, piece, to_peer);
    return code != 0 || to_peer ? code : sim_copy_pieces(task, &copy, none);
}

static int copy_asking(struct sim_task *task, const struct peer_window *window, const struct sim_view *own, size_t at,
                       size_t size, bool to_peer, struct sim_fault fault)
{
    if (fault.action == SIM_DROP)
        return 0;
    if (fault.action == SIM_CODE)
        return fault.code;
    size_t end = fault.action == SIM_HALF ? size / 2 : size;
    char *buffer = malloc(REQUEST_BYTES);
    int code = buffer == NULL ? ACL_BAD_ALLOC : 0;
    for (size_t done = 0, piece; code == 0 && done < end; done += piece) {
        piece = end - done < REQUEST_BYTES ? end - done : REQUEST_BYTES;
        code = copy_piece(task, window, own, at, done, buffer, piece, to_peer);
    }
    if (code == 0 && fault.action == SIM_CORRUPT && size > 0) { /* one byte once more, wrong */
        code = to_peer ? 0 : ask(task, window, 0, buffer, 1, false);
        buffer[0] = to_peer ? (char)own->bytes[at] : buffer[0];
        buffer[0] ^= 0x40;
        if (to_peer)
            code = ask(task, window, 0, buffer, 1, true);
        else if (code == 0)
            own->bytes[at] = (unsigned char)buffer[0];
    }
    free(buffer);
    return code == 0 && fault.action == SIM_HALF ? fault.code : code;
}

int peer_memory_copy(struct sim_task *task, const struct peer_window *window, const struct sim_view *own, size_t at,
                     size_t size, bool to_peer, struct sim_fault fault)
{
    return (window->mapped ? copy_mapped : copy_asking)(task, window, own, at, size, to_peer, fault);
}

/* ---- answering a peer ---- */

static unsigned char *asked_for(struct link *link, const struct frame *frame)
{
    uint64_t number = frame->value[1], offset = frame->value[2], size = frame->value[3];
    if (frame->value[0] == WINDOW_REGION)
        return one_sided_window(link, number, offset, size);
    return send_receive_window(link, frame->flags, number, offset, size);
}

/* What the network does to the memory of a process behind its back. The order between that process's own work and a
 * peer's request is made outside, by messages that ThreadSanitizer cannot see, so it does not look here. */
__attribute__((no_sanitize("thread"))) static void move_behind_the_back(void *to, const void *from, size_t size)
{
    volatile unsigned char *target = to;
    const volatile unsigned char *source = from;
    for (size_t i = 0; i < size; i++)
        target[i] = source[i];
}

static void answer(struct link *link, const struct frame *frame, const char *body)
{
    size_t size = frame->value[3];
    unsigned char *bytes = size <= REQUEST_BYTES ? asked_for(link, frame) : NULL;
    char *copy = bytes != NULL && frame->kind == FRAME_READ ? malloc(size) : NULL;
    struct frame reply = {.kind = FRAME_DONE, .number = frame->number};
    if (copy != NULL) {
        move_behind_the_back(copy, bytes, size);
        reply.body = (uint32_t)size;
    } else if (bytes != NULL && frame->kind == FRAME_WRITE) {
        move_behind_the_back(bytes, body, size);
    } else {
        reply.value[0] = 1;
    }
    socket_send(link->socket, reply, copy, -1);
    free(copy);
}

static void finish(struct link *link, const struct frame *frame, const char *body)
{
    struct remote_request *request = find_request(link, frame->number);
    if (request == NULL)
        return; /* aborted meanwhile */
    request->done = true;
    request->result = frame->value[0] == 0 ? 0 : PEER_REFUSED;
    if (frame->body > 0 && frame->body <= request->size)
        memcpy(request->bytes, body, frame->body);
    sim_task_wake(request->task);
}

void peer_memory_frame(struct link *link, const struct frame *frame, const char *body)
{
    if (link->socket == NULL)
        return;
    if (frame->kind == FRAME_DONE)
        finish(link, frame, body);
    else if (frame->kind == FRAME_READ || frame->body == frame->value[3])
        answer(link, frame, body);
}
