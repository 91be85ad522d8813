#include "reception.h"

#include "simulator.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define FRAME_MAGIC 0x4C4C5349u
#define BACKLOG 1024
#define EVENTS 64

union address {
    struct sockaddr any;
    struct sockaddr_un local;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

struct parcel { /* what a socket did not take at once */
    struct parcel *next;
    size_t length, sent;
    int fd;
    char bytes[];
};

struct socket {
    int fd;
    uint64_t id; /* in the events of the kernel: an event of a closed socket finds nobody */
    struct socket *next;
    bool local;
    bool closed;
    bool finishing; /* its owner has left: what it still has to say is sent, what comes is thrown away */
    bool reading;   /* on the stack of socket_readable: not freed before that returns */
    accept_callback *accepted;
    frame_callback *frames;
    end_callback *ended;
    void *owner;
    struct frame head;
    size_t head_length, body_length;
    char *body;
    int arrived_fd;
    struct parcel *first, **last;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct socket *sockets;
static uint64_t last_id;
static int holders;
static int poller = -1, waker = -1;
static bool stopping;
static pthread_t thread;
static bool thread_ending; /* its last holder is waiting for it */
static pthread_cond_t thread_ended = PTHREAD_COND_INITIALIZER;

void reception_lock(void)
{
    pthread_mutex_lock(&lock);
}

void reception_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

bool reception_wait(pthread_cond_t *condition, uint64_t deadline)
{
    return sim_condition_wait(condition, &lock, deadline);
}

/* ---- sockets and the kernel's events ---- */

static void interest(struct socket *s, int operation)
{
    struct epoll_event event = {.events = EPOLLIN | (s->first != NULL ? EPOLLOUT : 0), .data.u64 = s->id};
    epoll_ctl(poller, operation, s->fd, &event);
}

static struct socket *new_socket(int fd, bool local)
{
    struct socket *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    *s = (struct socket){.fd = fd, .id = ++last_id, .next = sockets, .local = local, .arrived_fd = -1};
    s->last = &s->first;
    sockets = s;
    interest(s, EPOLL_CTL_ADD);
    return s;
}

static void drop_parcels(struct socket *s)
{
    while (s->first != NULL) {
        struct parcel *parcel = s->first;
        s->first = parcel->next;
        if (parcel->fd >= 0)
            close(parcel->fd);
        free(parcel);
    }
    s->last = &s->first;
}

static void free_socket(struct socket *s)
{
    drop_parcels(s);
    if (s->arrived_fd >= 0)
        close(s->arrived_fd);
    free(s->body);
    free(s);
}

void socket_close(struct socket *s)
{
    if (s->closed)
        return;
    s->closed = true;
    for (struct socket **at = &sockets; *at != NULL; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    close(s->fd);
    if (!s->reading)
        free_socket(s);
}

static void ignore_frame(struct socket *s, void *owner, const struct frame *frame, const char *body, int *fd)
{
    (void)s, (void)owner, (void)frame, (void)body, (void)fd;
}

void socket_finish(struct socket *s)
{
    if (s->first == NULL) {
        socket_close(s);
        return;
    }
    s->finishing = true;
    s->frames = ignore_frame;
    s->ended = NULL;
    s->owner = NULL;
}

void socket_cut(struct socket *s)
{
    shutdown(s->fd, SHUT_RDWR);
}

static void end(struct socket *s)
{
    if (s->closed)
        return;
    if (s->ended != NULL)
        s->ended(s, s->owner);
    socket_close(s);
}

bool socket_is_local(const struct socket *s)
{
    return s->local;
}

unsigned socket_port(const struct socket *s)
{
    union address address = {.v4.sin_port = 0};
    socklen_t length = sizeof address;
    getsockname(s->fd, &address.any, &length);
    return ntohs(address.any.sa_family == AF_INET6 ? address.v6.sin6_port : address.v4.sin_port);
}

void *socket_owner(const struct socket *s)
{
    return s->owner;
}

/* ---- reading ---- */

/* As recv, and keeps a descriptor that came along. */
static ssize_t receive(struct socket *s, void *to, size_t room)
{
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec vector = {.iov_base = to, .iov_len = room};
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(s->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got <= 0)
        return got;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header != NULL && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
        if (s->arrived_fd >= 0)
            close(s->arrived_fd);
        memcpy(&s->arrived_fd, CMSG_DATA(header), sizeof(int));
    }
    return got;
}

static void deliver(struct socket *s)
{
    int fd = s->arrived_fd;
    char *body = s->body;
    s->arrived_fd = -1;
    s->body = NULL;
    s->head_length = s->body_length = 0;
    s->frames(s, s->owner, &s->head, body, &fd);
    if (fd >= 0)
        close(fd);
    free(body);
}

/* One step: part of a frame's head or body. False when there is nothing to read, or no more sense in it. */
static bool read_step(struct socket *s)
{
    bool head = s->head_length < sizeof s->head;
    char *to = head ? (char *)&s->head + s->head_length : s->body + s->body_length;
    size_t room = head ? sizeof s->head - s->head_length : s->head.body - s->body_length;
    ssize_t got = receive(s, to, room);
    if (got < 0 && errno == EINTR)
        return true;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return false;
    if (got <= 0) {
        end(s);
        return false;
    }
    if (head)
        s->head_length += (size_t)got;
    else
        s->body_length += (size_t)got;
    if (s->head_length < sizeof s->head)
        return true;
    if (head) {
        if (s->head.magic != FRAME_MAGIC || s->head.body > FRAME_BODY_MAX ||
            (s->body = malloc(s->head.body + 1)) == NULL) {
            end(s);
            return false;
        }
        s->body[s->head.body] = '\0';
    }
    if (s->body_length == s->head.body)
        deliver(s);
    return true;
}

/* A listener, or a socket that waits for its owner, is left alone by who is told to read it. */
static void readable(struct socket *s)
{
    if (s->reading || s->frames == NULL)
        return;
    s->reading = true;
    while (!s->closed && s->frames != NULL && read_step(s))
        continue;
    s->reading = false;
    if (s->closed)
        free_socket(s);
}

void socket_drain(struct socket *s)
{
    readable(s);
}

/* ---- writing ---- */

static ssize_t transmit(struct socket *s, struct iovec *vector, int vectors, int fd)
{
    char control[CMSG_SPACE(sizeof(int))];
    struct msghdr message = {.msg_iov = vector, .msg_iovlen = (size_t)vectors};
    if (fd >= 0) {
        memset(control, 0, sizeof control);
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        *header =
            (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(header), &fd, sizeof(int));
    }
    return sendmsg(s->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void enqueue(struct socket *s, const struct frame *frame, const void *body, size_t sent, int fd)
{
    size_t length = sizeof *frame + frame->body;
    struct parcel *parcel = malloc(sizeof *parcel + length);
    if (parcel == NULL) { /* a frame is missing: nothing behind it makes sense */
        socket_cut(s);
        return;
    }
    *parcel = (struct parcel){.length = length, .sent = sent, .fd = fd >= 0 && sent == 0 ? dup(fd) : -1};
    memcpy(parcel->bytes, frame, sizeof *frame);
    if (frame->body > 0)
        memcpy(parcel->bytes + sizeof *frame, body, frame->body);
    *s->last = parcel;
    s->last = &parcel->next;
    interest(s, EPOLL_CTL_MOD);
}

void socket_send(struct socket *s, struct frame frame, const void *body, int fd)
{
    frame.magic = FRAME_MAGIC;
    size_t sent = 0;
    if (s->first == NULL) {
        struct iovec vector[2] = {{&frame, sizeof frame}, {(void *)body, frame.body}};
        ssize_t done = transmit(s, vector, frame.body > 0 ? 2 : 1, fd);
        sent = done > 0 ? (size_t)done : 0;
        if (done < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
            return; /* the end of the connection is noticed by reading */
    }
    if (sent < sizeof frame + frame.body)
        enqueue(s, &frame, body, sent, fd);
}

static void writable(struct socket *s)
{
    while (s->first != NULL) {
        struct parcel *parcel = s->first;
        struct iovec vector = {parcel->bytes + parcel->sent, parcel->length - parcel->sent};
        ssize_t done = transmit(s, &vector, 1, parcel->fd);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (done < 0) {
            drop_parcels(s); /* the end of the connection is noticed by reading */
            break;
        }
        parcel->sent += (size_t)done;
        if (parcel->fd >= 0) {
            close(parcel->fd);
            parcel->fd = -1;
        }
        if (parcel->sent < parcel->length)
            continue;
        s->first = parcel->next;
        if (s->first == NULL)
            s->last = &s->first;
        free(parcel);
    }
    if (s->finishing)
        socket_close(s);
    else
        interest(s, EPOLL_CTL_MOD);
}

/* ---- addresses ---- */

static socklen_t parse_address(const char *text, union address *address)
{
    memset(address, 0, sizeof *address);
    if (strncmp(text, "unix:", 5) == 0) {
        return sim_socket_name(&address->local, "%s", text + 5);
    }
    unsigned port;
    char ip[64];
    if (sscanf(text, "tcp:%u:%63s", &port, ip) != 2)
        return 0;
    if (inet_pton(AF_INET, ip, &address->v4.sin_addr) == 1) {
        address->v4.sin_family = AF_INET;
        address->v4.sin_port = htons((uint16_t)port);
        return sizeof address->v4;
    }
    if (inet_pton(AF_INET6, ip, &address->v6.sin6_addr) == 1) {
        address->v6.sin6_family = AF_INET6;
        address->v6.sin6_port = htons((uint16_t)port);
        return sizeof address->v6;
    }
    return 0;
}

static int open_socket(const char *text, union address *address, socklen_t *length)
{
    *length = parse_address(text, address);
    if (*length == 0) {
        errno = EINVAL;
        return -1;
    }
    int fd = socket(address->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int on = 1;
    if (fd >= 0 && address->any.sa_family != AF_UNIX)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static int close_keeping_errno(int fd)
{
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int socket_dial(const char *text, int patience_ms)
{
    union address address;
    socklen_t length;
    int fd = open_socket(text, &address, &length);
    if (fd < 0)
        return -1;
    if (connect(fd, &address.any, length) == 0)
        return fd;
    if (errno != EINPROGRESS)
        return close_keeping_errno(fd);
    struct pollfd wait = {.fd = fd, .events = POLLOUT};
    int error = ETIMEDOUT;
    socklen_t size = sizeof error;
    if (poll(&wait, 1, patience_ms) == 1)
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error == 0)
        return fd;
    errno = error;
    return close_keeping_errno(fd);
}

struct socket *socket_listen(const char *text, accept_callback *accepted, void *owner)
{
    union address address;
    socklen_t length;
    int on = 1, fd = open_socket(text, &address, &length);
    if (fd < 0)
        return NULL;
    if (address.any.sa_family != AF_UNIX)
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct socket *s = NULL;
    if (bind(fd, &address.any, length) == 0 && listen(fd, BACKLOG) == 0)
        s = new_socket(fd, address.any.sa_family == AF_UNIX);
    if (s == NULL) {
        close_keeping_errno(fd);
        return NULL;
    }
    s->accepted = accepted;
    s->owner = owner;
    return s;
}

static void acceptable(struct socket *listener)
{
    for (;;) {
        int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return;
        int on = 1;
        if (!listener->local)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct socket *s = new_socket(fd, listener->local);
        if (s == NULL)
            close(fd);
        else
            listener->accepted(listener, listener->owner, s);
    }
}

struct socket *socket_adopt(int fd, frame_callback *frames, end_callback *ended, void *owner)
{
    int family;
    socklen_t length = sizeof family;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &length);
    struct socket *s = new_socket(fd, family == AF_UNIX);
    if (s == NULL)
        return NULL;
    s->frames = frames;
    s->ended = ended;
    s->owner = owner;
    return s;
}

void socket_serve(struct socket *s, frame_callback *frames, end_callback *ended, void *owner)
{
    s->frames = frames;
    s->ended = ended;
    s->owner = owner;
}

/* ---- the thread ---- */

static struct socket *find(uint64_t id)
{
    struct socket *s = sockets;
    while (s != NULL && s->id != id)
        s = s->next;
    return s;
}

static void handle(const struct epoll_event *event)
{
    struct socket *s = find(event->data.u64);
    if (s == NULL)
        return;
    if (s->accepted != NULL) {
        acceptable(s);
        return;
    }
    if (event->events & EPOLLOUT)
        writable(s);
    if (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR) && find(event->data.u64) == s)
        readable(s);
}

static void *serve(void *unused)
{
    (void)unused;
    struct epoll_event events[EVENTS];
    reception_lock();
    while (!stopping) {
        reception_unlock();
        int count = epoll_wait(poller, events, EVENTS, -1);
        reception_lock();
        for (int i = 0; i < count && !stopping; i++)
            handle(&events[i]);
    }
    reception_unlock();
    return NULL;
}

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

/* The child keeps none of the sockets by which peers know whether its parent lives. */
static void in_child(void)
{
    for (struct socket *s = sockets; s != NULL; s = s->next)
        close(s->fd);
    if (poller >= 0)
        close(poller);
    if (waker >= 0)
        close(waker);
    pthread_mutex_unlock(&lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork, in_child);
}

static bool start(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    poller = epoll_create1(EPOLL_CLOEXEC);
    waker = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0};
    stopping = false;
    if (poller >= 0 && waker >= 0 && epoll_ctl(poller, EPOLL_CTL_ADD, waker, &event) == 0 &&
        sim_thread_start(&thread, "hccl-reception", serve, NULL) == 0)
        return true;
    if (poller >= 0)
        close(poller);
    if (waker >= 0)
        close(waker);
    poller = waker = -1;
    return false;
}

bool reception_hold(void)
{
    while (thread_ending)
        pthread_cond_wait(&thread_ended, &lock);
    if (holders == 0 && !start())
        return false;
    holders++;
    return true;
}

void reception_release(void)
{
    if (--holders > 0)
        return;
    thread_ending = stopping = true;
    uint64_t one = 1;
    if (write(waker, &one, sizeof one) != sizeof one)
        abort(); /* an eventfd takes a one */
    reception_unlock();
    pthread_join(thread, NULL);
    reception_lock();
    while (sockets != NULL) /* those that were finishing */
        socket_close(sockets);
    close(poller);
    close(waker);
    poller = waker = -1;
    thread_ending = false;
    pthread_cond_broadcast(&thread_ended);
}
