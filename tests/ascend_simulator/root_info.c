/* Creation by root information: all ranks introduce themselves to the root, which tells each who the others are. */
#include "communicator.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MARKER "LLMDD-SIMULATED-ROOT"
#define PROTOCOL 1u
#define NONCE_LETTERS 24
#define DIAL_MS 100
#define REDIAL_NS 2000000ull

struct root_bytes { /* what HcclRootInfo holds; zeros behind */
    char marker[24];
    uint32_t protocol;
    char nonce[NONCE_LETTERS + 1];
    char address[64];
    char remote[64]; /* for ranks on other servers; empty without HCCL_IF_IP */
    uint64_t server;
};
_Static_assert(sizeof(struct root_bytes) < HCCL_ROOT_INFO_BYTES, "root information");

struct join {
    char version[32];
    char name[HCCL_NAME_BYTES];
    char door[ADDRESS_BYTES];
    char remote_door[ADDRESS_BYTES];
    uint64_t server;
    uint32_t rank, ranks, physical, process;
    uint32_t buffer_mib;
};

struct newcomer {
    struct newcomer *next;
    struct root *root;
    struct socket *socket;
    bool spoke;
    struct join join;
};

/* The gathering place. It is closed when everybody came, and when the creation in its own process has ended. */
struct root {
    struct root *next;
    struct sim_device *device;
    struct socket *listener, *remote_listener;
    struct newcomer *newcomers;
    char nonce[NONCE_LETTERS + 1];
};

/* What the root answers; the members' `struct join` follow in a body of success, a text in one of failure. */
struct joining { /* this process as a newcomer */
    pthread_cond_t changed;
    struct communicator *communicator;
    struct socket *socket;
    uint64_t server;
    bool answered;
    HcclResult result;
    char reason[256];
};

static struct root *roots;
static pthread_cond_t ending = PTHREAD_COND_INITIALIZER;
static bool finalizing;
static struct joining *joinings[SIM_MAX_DEVICES]; /* one thread of a device at a time */
static bool creating[SIM_MAX_DEVICES];

/* ---- the root's side ---- */

static void forget(struct newcomer *newcomer)
{
    for (struct newcomer **at = &newcomer->root->newcomers; *at != NULL; at = &(*at)->next)
        if (*at == newcomer) {
            *at = newcomer->next;
            break;
        }
    free(newcomer);
}

static void close_gathering(struct root *root)
{
    while (root->newcomers != NULL) {
        socket_finish(root->newcomers->socket);
        forget(root->newcomers);
    }
    if (root->listener != NULL)
        socket_close(root->listener);
    if (root->remote_listener != NULL)
        socket_close(root->remote_listener);
    root->listener = root->remote_listener = NULL;
}

static void tell_all(struct root *root, HcclResult result, const void *body, size_t length)
{
    for (struct newcomer *newcomer = root->newcomers; newcomer != NULL; newcomer = newcomer->next)
        socket_send(newcomer->socket,
                    (struct frame){.kind = FRAME_JOINED, .number = (uint64_t)result, .body = (uint32_t)length}, body,
                    -1);
    close_gathering(root);
}

/* NULL when the two may be ranks of one communicator. */
static const char *conflict(const struct join *a, const struct join *b)
{
    if (strcmp(a->version, b->version) != 0)
        return "versions of the simulator differ";
    if (a->ranks != b->ranks)
        return "numbers of ranks differ";
    if (strcmp(a->name, b->name) != 0)
        return "names differ";
    if (a->buffer_mib != b->buffer_mib)
        return "buffer sizes differ";
    if (a->rank == b->rank)
        return "two have the same rank";
    if (a->server != b->server && (a->remote_door[0] == '\0' || b->remote_door[0] == '\0'))
        return "ranks on different servers need HCCL_IF_IP";
    if (a->server == b->server && a->physical == b->physical)
        return "two are on the same device";
    return NULL;
}

