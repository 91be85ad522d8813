/* What only the ACL half shares among its own files. */
#ifndef LLMDD_SIM_INTERNAL_H
#define LLMDD_SIM_INTERNAL_H

#include "simulator.h"

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)
#define PAGE (4 * KIB)
#define HUGE_PAGE (2 * MIB)

static inline size_t sim_round_up(size_t number, size_t grain)
{
    return (number + grain - 1) / grain * grain;
}

/* chance.c */
void sim_chance_start(void);

/* failures.c: what the thread's last failure was */
void sim_share_failures(bool shared); /* err_msg_mode 1: one text for all threads */
const char *sim_failure_text(void); /* of this thread, stays until its next failure */
int sim_misuse_mode(const char *word); /* 0, or -1 if it is no mode */

/* knobs.c: visible devices as physical ids */
size_t sim_visible_devices(int *physical, size_t room);

/* process.c */
int sim_enter_finalize(const char *function);
int sim_blocks(const char *function); /* misuse gil_held; for calls that wait only at times */
bool sim_is_function(const char *name); /* exported here, and looks for faults */
bool sim_ending(void); /* since the beginning of aclFinalize: what hangs lets go */

/* faults.c: a fault at the beginning of a call; 0 or the code the call returns */
int sim_fault_at_call(const char *function, int device);

/* devices.c */
void sim_devices_open(void);
int sim_devices_close(const char *function); /* reports leaks; 0 or the code of the report */
bool sim_peer_enabled(const struct sim_device *from, const struct sim_device *to);

int sim_device_prepare(struct sim_device *device); /* its memory, without aclrtSetDevice; 0 or a code */

/* contexts.c */
/* with a default stream; NULL: no memory */
struct sim_context *sim_context_make(struct sim_device *device, bool is_default);
size_t sim_contexts_alive(const struct sim_device *device); /* explicit ones */
void sim_contexts_end(const struct sim_device *device); /* all, with their streams */
bool sim_context_alive(struct sim_context *context);
struct sim_stream *sim_context_default_stream(struct sim_context *context);

/* device_memory.c: address space and files of the devices */
int sim_memory_open(struct sim_device *device); /* at the first aclrtSetDevice; 0 or a code */
void sim_memory_close(void);                    /* at aclFinalize: everything */
void sim_memory_clear(struct sim_device *device); /* at the last reset: frees what was left */
bool sim_is_device_address(const void *address);
/* Address space for `size` bytes at a multiple of `alignment`, without rights, in the range where device addresses lie;
   NULL: none left. To be given back with sim_import_space_free. */
void *sim_import_space(size_t size, size_t alignment);
void sim_import_space_free(void *address, size_t size);
/* Address space of the device: `size` bytes from a multiple of `alignment` (of 4 KiB); false if there is none left. */
bool sim_block_take(struct sim_device *device, size_t size, size_t alignment, size_t *start);
/* Into quarantine; what leaves it is given back to the system and can be taken again. */
void sim_block_release(struct sim_device *device, size_t start, size_t size);
unsigned char *sim_device_bytes(struct sim_device *device); /* the simulator's mapping of offset 0 */
uintptr_t sim_device_base(struct sim_device *device); /* the program's address of offset 0 */

/* ranges.c */
enum sim_range_state { SIM_LIVE, SIM_FREED };

struct sim_range {
    atomic_int holders;
    atomic_int state;
    enum sim_where where;
    struct sim_device *device;
    int physical; /* of the device where the bytes lie; of the owner for imports */
    uintptr_t address;
    size_t size;
    unsigned char *bytes;
    uint64_t offset;
    size_t page; /* behind device memory: 4 KiB, 2 MiB, 1 GiB */
    uint64_t number; /* for messages: the n-th of the process */
    uint64_t charged;
    size_t block_start, block_size; /* in the device's address space */
    atomic_int exports;
    int connection; /* SIM_IMPORTED: to the owner, closed by it means that it is gone; else -1 */
    void (*free)(struct sim_range *range);
};

/* Adds to the table, which holds it; `free` is called after the last holder. 0 or 200000. */
int sim_range_add(struct sim_range *range);
/* The range that contains `address`, held, or NULL. */
struct sim_range *sim_range_find(const void *address);
/* Takes it out of the table and marks it freed; false if somebody else did. The table's hold is given to the caller. */
bool sim_range_take(struct sim_range *range);
void sim_range_put(struct sim_range *range);
/* Text for messages: "the 3rd allocation, 4096 bytes at 0x... of device 0". */
const char *sim_range_words(const struct sim_range *range, char *text, size_t room);
size_t sim_ranges_alive(const struct sim_device *device); /* allocations and imports; NULL: pinned host memory */
/* Takes out the first live range of the device (NULL: of pinned host memory) for clearing up; NULL if none. */
struct sim_range *sim_range_take_any(const struct sim_device *device);
/* Only for the signal handler: no lock. */
void sim_range_describe_unlocked(uintptr_t address, char *text, size_t room);

/* What lay at an address that is not alive, as far as is remembered: false if nothing. */
bool sim_range_was(const void *address, char *text, size_t room, bool *at_begin);

/* streams.c */
/* held once */
int sim_stream_make(struct sim_context *context, uint32_t flags, bool is_default, struct sim_stream **stream);
void *sim_stream_handle(struct sim_stream *stream);
size_t sim_streams_alive(const struct sim_device *device); /* without default streams */
size_t sim_context_streams_alive(const struct sim_context *context);
/* Aborts and ends all streams of the context; waits for their workers. */
void sim_streams_end(struct sim_context *context);
int sim_check_timeout(const char *function, int32_t timeout, bool zero_is_defined);
uint64_t sim_deadline(int32_t timeout); /* milliseconds, -1 without limit */
bool sim_task_released(struct sim_task *task); /* the same for a hanging task */
/* Waits for all that is queued now: 0, the first error, 107023, or 507046 at the deadline. */
int sim_stream_drain(const char *function, struct sim_stream *stream, uint64_t deadline);
int sim_device_drain(const char *function, struct sim_context *context, uint64_t deadline);
bool sim_streams_idle(uint64_t deadline); /* of the whole process */

/* For what touches memory without being a task: an aclrtMemcpy that runs. Only `what` and `uses` of the task matter. */
void sim_uses_begin(struct sim_task *task);
void sim_uses_end(struct sim_task *task);

/* events.c */
size_t sim_events_alive(const struct sim_device *device);
void sim_events_end(const struct sim_device *device);

/* accounting.c, server_table.c */
int sim_table_open(void); /* joins the server's table; 0 or a code */
void sim_table_close(void);
void sim_table_forked(void);

/* ipc_memory.c */
void sim_ipc_close(void); /* exports, imports, thread and sockets */
void sim_ipc_clear(struct sim_device *device);
void sim_ipc_before_fork(void);
void sim_ipc_after_fork(void);
void sim_ipc_forked(void); /* in the child */
size_t sim_exports_alive(const struct sim_device *device);

/* host_dereference.c */
void sim_dereference_watch(void);
void sim_dereference_forget(void);

#endif
