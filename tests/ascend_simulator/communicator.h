/* A communicator, its links to the other ranks, and what the files of the communication half share about them.
 *
 * All fields that change are guarded by the mutex of reception.h, except where a field says otherwise. */
#ifndef COMMUNICATOR_H
#define COMMUNICATOR_H

#include "hccl_environment.h"
#include "hccl_types.h"
#include "rank_table.h"
#include "reception.h"
#include "simulator.h"

#define COMMUNICATOR_RANKS_MAX RANK_TABLE_RANKS_MAX
#define ADDRESS_BYTES 128
#define KEY_BYTES 160

enum frame_kind {
    FRAME_JOIN = 1, /* root_info.c */
    FRAME_JOINED,
    FRAME_HELLO, /* meeting.c */
    FRAME_WELCOME,
    FRAME_REFUSED,
    FRAME_GOODBYE,
    FRAME_MEMORY, /* peer_memory.c */
    FRAME_READ,
    FRAME_WRITE,
    FRAME_DONE,
    FRAME_OPEN, /* send_receive.c */
    FRAME_CLOSE,
    FRAME_READY,
    FRAME_COPIED,
    FRAME_CONFIRMED,
    FRAME_CANCELLED,
    FRAME_PREPARED, /* one_sided.c */
    FRAME_UNPREPARED,
};

/* Who takes part, as a rank knows it after creation. */
struct member {
    uint32_t physical;
    bool same_server;
    bool roce;
    char door[ADDRESS_BYTES]; /* where it waits for higher ranks */
};

/* What the peer said about one operation of a lane that waits for ours. */
struct announcement {
    struct announcement *next;
    uint64_t number, count, offset, limit;
    HcclDataType type;
    uint32_t flags;
};

enum entry_point { ENTRY_SINGLE, ENTRY_BATCH, ENTRY_BARRIER, ENTRY_POINTS };
enum role { ROLE_SEND, ROLE_RECEIVE, ROLES };

/* Operations of one entry point in one direction: matched by their numbers. `role` is this end's. */
struct lane {
    bool said; /* our first operation is known to the peer */
    bool heard;
    bool open;
    uint64_t peer_count;
    HcclDataType peer_type;
    uint64_t next_number;
    struct announcement *first, **last;
};

struct peer_region {
    int32_t type;
    uint64_t number, address, size, offset; /* offset in the file of the peer's device */
};

struct remote_request;
struct door;

struct link {
    struct communicator *communicator;
    uint32_t peer;
    struct socket *socket;
    bool met;
    bool dialing;
    bool cut_when_met; /* fault: the connection breaks as soon as it is there */
    bool goodbye;      /* the peer destroyed its communicator */
    bool memory_sent;
    int refused; /* code, with the reason below: the two ends do not belong together */
    char reason[256];
    uint64_t died_at; /* sim_now, 0 while it lives */
    struct lane lanes[ENTRY_POINTS][ROLES];

    pthread_rwlock_t map_lock; /* held for reading while a piece is copied */
    atomic_bool dead;          /* set with map_lock held for writing */
    unsigned char *map;
    size_t map_size;

    struct remote_request *requests;
    bool prepared_heard;
    struct peer_region *regions;
    size_t region_count;
};

struct transfer;
struct one_sided_call;
struct binding;

struct communicator {
    struct sim_object object;
    struct communicator *next;
    char key[KEY_BYTES]; /* the same on all ranks, and of no other communicator */
    char name[HCCL_NAME_BYTES];
    uint64_t digest;
    struct sim_device *device;
    uint32_t rank, ranks;
    struct member *members;
    struct link *links; /* by rank; the own one stays unused */
    struct door *doors[2];
    pthread_cond_t changed;
    uint64_t execution_timeout_ns;
    uint64_t charged;
    atomic_int async_error;
    bool members_known;
    bool listed; /* visible to callers */
    bool closing;
    int setting_up; /* calls that wait for a peer */
    int enqueuing;  /* calls that are inside otherwise */
    bool aborted;   /* an operation was dropped: the order is unknown */
    bool failed;    /* an operation ended with a code: partners may be missing */
    struct transfer *transfers;
    struct one_sided_call *one_sided;
    size_t queued;
    struct sim_stream *stream; /* of the queued operations */
    struct binding *bindings;
    bool prepared;
};

/* ---- communicator.c ---- */

/* What every call on a communicator begins with: entered, found, of the thread's device. Held until communicator_leave.
 * `setting_up` is whether destroying it may end the call. */
