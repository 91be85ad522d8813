/* Who has taken how much of each device of the server: one table for all processes, in memory that has no name.

   The first process makes the table and listens on a socket. Whoever comes later gets both, the table and the listening
   socket itself, from any process that is there; so the table lives as long as the last of them, killed or not, and
   leaves nothing. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 512

struct slot {
    int32_t pid; /* 0: free */
    uint64_t started; /* with the id it names the process for ever */
    uint64_t id_space; /* ids of another container mean nothing here */
    uint64_t charged[SIM_MAX_DEVICES]; /* by physical id */
};

struct table {
    pthread_mutex_t lock; /* shared by processes, robust: its holder may be killed */
    struct slot slots[SLOTS];
};

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(struct table *) table;
static struct slot *own;
static int table_file = -1, listener = -1, stop = -1;
static pthread_t entrance;

static void lock_table(struct table *at)
{
    if (pthread_mutex_lock(&at->lock) == EOWNERDEAD)
        pthread_mutex_consistent(&at->lock); /* single numbers: nothing can be half done */
}

/* Field 22 of /proc/<pid>/stat, clock ticks since boot; 0 if the process is gone or waits to be reaped. */
static uint64_t start_of(int pid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    text[length > 0 ? length : 0] = 0;
    const char *field = strrchr(text, ')'); /* the name may hold anything */
    if (!field || field[2] == 'Z' || field[2] == 'X')
        return 0;
    for (int i = 2; i < 22 && field; i++)
        field = strchr(field + 1, ' ');
    return field ? strtoull(field, NULL, 10) : 0;
}

static uint64_t own_id_space(void)
{
    struct stat space;
    return stat("/proc/self/ns/pid", &space) ? 0 : space.st_ino;
}

/* Frees the slots of processes that are gone. Under the table's lock. */
static void reclaim(struct table *at)
{
    uint64_t space = own_id_space();
    for (struct slot *slot = at->slots; slot < at->slots + SLOTS; slot++)
        if (slot->pid && slot != own && slot->id_space == space && start_of(slot->pid) != slot->started)
            memset(slot, 0, sizeof *slot);
}

static int take_slot(struct table *at)
{
    lock_table(at);
    reclaim(at);
    for (struct slot *slot = at->slots; slot < at->slots + SLOTS && !own; slot++)
        if (!slot->pid) {
            slot->pid = getpid();
            slot->started = start_of(slot->pid);
            slot->id_space = own_id_space();
            own = slot;
        }
    pthread_mutex_unlock(&at->lock);
    return own ? 0 : sim_fail(ACL_INTERNAL_ERROR, "more than %d processes use the simulated server", SLOTS);
}

static struct table *map_table(int file)
{
    void *mapped = mmap(NULL, sizeof(struct table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return mapped == MAP_FAILED ? NULL : mapped;
}

/* Socket with the name, not yet listening; -1 if somebody has it. */
static int claim_name(void)
{
    struct sockaddr_un name;
    socklen_t length = sim_socket_name(&name, "table");
    int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (file >= 0 && bind(file, (struct sockaddr *)&name, length)) {
        close(file);
        file = -1;
    }
    return file;
}

static int make_table(int socket)
{
    int file = memfd_create("llmdd-sim-table", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, sizeof(struct table)))
        return -1;
    struct table *fresh = map_table(file);
    if (!fresh)
        return -1;
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&fresh->lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    munmap(fresh, sizeof *fresh);
    return listen(socket, 512) ? -1 : file;
}

/* From a process that is there; false to try again. */
static bool fetch_table(void)
{
    struct sockaddr_un name;
    socklen_t length = sim_socket_name(&name, "table");
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval patience = {.tv_sec = 2};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    char greeting;
    int files[2];
    bool fetched = !connect(connection, (struct sockaddr *)&name, length) &&
                   !sim_receive_files(connection, &greeting, 1, files, 2);
    close(connection);
    if (fetched) {
        table_file = files[0];
        listener = files[1];
    }
    return fetched;
}

static int join_table(void)
{
    uint64_t deadline = sim_now() + 10000000000u;
    while (sim_now() < deadline) {
        int socket = claim_name();
        if (socket >= 0) {
            listener = socket;
            table_file = make_table(socket);
            return table_file < 0
                       ? sim_fail(ACL_INTERNAL_ERROR, "the server's table cannot be made: %s", strerror(errno))
                       : 0;
        }
        if (fetch_table())
            return 0;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* its maker does not listen yet, or has just died */
    }
    return sim_fail(ACL_INTERNAL_ERROR, "no process of the server hands its table out");
}

/* Hands table and listener to whoever comes. All processes wait here; one of them gets each newcomer. */
static void *serve(void *unused)
{
    (void)unused;
    struct pollfd files[2] = {{.fd = listener, .events = POLLIN}, {.fd = stop, .events = POLLIN}};
    while (poll(files, 2, -1) < 0 || !files[1].revents) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0)
            continue;
        sim_send_files(connection, "t", 1, (int[]){table_file, listener}, 2);
        close(connection);
    }
    return NULL;
}

