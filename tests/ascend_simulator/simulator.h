/* What the parts of the simulator give each other. Nothing of it leaves the library.

   Locks are taken in this order, and none is held while a task runs or a copy moves bytes:
   the caller's own (communicator, event, import) -> stream -> memory -> counters and random numbers. */
#ifndef LLMDD_SIM_SIMULATOR_H
#define LLMDD_SIM_SIMULATOR_H

#include "acl_types.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/un.h>

#define SIM_MAX_DEVICES 64
#define SIM_VERSION "1.0.0-simulator"

/* ---- knobs.c: LLMDD_SIM_<name>, read once by aclInit, changed by llmdd_sim_set ---- */

enum sim_knob {
    SIM_DEVICES,
    SIM_HBM_MIB,
    SIM_SEED,
    SIM_HOST_VISIBLE,
    SIM_HUGE_OFFSET,
    SIM_QUARANTINE_MIB,
    SIM_MIN_DELAY_US,
    SIM_JITTER_US,
    SIM_PIECE_KIB,
    SIM_EVENTS,
    SIM_STREAMS,
    SIM_DEAD_PEER_CODE,
    SIM_SETDEVICE_MS,
    SIM_SERVER, /* this server's number in an A3 super pod */
    SIM_NUMBER_KNOBS,
};

enum sim_text_knob {
    SIM_WORLD,
    SIM_SOC,
    SIM_HCCS,     /* "all", "none" or pairs of physical ids "0-1,2-3" */
    SIM_LINK,     /* "hccs" (default) or "roce": the wire of HCCL inside one server */
    SIM_HCCN_CONF,
    SIM_TEXT_KNOBS,
};

long sim_knob(enum sim_knob knob);
double sim_time_scale(void); /* factor for HCCL's own timeouts, never for those passed to ACL */
/* Copies the text, ended by NUL; `room` counts the NUL. */
void sim_knob_text(enum sim_text_knob knob, char *text, size_t room);
bool sim_is_a3(void);
int sim_knobs_load(void); /* 0, or 100003 with the reason in the thread's text */

/* ---- chance.c: random numbers from LLMDD_SIM_SEED ---- */

uint64_t sim_random(void);               /* the same sequence in each run with the seed */
uint64_t sim_random_below(uint64_t end); /* 0 <= it < end; 0 for end 0 */
void sim_nonce(char *letters, size_t count); /* differs between processes with the same seed; no NUL is added */

/* ---- counters.c ---- */

/* "calls.<function>", "fault.<where>", "misuse.<name>", "live.<objects>" */
void sim_count(const char *name, int64_t more);

/* ---- clock.c ---- */

uint64_t sim_now(void); /* CLOCK_MONOTONIC, nanoseconds */
void sim_condition_init(pthread_cond_t *condition); /* waits by CLOCK_MONOTONIC */
/* Until signalled (true, spurious ones too) or `deadline` by sim_now (false); UINT64_MAX waits without limit. */
bool sim_condition_wait(pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t deadline);
/* For the simulator's own threads: small stack, all signals blocked. 0 or errno. */
int sim_thread_start(pthread_t *thread, const char *name, void *(*body)(void *), void *argument);

/* ---- failures.c: codes with a text, and misuse ---- */

/* Stores the text that aclGetRecentErrMsg of this thread gives and returns `code`. */
int sim_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* As LLMDD_SIM_MISUSE says: ends the process, or gives `code` with the text set ("error"), or gives 0 so that the
   caller goes on as hardware might ("log"). The message names the function: begin the text with it. Counts
   misuse.<name>. */