HcclResult communicator_enter(const char *function, HcclComm handle, bool setting_up, struct sim_context **context,
                              struct communicator **communicator);
void communicator_leave(struct communicator *communicator, bool setting_up);
struct communicator *communicator_list(void); /* mutex held */

/* A communicator under construction: not found by callers before communicator_publish. */
struct creation {
    const char *function;
    const HcclCommConfig *config; /* may be NULL */
    bool needs_name;
    uint32_t rank, ranks;
    struct sim_device *device;
};
HcclResult communicator_begin(const struct creation *creation, struct communicator **made);
HcclResult communicator_publish(struct communicator *made, HcclComm *handle);
void communicator_discard(struct communicator *made);
/* The device of the thread, for a creation; misuse comm_thread without one. */
HcclResult creation_device(const char *function, struct sim_context **context);

/* ---- meeting.c ---- */

/* The door of this process for members on the same server that found each other by root information. */
const char *meeting_own_door(void);
/* Lets higher ranks in at `address`; `slot` is 0 or 1. */
HcclResult meeting_open_door(const char *function, struct communicator *communicator, int slot, const char *address);
unsigned meeting_door_port(struct communicator *communicator, int slot);
void meeting_close_doors(struct communicator *communicator);
/* After the members are known: takes in those who came too early. */
void meeting_admit_waiting(struct communicator *communicator);
/* Until both ends know each other. Mutex held; it is let go while waiting. */
HcclResult meeting_await(const char *function, struct link *link, uint64_t deadline);
/* Fault: the connection breaks; returns when this end has noticed, or with the task's abort. Without the mutex. */
void meeting_cut(struct link *link, struct sim_task *task);
/* The end of a link by our own will. */
void meeting_part(struct link *link);
/* Wakes all tasks and calls of the communicator. */
void communicator_wake(struct communicator *communicator);

/* ---- peer_memory.c ---- */

void peer_memory_send(struct link *link);        /* our device's file, once there is one */
void peer_memory_map(struct link *link, int fd); /* theirs */
void peer_memory_lose(struct link *link);        /* the peer is gone: nobody touches its memory any more */
void peer_memory_free(struct link *link);

enum { PEER_GONE = -1, PEER_CANCELLED = -2, PEER_REFUSED = -3 };

/* Memory of the peer that a task may touch. */
struct peer_window {
    struct link *link;
    enum { WINDOW_REGION, WINDOW_OPERATION } kind;
    uint32_t flags;                 /* lane of the operation */
    uint64_t number;                /* of the region or the operation */
    uint64_t offset;                /* of the first byte in the window */
    uint64_t file_offset;           /* of the same byte in the file of the peer's device */
    bool mapped;                    /* reached through the file, else asked for by frames */
    bool (*cancelled)(void *about); /* may be NULL; asked without the mutex */
    void *about;
};

/* Copies between `own` (from its byte `at`) and the window: 0, an ACL code, or one of the above. */
int peer_memory_copy(struct sim_task *task, const struct peer_window *window, const struct sim_view *own, size_t at,
                     size_t size, bool to_peer, struct sim_fault fault);
void peer_memory_frame(struct link *link, const struct frame *frame, const char *body);
void peer_memory_fail_requests(struct link *link);

/* ---- send_receive.c, prepare.c, one_sided.c: their frames, and their part of other calls ---- */

uint64_t hccl_type_bytes(HcclDataType type); /* 0: unknown */

void send_receive_frame(struct link *link, const struct frame *frame, const char *body);
/* The bytes that a running send shows to its receiver; NULL when there are none (any more). */
unsigned char *send_receive_window(struct link *link, uint32_t flags, uint64_t number, uint64_t offset, uint64_t size);
void send_receive_wake(struct communicator *communicator);
/* Announced operations of peers that no call of ours has met. */
size_t send_receive_unmatched(struct communicator *communicator);
void send_receive_forget(struct link *link);

void one_sided_frame(struct link *link, const struct frame *frame, const char *body);
unsigned char *one_sided_window(struct link *link, uint64_t region, uint64_t offset, uint64_t size);
void one_sided_wake(struct communicator *communicator);
void one_sided_forget(struct communicator *communicator);
size_t one_sided_registrations(int device);
void one_sided_finalize(void);

/* ---- root_info.c ---- */

void root_info_finalize(void);

/* Faults at the places where two ends meet: 0 to go on, or what the call returns. Without the mutex. */
HcclResult communicator_fault(const char *function, const char *where, struct communicator *communicator,
                              struct link *link);

#endif