int sim_table_open(void)
{
    int code = 0;
    pthread_mutex_lock(&opening);
    if (!atomic_load(&table)) {
        code = join_table();
        struct table *mapped = code ? NULL : map_table(table_file);
        if (!code)
            code = mapped ? take_slot(mapped) : sim_fail(ACL_INTERNAL_ERROR, "the server's table cannot be mapped");
        stop = eventfd(0, EFD_CLOEXEC);
        if (!code && sim_thread_start(&entrance, "sim-table", serve, NULL))
            code = sim_fail(ACL_INTERNAL_ERROR, "no thread for the server's table");
        if (!code)
            atomic_store(&table, mapped);
    }
    pthread_mutex_unlock(&opening);
    return code;
}

static void close_files(void)
{
    int *const files[] = {&table_file, &listener, &stop};
    for (int i = 0; i < 3; i++) {
        if (*files[i] >= 0)
            close(*files[i]);
        *files[i] = -1;
    }
}

void sim_table_close(void)
{
    struct table *at = atomic_exchange(&table, NULL);
    if (at) {
        eventfd_write(stop, 1);
        pthread_join(entrance, NULL);
        lock_table(at);
        memset(own, 0, sizeof *own);
        pthread_mutex_unlock(&at->lock);
        own = NULL;
        munmap(at, sizeof *at);
    }
    close_files();
}

void sim_table_forked(void)
{
    close_files();
}

/* Under the table's lock. */
static uint64_t sum(const struct table *at, int physical)
{
    uint64_t all = 0;
    for (const struct slot *slot = at->slots; slot < at->slots + SLOTS; slot++)
        all += slot->pid ? slot->charged[physical] : 0;
    return all;
}

int sim_charge(struct sim_device *device, uint64_t bytes)
{
    struct table *at = atomic_load(&table);
    uint64_t all = (uint64_t)sim_knob(SIM_HBM_MIB) << 20;
    if (!at)
        return sim_fail(ACL_INTERNAL_ERROR, "device %d was never opened", device->id);
    lock_table(at);
    uint64_t taken = sum(at, device->physical);
    if (bytes > all || taken > all - bytes) {
        reclaim(at);
        taken = sum(at, device->physical);
    }
    bool fits = bytes <= all && taken <= all - bytes;
    if (fits)
        own->charged[device->physical] += bytes;
    pthread_mutex_unlock(&at->lock);
    return fits ? 0
                : sim_fail(ACL_MEMORY_ALLOCATION, "device %d: %lu bytes do not fit: %lu of %lu are taken", device->id,
                           (unsigned long)bytes, (unsigned long)taken, (unsigned long)all);
}

void sim_discharge(struct sim_device *device, uint64_t bytes)
{
    struct table *at = atomic_load(&table);
    if (!at)
        return;
    lock_table(at);
    own->charged[device->physical] -= bytes;
    pthread_mutex_unlock(&at->lock);
}

uint64_t sim_charged(struct sim_device *device)
{
    struct table *at = atomic_load(&table);
    if (!at)
        return 0;
    lock_table(at);
    reclaim(at);
    uint64_t taken = sum(at, device->physical);
    pthread_mutex_unlock(&at->lock);
    return taken;
}