static void refuse_all(struct root *root, const struct join *a, const struct join *b, const char *what)
{
    char text[256];
    int length =
        snprintf(text, sizeof text, "%s (rank %u of %u, \"%.40s\", device %u; rank %u of %u, \"%.40s\", device %u)",
                 what, a->rank, a->ranks, a->name, a->physical, b->rank, b->ranks, b->name, b->physical);
    tell_all(root, HCCL_E_PARA, text, (size_t)length);
}

static void look_whether_complete(struct root *root, const struct newcomer *latest)
{
    struct join members[COMMUNICATOR_RANKS_MAX];
    uint32_t present = 0;
    for (struct newcomer *other = root->newcomers; other != NULL; other = other->next) {
        if (!other->spoke)
            continue;
        const char *what = other == latest ? NULL : conflict(&latest->join, &other->join);
        if (what != NULL) {
            refuse_all(root, &latest->join, &other->join, what);
            return;
        }
        members[other->join.rank] = other->join;
        present++;
    }
    if (present == latest->join.ranks)
        tell_all(root, HCCL_SUCCESS, members, present * sizeof *members);
}

static void newcomer_frame(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd)
{
    struct newcomer *newcomer = owner;
    struct join *join = &newcomer->join;
    (void)fd;
    if (!newcomer->spoke && frame->kind == FRAME_JOIN && frame->body == sizeof *join) {
        memcpy(join, body, sizeof *join);
        join->name[sizeof join->name - 1] = join->door[sizeof join->door - 1] = '\0';
        join->remote_door[sizeof join->remote_door - 1] = join->version[sizeof join->version - 1] = '\0';
        if (join->ranks <= COMMUNICATOR_RANKS_MAX && join->rank < join->ranks) {
            newcomer->spoke = true;
            look_whether_complete(newcomer->root, newcomer);
            return;
        }
    }
    forget(newcomer);
    socket_close(socket);
}

static void newcomer_end(struct socket *socket, void *owner)
{
    (void)socket;
    forget(owner);
}

static void newcomer_arrives(struct socket *listener, void *owner, struct socket *accepted)
{
    struct root *root = owner;
    struct newcomer *newcomer = calloc(1, sizeof *newcomer);
    (void)listener;
    if (newcomer == NULL) {
        socket_close(accepted);
        return;
    }
    *newcomer = (struct newcomer){.next = root->newcomers, .root = root, .socket = accepted};
    root->newcomers = newcomer;
    socket_serve(accepted, newcomer_frame, newcomer_end, newcomer);
}

/* Mutex held; it is let go while the sockets' thread ends. */
static void free_root(struct root *root)
{
    close_gathering(root);
    for (struct root **at = &roots; *at != NULL; at = &(*at)->next)
        if (*at == root) {
            *at = root->next;
            break;
        }
    free(root);
    reception_release();
}

/* What two processes on one server have in common, and no two servers: kernel, network namespace and world. */
static uint64_t server_identity(void)
{
    char text[512] = "";
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, text, 64) : 0;
    if (fd >= 0)
        close(fd);
    length = length > 0 ? length : 0;
    ssize_t more = readlink("/proc/self/ns/net", text + length, 128);
    length += more > 0 ? more : 0;
    sim_knob_text(SIM_WORLD, text + length, sizeof text - (size_t)length);
    return rank_table_digest(text);
}

/* Mutex held. */
static bool listen_for_newcomers(struct root *root, struct root_bytes *bytes)
{
    const char *host_ip = hccl_environment("HcclGetRootInfo")->host_ip;
    root->listener = socket_listen(bytes->address, newcomer_arrives, root);
    if (root->listener == NULL || host_ip[0] == '\0')
        return root->listener != NULL;
    char address[64];
    snprintf(address, sizeof address, "tcp:0:%s", host_ip);
    root->remote_listener = socket_listen(address, newcomer_arrives, root);
    if (root->remote_listener != NULL)
        snprintf(bytes->remote, sizeof bytes->remote, "tcp:%u:%s", socket_port(root->remote_listener), host_ip);
    else
        socket_close(root->listener);
    return root->remote_listener != NULL;
}

