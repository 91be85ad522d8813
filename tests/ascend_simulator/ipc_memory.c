/* Device memory between processes of one server.

   The first letters of a key name a socket of the owner. An importer asks there, gets the file behind the memory, and
   keeps the connection for as long as it has the import: so each side sees at once when the other closes or dies. */
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define KEY_ROOM 65
#define KEY_LETTERS (KEY_ROOM - 1)
#define OWNER_LETTERS 16
#define MOST_CONNECTIONS 1024

struct request {
    char key[KEY_LETTERS];
    int32_t physical;
    int32_t may_cross; /* devices */
};

struct answer {
    int32_t code;
    int32_t physical;
    uint64_t offset, size, page;
};

struct export
{
    char key[KEY_ROOM];
    struct sim_view view; /* holds the allocation */
    bool for_all;
    int32_t *pids;
    size_t pid_count;
    struct export *next;
};

struct import {
    char key[KEY_ROOM];
    struct sim_range *range; /* also in the table of ranges, which holds it */
    struct import *next;
};

struct connection { /* at the owner; only the thread closes the socket */
    int socket;
    struct export *export; /* NULL when that is gone */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct export *exports;
static struct import *imports; /* oldest first */
static struct connection connections[MOST_CONNECTIONS];
static size_t connection_count;
static char owner_letters[OWNER_LETTERS];
static int listener = -1, wake = -1;
static bool stopping;
static pthread_t thread;

/* ---- the owner's side ---- */

static struct export *find_export(const char *key)
{
    struct export *export = exports;
    while (export && memcmp(export->key, key, KEY_LETTERS))
        export = export->next;
    return export;
}

static bool is_allowed(const struct export *export, int32_t pid)
{
    bool allowed = export->for_all;
    for (size_t i = 0; i < export->pid_count; i++)
        allowed = allowed || export->pids[i] == pid;
    return allowed;
}

/* What an importer gets; the export if it gets something. Under the lock. */
static struct export *decide(const struct request *request, int32_t pid, struct answer *answer)
{
    struct export *export = find_export(request->key);
    *answer = (struct answer){.code = ACL_PARAM_INVALID};
    if (!export)
        return NULL;
    const struct sim_range *range = export->view.range;
    answer->physical = range->physical;
    answer->code = ACL_NO_PERMISSION;
    if (!is_allowed(export, pid))
        return NULL;
    *answer = (struct answer){0, range->physical, export->view.offset, export->view.size, range->page};
    if (request->physical == range->physical)
        return export;
    if (!sim_devices_linked(range->physical, request->physical))
        answer->code = ACL_LINK_TYPE_NOT_SUPPORTED;
    else if (!request->may_cross)
        answer->code = ACL_INVALID_DEVICEID;
    return answer->code ? NULL : export;
}

static void greet(void)
{
    int socket = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (socket < 0)
        return;
    struct timeval patience = {.tv_sec = 2};
    struct request request;
    struct answer answer = {.code = ACL_IPC_ERROR}; /* no room for another importer */
    struct ucred who = {0};
    socklen_t length = sizeof who;
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &who, &length);
    if (sim_receive_files(socket, &request, sizeof request, NULL, 0)) {
        close(socket);
        return;
    }
    pthread_mutex_lock(&lock);
    struct export *export = connection_count < MOST_CONNECTIONS ? decide(&request, who.pid, &answer) : NULL;
    int file = export ? sim_device_file(export->view.device) : -1;
    bool sent = !sim_send_files(socket, &answer, sizeof answer, &file, export ? 1 : 0);
    if (export && sent)
        connections[connection_count++] = (struct connection){socket, export};
    else
        close(socket);
    pthread_mutex_unlock(&lock);
}

/* Closes what the other side has closed. */
static void sweep(const struct pollfd *files, size_t count)
{
    pthread_mutex_lock(&lock);
    for (size_t i = count; i-- > 0;)
        if (files[i].revents) {
            close(connections[i].socket);
            connections[i] = connections[--connection_count];
        }
    pthread_mutex_unlock(&lock);
}