int sim_misuse(const char *name, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same where nothing sensible could go on: gives `code` under "log" too. */
int sim_refuse(const char *name, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- faults.c: LLMDD_SIM_FAULTS ---- */

enum sim_action { SIM_NONE, SIM_CODE, SIM_DROP, SIM_CORRUPT, SIM_HALF, SIM_EOF, SIM_ASYNC };

struct sim_fault {
    enum sim_action action;
    int code; /* of SIM_CODE and SIM_ASYNC; 507057 with SIM_HALF */
};

struct sim_task;
struct sim_stream;

/* Looks the place up and carries out delay, hang, kill and stop itself. `device` is a user id, -1 for none. In a task
   (else NULL) a delay or hang ends with the task's abort, which gives SIM_CODE 107023; outside a task a hang ends when
   `ended` (may be NULL) returns true for `about`, or with aclFinalize: SIM_CODE 507000. */
struct sim_fault sim_fault(const char *where, int device, struct sim_task *task, bool (*ended)(void *about),
                           void *about);
int sim_faults_parse(const char *text); /* 0 or 100003; replaces the list */

/* ---- process.c: aclInit ... aclFinalize, and what each call begins with ---- */

struct sim_context;

enum {
    SIM_NEEDS_CONTEXT = 1, /* else no_context, 107002 (HCCL: 15) */
    SIM_BLOCKS = 2,        /* may wait: gil_held if the thread holds Python's lock */
    /* the caller looks for the fault that names the function: sim_fault with a way to end a hang */
    SIM_FAULT_LATER = 8,
    SIM_HCCL = 4,          /* failures come as HcclResult: 15 without a context or before aclInit, 1 for misuse */
};

/* Beginning of every exported function: not in a forked child, after aclInit, with a context if needed; counts the call
   and looks for a fault that names the function. Non-zero is what the function has to return. `context` may be NULL. */
int sim_enter(const char *function, unsigned needs, struct sim_context **context);
bool sim_running(void); /* between aclInit and the beginning of aclFinalize */
bool sim_forked(void);
/* Called by aclFinalize before devices go: ends the threads and sockets of HCCL, reports leaks. Defined by the HCCL
   half. */
void sim_hccl_finalize(void);
/* Called by a device's last reset: how many communicators and registrations of it are alive. Defined by the HCCL
   half. */
size_t sim_hccl_alive(int device);

/* ---- devices.c, contexts.c ---- */

struct sim_device {
    int id; /* user id: index in the visible list */
    int physical; /* index on the server */
};

struct sim_context;

struct sim_device *sim_device(int id); /* NULL if not visible */
int sim_device_count(void);
struct sim_context *sim_current_context(void); /* of this thread; NULL if none. Contexts stay valid memory for ever */
struct sim_device *sim_context_device(struct sim_context *context);
/* Binds this thread to a context for the simulator's own threads that act for a call; NULL unbinds. */
void sim_bind_thread(struct sim_context *context);
bool sim_devices_linked(int physical, int other); /* HCCS between the two, by LLMDD_SIM_HCCS */
/* The file behind the device's memory in this process and its size; the descriptor stays the device's. A peer maps a
   part of it by sim_view.offset. -1 if the device has no memory here yet. */
int sim_device_file(struct sim_device *device);
size_t sim_device_span(struct sim_device *device);

/* ---- accounting.c: memory of the server's devices, over all processes ---- */

int sim_charge(struct sim_device *device, uint64_t bytes); /* 0, or 207001 with the text set */
void sim_discharge(struct sim_device *device, uint64_t bytes);
uint64_t sim_charged(struct sim_device *device); /* by all live processes */

/* ---- sockets.c ---- */

/* Abstract name made of user, world and the rest; gives its length for bind and connect. */
socklen_t sim_socket_name(struct sockaddr_un *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* `count` descriptors (at most 4) and bytes in one message: 0 or errno. The receiver gets descriptors closed on
   exec. */
int sim_send_files(int socket, const void *bytes, size_t size, const int *files, size_t count);
/* all of both, or EPROTO; ECONNRESET at the end */
int sim_receive_files(int socket, void *bytes, size_t size, int *files, size_t count);

/* ---- ranges.c: all memory the simulator knows, by address ---- */

enum sim_where { SIM_PAGEABLE, SIM_PINNED, SIM_DEVICE, SIM_IMPORTED };

struct sim_range;

/* A part of memory, held: its mapping stays until sim_view_close, even if its owner frees it. */
struct sim_view {
    struct sim_range *range; /* NULL for pageable host memory */
    enum sim_where where;
    struct sim_device *device; /* SIM_DEVICE: where it lies; SIM_IMPORTED: the importer's device; else NULL */
    const void *address; /* as the program names it */
    unsigned char *bytes; /* as the simulator may touch it */
    size_t size;
    uint64_t offset; /* in the device's file, for SIM_DEVICE */
};

/* Finds `address`; misuse out_of_bounds, use_after_free. `what` names the argument in messages ("aclrtMemcpy: dst"). 0
   or 107000. */
int sim_view_open(const char *what, const void *address, size_t size, struct sim_view *view);
void sim_view_close(struct sim_view *view); /* also of a cleared view */
/* To be asked when a task runs and after each piece: 0; 507053 and misuse use_after_free if it was freed meanwhile;
   LLMDD_SIM_DEAD_PEER_CODE if it was imported and its owner is gone. */
int sim_view_check(const char *what, const struct sim_view *view);

/* ---- streams.c ---- */

struct sim_use { /* memory that a task touches, from its enqueue to its end */
    struct sim_view view;
    bool writes;
};

/* A unit of work. Put it first into a structure of your own, cleared to zero; set what is above the line. */
struct sim_task {
    const char *what; /* for messages: the function that made it */
    /* on the stream's thread, no lock held; 0 or the code the stream keeps */
    int (*run)(struct sim_task *task);
    /* Exactly once, before anybody sees the task as finished: `code` is what run gave, or 107023 if it was dropped,
       before or without run. Frees the task (uses and their views are released by then). */
    void (*end)(struct sim_task *task, int code);
    struct sim_use *uses; /* with malloc; released by the stream */
    size_t use_count;
    /* ---- the stream's ---- */
    struct sim_stream *stream;
    struct sim_task *next;
    struct sim_task *next_use, *previous_use;
    uint64_t not_before;
    bool stopped;
    bool woken;
};

/* The stream of a handle (NULL: the default stream of `context`), held until sim_stream_put. Misuse wrong_device and
   107003 if it is another context's, or destroyed, or none at all. */
int sim_stream_get(const char *function, aclrtStream handle, struct sim_context *context, struct sim_stream **stream);
void sim_stream_hold(struct sim_stream *stream);
void sim_stream_put(struct sim_stream *stream);
struct sim_device *sim_stream_device(struct sim_stream *stream);
int sim_stream_id(struct sim_stream *stream);
/* Takes the task over, also when it fails: then `end` has been called with the code that is returned (107023 after an
   abort). */
int sim_enqueue(struct sim_stream *stream, struct sim_task *task);

/* For `run`: */
bool sim_task_aborted(struct sim_task *task);
/* Until sim_task_wake, the abort or `deadline` (sim_now); gives sim_task_aborted. Look at your own condition in a
   loop. */
bool sim_task_wait(struct sim_task *task, uint64_t deadline);
/* From any thread, while the task cannot end (hold a lock of yours that its `end` takes). */
void sim_task_wake(struct sim_task *task);
/* A descriptor that becomes readable with the abort, for poll beside a socket; the stream's own. -1 if none can be
   had. */
int sim_task_abort_descriptor(struct sim_task *task);

/* Is a task of any stream still going to write here? Gives its `what`, or NULL. */
const char *sim_written_by(const void *address, size_t size);
/* Is a task of any stream going to touch it at all? */
const char *sim_used_by(const void *address, size_t size);

/* ---- copies.c ---- */

struct sim_copy {
    unsigned char *to;
    const unsigned char *from;
    size_t size;
    int (*check)(void *about); /* before and after each piece: 0 or the code to fail with; may be NULL */
    void *about;
};

/* Copies in pieces with a yield between them, ended by the abort of `task` (may be NULL) with 107023. Carries out
   SIM_DROP, SIM_CORRUPT, SIM_HALF and SIM_CODE of `fault`; ignores other actions. */
int sim_copy_pieces(struct sim_task *task, const struct sim_copy *copy, struct sim_fault fault);

/* ---- handles.c: opaque numbers that stand for objects; never used twice, never a pointer ---- */

struct sim_object { /* first in every object that has a handle */
    atomic_int holders;
    int kind;
    void *handle;
    void (*free)(struct sim_object *object);
};

enum sim_kind {
    SIM_CONTEXT_HANDLE = 1,
    SIM_STREAM_HANDLE,
    SIM_EVENT_HANDLE,
    SIM_COMMUNICATOR_HANDLE,
    SIM_REGISTRATION_HANDLE
};

/* held once; NULL: no memory */
void *sim_handle_make(struct sim_object *object, enum sim_kind kind, void (*free)(struct sim_object *));
struct sim_object *sim_handle_get(void *handle, enum sim_kind kind); /* held once more, or NULL: never one, or closed */
bool sim_handle_closed(void *handle, enum sim_kind kind); /* was one */
bool sim_handle_close(void *handle); /* no longer found; false if another thread did */
void sim_object_hold(struct sim_object *object);
void sim_object_put(struct sim_object *object); /* `free` after the last holder */

#endif