static HcclResult open_root(struct sim_device *device, struct root_bytes *bytes)
{
    struct root *root = calloc(1, sizeof *root);
    if (root == NULL)
        return sim_fail(HCCL_E_MEMORY, "HcclGetRootInfo: no memory");
    root->device = device;
    sim_nonce(root->nonce, NONCE_LETTERS);
    strcpy(bytes->marker, MARKER);
    bytes->protocol = PROTOCOL;
    strcpy(bytes->nonce, root->nonce);
    snprintf(bytes->address, sizeof bytes->address, "unix:hccl-root-%s", root->nonce);
    bytes->server = server_identity();
    reception_lock();
    bool held = reception_hold(), good = held && listen_for_newcomers(root, bytes);
    if (good) {
        root->next = roots;
        roots = root;
    } else if (held) {
        reception_release();
    }
    reception_unlock();
    if (good)
        return HCCL_SUCCESS;
    free(root);
    return sim_fail(HCCL_E_SYSCALL, "HcclGetRootInfo: cannot listen (HCCL_IF_IP must be an address of this server)");
}

SIM_API HcclResult HcclGetRootInfo(HcclRootInfo *info)
{
    struct sim_context *context;
    int code = sim_enter("HcclGetRootInfo", SIM_HCCL | SIM_NEEDS_CONTEXT, &context);
    if (code != 0)
        return code;
    if (info == NULL)
        return sim_fail(HCCL_E_PTR, "HcclGetRootInfo: no place for the information");
    if (hccl_environment("HcclGetRootInfo") == NULL)
        return HCCL_E_PARA;
    struct root_bytes bytes;
    memset(&bytes, 0, sizeof bytes); /* with what is between the fields */
    HcclResult result = open_root(sim_context_device(context), &bytes);
    memset(info, 0, sizeof *info);
    if (result == HCCL_SUCCESS)
        memcpy(info->internal, &bytes, sizeof bytes);
    return result;
}

static struct root *own_root(const char *nonce)
{
    struct root *root = roots;
    while (root != NULL && strcmp(root->nonce, nonce) != 0)
        root = root->next;
    return root;
}

/* ---- a newcomer's side ---- */

static void take_members(struct joining *joining, const struct frame *frame, const char *body)
{
    struct communicator *c = joining->communicator;
    if (frame->body != c->ranks * sizeof(struct join)) {
        joining->result = HCCL_E_INTERNAL;
        return;
    }
    for (uint32_t rank = 0; rank < c->ranks; rank++) {
        struct join join;
        memcpy(&join, body + rank * sizeof join, sizeof join);
        bool near = join.server == joining->server;
        c->members[rank] =
            (struct member){.physical = join.physical, .same_server = near, .roce = !near || hccl_roce_inside_server()};
        snprintf(c->members[rank].door, ADDRESS_BYTES, "%.*s", ADDRESS_BYTES - 1, near ? join.door : join.remote_door);
    }
    c->members_known = true;
    meeting_admit_waiting(c);
}

static void answer(struct socket *socket, void *owner, const struct frame *frame, const char *body, int *fd)
{
    struct joining *joining = owner;
    (void)fd;
    if (frame->kind != FRAME_JOINED)
        return;
    joining->answered = true;
    joining->result = (HcclResult)frame->number;
    if (joining->result == HCCL_SUCCESS)
        take_members(joining, frame, body);
    else
        snprintf(joining->reason, sizeof joining->reason, "%s", body);
    joining->socket = NULL;
    socket_close(socket);
    pthread_cond_broadcast(&joining->changed);
}

static void root_is_gone(struct socket *socket, void *owner)
{
    struct joining *joining = owner;
    (void)socket;
    joining->socket = NULL;
    pthread_cond_broadcast(&joining->changed);
}

static void introduce(struct joining *joining, int fd, const struct join *join)
{
    joining->socket = socket_adopt(fd, answer, root_is_gone, joining);
    if (joining->socket == NULL)
        close(fd);
    else
        socket_send(joining->socket, (struct frame){.kind = FRAME_JOIN, .body = sizeof *join}, join, -1);
}