static void *serve(void *unused)
{
    (void)unused;
    static struct pollfd files[MOST_CONNECTIONS + 2];
    for (;;) {
        eventfd_t ignored;
        pthread_mutex_lock(&lock);
        size_t count = connection_count;
        bool stop = stopping;
        for (size_t i = 0; i < count; i++)
            files[i + 2] = (struct pollfd){.fd = connections[i].socket, .events = POLLIN};
        files[0] = (struct pollfd){.fd = listener, .events = POLLIN};
        files[1] = (struct pollfd){.fd = wake, .events = POLLIN};
        pthread_mutex_unlock(&lock);
        if (stop)
            return NULL;
        if (poll(files, count + 2, -1) < 0)
            continue;
        if (files[1].revents)
            eventfd_read(wake, &ignored);
        sweep(files + 2, count);
        if (files[0].revents)
            greet();
    }
}

/* Under the lock. */
static int start_thread(const char *function)
{
    if (listener >= 0)
        return 0;
    int socket_ = -1, error = EADDRINUSE;
    for (int tries = 0; tries < 100 && error == EADDRINUSE; tries++) {
        struct sockaddr_un name;
        sim_nonce(owner_letters, OWNER_LETTERS);
        socklen_t length = sim_socket_name(&name, "ipc/%.*s", OWNER_LETTERS, owner_letters);
        socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        error = socket_ < 0 || bind(socket_, (struct sockaddr *)&name, length) || listen(socket_, 512) ? errno : 0;
        if (error && socket_ >= 0)
            close(socket_);
    }
    if (!error) {
        listener = socket_;
        wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        stopping = false;
        error = sim_thread_start(&thread, "sim-ipc", serve, NULL);
        if (error) {
            close(listener);
            close(wake);
            listener = wake = -1;
        }
    }
    return error ? sim_fail(ACL_IPC_ERROR, "%s: no socket for importers: %s", function, strerror(error)) : 0;
}

static int check_export(const char *function, const struct sim_view *view, struct sim_device *own)
{
    char text[160];
    sim_range_words(view->range, text, sizeof text);
    if (view->device != own)
        return sim_refuse("wrong_device", ACL_PARAM_INVALID, "%s: %s, but the current device is %d", function, text,
                          own->id);
    size_t page = view->range->page;
    if ((uintptr_t)view->address % page || view->size % page)
        return sim_refuse("unaligned", ACL_PARAM_INVALID,
                          "%s: %zu bytes at %p of %s: both must be multiples of its page, %zu", function, view->size,
                          view->address, text, page);
    return 0;
}

/* Takes the view over. */
static int add_export(const char *function, const struct sim_view *view, bool for_all, char *key)
{
    struct export *export = calloc(1, sizeof *export);
    if (!export)
        return sim_fail(ACL_BAD_ALLOC, "%s: no host memory", function);
    export->view = *view;
    export->for_all = for_all;
    pthread_mutex_lock(&lock);
    int code = start_thread(function);
    if (code) {
        free(export);
    } else {
        memcpy(export->key, owner_letters, OWNER_LETTERS);
        sim_nonce(export->key + OWNER_LETTERS, KEY_LETTERS - OWNER_LETTERS);
        memcpy(key, export->key, KEY_ROOM);
        export->next = exports;
        exports = export;
        atomic_fetch_add(&view->range->exports, 1);
        sim_count("live.exports", 1);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

SIM_API aclError aclrtIpcMemGetExportKey(void *address, size_t size, char *key, size_t length, uint64_t flags)
{
    struct sim_context *context;
    struct sim_view view;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!address || !size || !key)
        return sim_fail(ACL_INVALID_PARAM, "aclrtIpcMemGetExportKey: null or size 0");
    if (length != KEY_ROOM || flags > 1)
        return sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemGetExportKey: len %zu (must be 65), flags %lu", length,
                        (unsigned long)flags);
    code = sim_view_open(__func__, address, size, &view);
    if (code)
        return code;
    if (view.where != SIM_DEVICE)
        code = sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemGetExportKey: %p is not device memory of this process", address);
    else
        code = check_export(__func__, &view, sim_context_device(context));
    if (!code)
        code = add_export(__func__, &view, flags & 1, key);
    if (code)
        sim_view_close(&view);
    return code;
}