/* Until the root has answered or the time is over. Mutex held, let go while waiting. */
static void await_answer(struct joining *joining, const char *address, const struct join *join, uint64_t deadline)
{
    while (!joining->answered && !finalizing && sim_now() < deadline) {
        if (joining->socket != NULL) {
            reception_wait(&joining->changed, deadline);
            continue;
        }
        reception_unlock();
        int fd = socket_dial(address, DIAL_MS);
        reception_lock();
        uint64_t soon = sim_now() + REDIAL_NS;
        if (fd >= 0)
            introduce(joining, fd, join);
        else
            reception_wait(&joining->changed, soon < deadline ? soon : deadline);
    }
    if (joining->socket != NULL)
        socket_close(joining->socket);
}

static HcclResult meet_root(const char *function, struct communicator *c, const struct root_bytes *info)
{
    struct join join = {.rank = c->rank,
                        .ranks = c->ranks,
                        .physical = (uint32_t)c->device->physical,
                        .process = (uint32_t)getpid(),
                        .buffer_mib = (uint32_t)(c->charged >> 21)};
    strcpy(join.version, SIM_VERSION);
    strcpy(join.name, c->name);
    snprintf(join.door, sizeof join.door, "%s", meeting_own_door());
    join.server = server_identity();
    if (c->doors[1] != NULL)
        snprintf(join.remote_door, sizeof join.remote_door, "tcp:%u:%s", meeting_door_port(c, 1),
                 hccl_environment(function)->host_ip);
    uint64_t deadline = sim_now() + hccl_scaled_ns((double)hccl_environment(function)->connect_timeout_s);
    const char *address = join.server == info->server || info->remote[0] == '\0' ? info->address : info->remote;
    struct joining joining = {.communicator = c, .server = join.server};
    sim_condition_init(&joining.changed);
    reception_lock();
    joinings[c->device->id] = &joining;
    await_answer(&joining, address, &join, deadline);
    joinings[c->device->id] = NULL;
    bool ended = finalizing;
    reception_unlock();
    pthread_cond_destroy(&joining.changed);
    if (!joining.answered && ended)
        return sim_fail(HCCL_E_INTERNAL, "%s: aclFinalize was called meanwhile", function);
    if (!joining.answered)
        return sim_fail(HCCL_E_TIMEOUT, "%s: not all of %u ranks came, or this root information was used before",
                        function, c->ranks);
    if (joining.result != HCCL_SUCCESS)
        return sim_fail(joining.result, "%s: %s", function, joining.reason);
    return HCCL_SUCCESS;
}

static HcclResult join(const char *function, struct communicator *c, const struct root_bytes *info)
{
    snprintf(c->key, sizeof c->key, "root:%s", info->nonce);
    if (c->name[0] == '\0')
        snprintf(c->name, sizeof c->name, "unnamed_%s", info->nonce);
    const char *host_ip = hccl_environment(function)->host_ip;
    HcclResult result = meeting_open_door(function, c, 0, meeting_own_door());
    if (result == HCCL_SUCCESS && host_ip[0] != '\0') {
        char remote[ADDRESS_BYTES];
        snprintf(remote, sizeof remote, "tcp:0:%s", host_ip);
        result = meeting_open_door(function, c, 1, remote);
    }
    if (result != HCCL_SUCCESS)
        return result;
    struct sim_fault fault = sim_fault("link.meet", c->device->id, NULL, NULL, NULL);
    if (fault.action == SIM_CODE) /* or the end of a hang by aclFinalize */
        return sim_fail(sim_running() ? fault.code : HCCL_E_INTERNAL, "%s: fault injected at link.meet", function);
    if (fault.action == SIM_EOF)
        return sim_fail(HCCL_E_TCP_TRANSFER, "%s: fault injected at link.meet", function);
    if (fault.action == SIM_ASYNC)
        atomic_store(&c->async_error, fault.code);
    return meet_root(function, c, info);
}

/* ---- the calls ---- */