SIM_API aclError aclrtIpcMemSetImportPid(const char *key, int32_t *pids, size_t count)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!key || !pids || !count)
        return sim_fail(ACL_INVALID_PARAM, "aclrtIpcMemSetImportPid: null or num 0");
    pthread_mutex_lock(&lock);
    struct export *export = strnlen(key, KEY_ROOM) == KEY_LETTERS ? find_export(key) : NULL;
    int32_t *more = export ? realloc(export->pids, (export->pid_count + count) * sizeof *more) : NULL;
    if (!export)
        code = sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemSetImportPid: no export of this process has the key");
    else if (!more)
        code = sim_fail(ACL_BAD_ALLOC, "aclrtIpcMemSetImportPid: no host memory");
    if (more) {
        memcpy(more + export->pid_count, pids, count * sizeof *more);
        export->pids = more;
        export->pid_count += count;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* How many processes have it imported at this moment. Under the lock. */
static size_t importers(const struct export *export)
{
    size_t count = 0;
    for (size_t i = 0; i < connection_count; i++) {
        char byte;
        if (connections[i].export == export)
            count += recv(connections[i].socket, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
    }
    return count;
}

/* Under the lock. */
static void remove_export(struct export *export)
{
    struct export **link = &exports;
    while (*link != export)
        link = &(*link)->next;
    *link = export->next;
    for (size_t i = 0; i < connection_count; i++)
        if (connections[i].export == export) {
            connections[i].export = NULL;
            shutdown(connections[i].socket, SHUT_RDWR); /* for those who still have it imported the owner is gone */
        }
    atomic_fetch_sub(&export->view.range->exports, 1);
    sim_view_close(&export->view);
    free(export->pids);
    free(export);
    sim_count("live.exports", -1);
}

size_t sim_exports_alive(const struct sim_device *device)
{
    size_t count = 0;
    pthread_mutex_lock(&lock);
    for (struct export *export = exports; export; export = export->next)
        count += export->view.device == device;
    pthread_mutex_unlock(&lock);
    return count;
}

/* ---- the importer's side ---- */

static void free_import(struct sim_range *range)
{
    munmap(range->bytes, range->size);
    sim_import_space_free((void *)range->address, range->block_size);
    close(range->connection);
    free(range);
}

static int ask_owner(const char *function, const char *key, const struct request *request, struct answer *answer,
                     int *connection, int *file)
{
    struct sockaddr_un name;
    socklen_t length = sim_socket_name(&name, "ipc/%.*s", OWNER_LETTERS, key);
    struct timeval patience = {.tv_sec = 10};
    int socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    int error = connect(socket_, (struct sockaddr *)&name, length) ? errno : 0;
    if (!error)
        error = sim_send_files(socket_, request, sizeof *request, NULL, 0);
    *file = -1;
    if (!error) {
        error = sim_receive_files(socket_, answer, sizeof *answer, file, 1);
        if (error == EPROTO && answer->code) /* refusals bring no file */
            error = 0;
    }
    if (error) {
        close(socket_);
        return sim_fail(ACL_IPC_ERROR, "%s: the owner of the key does not answer: %s", function, strerror(error));
    }
    *connection = socket_;
    return 0;
}

static int refusal(const char *function, const struct answer *answer, struct sim_device *own)
{
    switch (answer->code) {
    case ACL_NO_PERMISSION:
        return sim_fail(answer->code, "%s: this process is not on the owner's white list", function);
    case ACL_LINK_TYPE_NOT_SUPPORTED:
        return sim_fail(answer->code, "%s: no link between devices %d and %d of the server", function, own->physical,
                        answer->physical);
    case ACL_INVALID_DEVICEID:
        return sim_refuse(
            "wrong_device", ACL_PARAM_INVALID,
            "%s: memory of device %d of the server for device %d: neither flag 1 nor aclrtDeviceEnablePeerAccess",
            function, answer->physical, own->physical);
    case ACL_IPC_ERROR:
        return sim_fail(answer->code, "%s: the owner has %d imports and no room for more", function, MOST_CONNECTIONS);
    default:
        return sim_fail(answer->code, "%s: the owner has no export with this key", function);
    }
}

/* Both mappings of what the owner gave, as a range; takes the connection over. */
static struct sim_range *map_import(const struct answer *answer, int file, int connection, struct sim_device *own)
{
    struct sim_range *range = calloc(1, sizeof *range);
    void *address = sim_import_space(answer->size, answer->page);
    void *bytes =
        mmap(NULL, answer->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, (off_t)answer->offset);
    if (!range || !address || bytes == MAP_FAILED) {
        free(range);
        if (address)
            sim_import_space_free(address, answer->size);
        if (bytes != MAP_FAILED)
            munmap(bytes, answer->size);
        return NULL;
    }
    if (sim_knob(SIM_HOST_VISIBLE))
        mmap(address, answer->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, (off_t)answer->offset);
    madvise(bytes, answer->size, MADV_DONTDUMP);
    *range = (struct sim_range){.where = SIM_IMPORTED,
                                .device = own,
                                .physical = answer->physical,
                                .address = (uintptr_t)address,
                                .size = answer->size,
                                .block_size = answer->size,
                                .bytes = bytes,
                                .page = answer->page,
                                .connection = connection,
                                .free = free_import};
    return range;
}

static int add_import(const char *function, const char *key, struct sim_range *range)
{
    struct import *import = calloc(1, sizeof *import);
    int code = import ? sim_range_add(range) : sim_fail(ACL_BAD_ALLOC, "%s: no host memory", function);
    if (code) {
        free(import);
        free_import(range);
        return code;
    }
    memcpy(import->key, key, KEY_LETTERS);
    import->range = range;
    pthread_mutex_lock(&lock);
    struct import **last = &imports;
    while (*last)
        last = &(*last)->next;
    *last = import;
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Was access enabled to the device with this physical id? */
static bool any_peer_enabled(struct sim_device *own, int32_t physical)
{
    for (int i = 0; i < sim_device_count(); i++)
        if (sim_device(i)->physical == physical)
            return sim_peer_enabled(own, sim_device(i));
    return false;
}

static int import_memory(const char *function, const char *key, bool may_cross, struct sim_device *own, void **address)
{
    struct request request = {.physical = own->physical, .may_cross = may_cross};
    struct answer answer = {0};
    int connection = -1, file = -1;
    memcpy(request.key, key, KEY_LETTERS);
    int code = ask_owner(function, key, &request, &answer, &connection, &file);
    if (code)
        return code;
    if (answer.code == ACL_INVALID_DEVICEID && any_peer_enabled(own, answer.physical)) {
        close(connection);
        return import_memory(function, key, true, own, address);
    }
    struct sim_range *range = answer.code ? NULL : map_import(&answer, file, connection, own);
    if (file >= 0)
        close(file);
    if (range) {
        code = add_import(function, key, range);
        if (!code)
            *address = (void *)range->address;
        return code;
    }
    close(connection);
    return answer.code
               ? refusal(function, &answer, own)
               : sim_fail(ACL_IPC_ERROR, "%s: %lu bytes cannot be mapped", function, (unsigned long)answer.size);
}

SIM_API aclError aclrtIpcMemImportByKey(void **address, const char *key, uint64_t flags)
{
    struct sim_context *context;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, &context);
    if (code)
        return code;
    if (!address || !key)
        return sim_fail(ACL_INVALID_PARAM, "aclrtIpcMemImportByKey: null");
    if (flags > 1 || strnlen(key, KEY_ROOM) != KEY_LETTERS)
        return sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemImportByKey: flags %lu, or not a key", (unsigned long)flags);
    return import_memory(__func__, key, flags & 1, sim_context_device(context), address);
}

/* The oldest import under the key, out of the list; NULL if there is none. Under the lock. */
static struct import *take_import(const char *key)
{
    struct import **link = &imports;
    while (*link && memcmp((*link)->key, key, KEY_LETTERS))
        link = &(*link)->next;
    struct import *import = *link;
    if (import)
        *link = import->next;
    return import;
}

static void drop_import(struct import *import)
{
    if (sim_range_take(import->range))
        sim_range_put(import->range);
    free(import);
}

static int close_import(const char *function, const char *key, bool *found)
{
    pthread_mutex_lock(&lock);
    struct import *import = imports;
    while (import && memcmp(import->key, key, KEY_LETTERS))
        import = import->next;
    *found = import;
    int code = 0;
    if (import) {
        char text[160];
        const char *user = sim_used_by((void *)import->range->address, import->range->size);
        if (user)
            code = sim_misuse("use_after_free", ACL_PARAM_INVALID, "%s: %s is still used by a queued %s", function,
                              sim_range_words(import->range, text, sizeof text), user);
        if (!code)
            drop_import(take_import(key));
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int close_export(const char *function, const char *key)
{
    pthread_mutex_lock(&lock);
    struct export *export = find_export(key);
    size_t users = export ? importers(export) : 0;
    int code = 0;
    if (!export)
        code =
            sim_refuse("double_free", ACL_PARAM_INVALID, "%s: the key is neither imported nor exported here", function);
    else if (users)
        code = sim_misuse("ipc_close_order", ACL_PARAM_INVALID,
                          "%s: the export is closed while %zu imports of it are open", function, users);
    if (!code)
        remove_export(export);
    pthread_mutex_unlock(&lock);
    return code;
}

SIM_API aclError aclrtIpcMemClose(const char *key)
{
    bool imported;
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!key)
        return sim_fail(ACL_INVALID_PARAM, "aclrtIpcMemClose: key is null");
    if (strnlen(key, KEY_ROOM) != KEY_LETTERS)
        return sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemClose: not a key");
    code = close_import(__func__, key, &imported);
    return imported ? code : close_export(__func__, key);
}

SIM_API aclError aclrtIpcMemSetAttr(const char *key, int type, uint64_t attribute)
{
    int code = sim_enter(__func__, SIM_NEEDS_CONTEXT, NULL);
    if (code)
        return code;
    if (!key || type != 0 || attribute > 3)
        return sim_fail(ACL_PARAM_INVALID, "aclrtIpcMemSetAttr: key %p, type %d, attr %lu", (const void *)key, type,
                        (unsigned long)attribute);
    return sim_is_a3() ? 0 : sim_fail(ACL_FEATURE_NOT_SUPPORT, "aclrtIpcMemSetAttr: A3 only");
}

/* ---- the end ---- */

void sim_ipc_clear(struct sim_device *device)
{
    pthread_mutex_lock(&lock);
    for (struct export *export = exports, *next; export; export = next) {
        next = export->next;
        if (export->view.device == device)
            remove_export(export);
    }
    for (struct import **link = &imports; *link;) {
        struct import *import = *link;
        if (import->range->device == device) {
            *link = import->next;
            drop_import(import);
        } else {
            link = &import->next;
        }
    }
    pthread_mutex_unlock(&lock);
}

static void close_sockets(void)
{
    for (size_t i = 0; i < connection_count; i++)
        close(connections[i].socket);
    connection_count = 0;
    if (listener >= 0) {
        close(listener);
        close(wake);
    }
    listener = wake = -1;
}

/* After all devices were cleared. */
void sim_ipc_close(void)
{
    pthread_mutex_lock(&lock);
    bool started = listener >= 0;
    stopping = true;
    if (started)
        eventfd_write(wake, 1);
    pthread_mutex_unlock(&lock);
    if (started)
        pthread_join(thread, NULL);
    close_sockets();
}

/* Around fork: the child must not keep connections alive that the parent's death should close. */
void sim_ipc_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

void sim_ipc_after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

void sim_ipc_forked(void)
{
    close_sockets();
    for (struct import *import = imports; import; import = import->next)
        close(import->range->connection);
}