static HcclResult read_root(const char *function, const HcclRootInfo *given, struct root_bytes *info)
{
    static const char zeros[HCCL_ROOT_INFO_BYTES];
    memcpy(info, given->internal, sizeof *info);
    size_t rest = sizeof given->internal - sizeof *info;
    if (strncmp(info->marker, MARKER, sizeof info->marker) != 0 || info->protocol != PROTOCOL ||
        memchr(info->nonce, '\0', sizeof info->nonce) == NULL ||
        memchr(info->address, '\0', sizeof info->address) == NULL ||
        memchr(info->remote, '\0', sizeof info->remote) == NULL)
        return sim_fail(HCCL_E_PARA, "%s: these bytes are no root information", function);
    if (memcmp(given->internal + sizeof *info, zeros, rest) != 0)
        return sim_fail(HCCL_E_PARA, "%s: the end of the root information was changed", function);
    return HCCL_SUCCESS;
}

/* Takes the device's only place for a creation. */
static HcclResult take_place(const char *function, const struct sim_device *device, const char *nonce)
{
    reception_lock();
    const struct root *root = own_root(nonce);
    HcclResult result = HCCL_SUCCESS;
    if (creating[device->id])
        result = sim_refuse("comm_thread", HCCL_E_PARA, "%s: another thread of device %d is in a creation", function,
                            device->id);
    else if (root != NULL && root->device != device)
        result = sim_refuse("comm_thread", HCCL_E_PARA, "%s: the root information was made on device %d, this is %d",
                            function, root->device->id, device->id);
    else
        creating[device->id] = true;
    reception_unlock();
    return result;
}

static void leave_place(const struct sim_device *device, const char *nonce)
{
    reception_lock();
    creating[device->id] = false;
    struct root *root = own_root(nonce);
    if (root != NULL)
        free_root(root);
    pthread_cond_broadcast(&ending);
    reception_unlock();
}

static HcclResult init(const char *function, uint32_t ranks, const HcclRootInfo *given, uint32_t rank,
                       const HcclCommConfig *config, HcclComm *handle)
{
    struct sim_context *context;
    struct root_bytes info;
    HcclResult result = creation_device(function, &context);
    if (result != HCCL_SUCCESS)
        return result;
    if (given == NULL || handle == NULL)
        return sim_fail(HCCL_E_PTR, "%s: rootInfo or comm is NULL", function);
    if (ranks < 1 || ranks > COMMUNICATOR_RANKS_MAX || rank >= ranks)
        return sim_fail(HCCL_E_PARA, "%s: rank %u of %u", function, rank, ranks);
    struct sim_device *device = sim_context_device(context);
    result = read_root(function, given, &info);
    if (result == HCCL_SUCCESS)
        result = take_place(function, device, info.nonce);
    if (result != HCCL_SUCCESS)
        return result;
    struct communicator *c = NULL;
    result = communicator_begin(
        &(struct creation){.function = function, .config = config, .rank = rank, .ranks = ranks, .device = device}, &c);
    if (result == HCCL_SUCCESS && (result = join(function, c, &info)) != HCCL_SUCCESS)
        communicator_discard(c);
    leave_place(device, info.nonce);
    return result == HCCL_SUCCESS ? communicator_publish(c, handle) : result;
}

SIM_API HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *info, uint32_t rank, HcclComm *comm)
{
    return init("HcclCommInitRootInfo", ranks, info, rank, NULL, comm);
}

SIM_API HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *info, uint32_t rank,
                                              const HcclCommConfig *config, HcclComm *comm)
{
    if (config == NULL)
        return sim_fail(HCCL_E_PTR, "HcclCommInitRootInfoConfig: config is NULL");
    return init("HcclCommInitRootInfoConfig", ranks, info, rank, config, comm);
}

static bool anybody_creating(void)
{
    for (int device = 0; device < SIM_MAX_DEVICES; device++)
        if (creating[device])
            return true;
    return false;
}

void root_info_finalize(void)
{
    reception_lock();
    finalizing = true;
    for (int device = 0; device < SIM_MAX_DEVICES; device++)
        if (joinings[device] != NULL)
            pthread_cond_broadcast(&joinings[device]->changed);
    while (anybody_creating())
        reception_wait(&ending, UINT64_MAX);
    while (roots != NULL)
        free_root(roots);
    finalizing = false;
    reception_unlock();
}
