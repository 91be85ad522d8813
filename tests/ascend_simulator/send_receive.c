/* Sends, receives and barriers: the n-th operation of one rank meets the n-th opposite one of the other.
 *
 * The receiver copies: a sender that was stopped in the middle can then never write into memory that its receiver has
 * taken back. An operation ends when both ends have heard that the other one is through:
 *
 *     sender      READY ----------------------------------> (copies)           CONFIRMED ->
 *     receiver    READY -> (nothing to do)     <- COPIED ----------------------------------  (ends)
 */
#include "communicator.h"

#include <stdlib.h>
#include <string.h>

enum item_state { ITEM_NEW, ITEM_ANNOUNCED, ITEM_COPIED, ITEM_ENDED };

enum { FLAG_ENTRY = 0xF, FLAG_SENDER = 0x10, FLAG_DROP = 0x20, FLAG_CORRUPT = 0x40 };
enum { COPIED_WELL, COPIED_HALF, COPIED_DIFFERS };

struct item {
    struct link *link; /* NULL: to itself */
    enum role role;
    enum item_state state;
    uint64_t number, count, bytes;
    HcclDataType type;
    struct sim_view *view; /* NULL without bytes */
    struct item *twin;     /* of one to itself */
    struct sim_fault fault;
    bool copied, confirmed, differs, half; /* heard from the peer */
    bool cancelled;
};

struct transfer {
    struct sim_task task;
    struct transfer *next;
    struct communicator *communicator;
    enum entry_point entry;
    bool running;
    size_t items;
    struct item item[];
};

static const char *const what_differs = "count or type of two operations that meet differ";

/* ---- lanes and what peers say ---- */

static uint32_t lane_flags(enum entry_point entry, enum role role)
{
    return (uint32_t)entry | (role == ROLE_SEND ? FLAG_SENDER : 0);
}

/* The lane that a frame of the peer is about: its sends are our receives. */
static struct lane *lane_of_peer(struct link *link, uint32_t flags)
{
    uint32_t entry = flags & FLAG_ENTRY;
    return entry < ENTRY_POINTS ? &link->lanes[entry][flags & FLAG_SENDER ? ROLE_RECEIVE : ROLE_SEND] : NULL;
}

static struct announcement *find_announcement(struct lane *lane, uint64_t number)
{
    struct announcement *a = lane->first;
    while (a != NULL && a->number != number)
        a = a->next;
    return a;
}

static void remove_announcement(struct lane *lane, uint64_t number)
{
    for (struct announcement **at = &lane->first; *at != NULL; at = &(*at)->next) {
        struct announcement *a = *at;
        if (a->number != number)
            continue;
        *at = a->next;
        if (lane->last == &a->next)
            lane->last = at;
        free(a);
        return;
    }
}

static void note_announcement(struct lane *lane, const struct frame *frame)
{
    struct announcement *a = calloc(1, sizeof *a);
    if (a == NULL)
        return;
    *a = (struct announcement){.number = frame->number,
                               .count = frame->value[0],
                               .type = (HcclDataType)frame->value[1],
                               .offset = frame->value[2],
                               .limit = frame->value[3],
                               .flags = frame->flags};
    *lane->last = a;
    lane->last = &a->next;
}

void send_receive_forget(struct link *link)
{
    for (int entry = 0; entry < ENTRY_POINTS; entry++)
        for (int role = 0; role < ROLES; role++)
            while (link->lanes[entry][role].first != NULL)
                remove_announcement(&link->lanes[entry][role], link->lanes[entry][role].first->number);
}

size_t send_receive_unmatched(struct communicator *c)
{
    size_t unmatched = 0;
    for (uint32_t peer = 0; peer < c->ranks; peer++) {
        struct link *link = &c->links[peer];
        if (link->died_at != 0 || link->goodbye)
            continue;
        for (int lane = 0; lane < ENTRY_POINTS * ROLES; lane++)
            for (struct announcement *a = link->lanes[lane / ROLES][lane % ROLES].first; a != NULL; a = a->next)
                unmatched++;
    }
    return unmatched;
}

void send_receive_wake(struct communicator *c)
{
    for (struct transfer *transfer = c->transfers; transfer != NULL; transfer = transfer->next)
        if (transfer->running)
            sim_task_wake(&transfer->task);
}

/* Our item that the peer's frame is about, if its transfer is running. */
static struct item *find_item(struct link *link, uint32_t flags, uint64_t number, struct transfer **owner)
{
    enum role role = flags & FLAG_SENDER ? ROLE_RECEIVE : ROLE_SEND;
    for (struct transfer *transfer = link->communicator->transfers; transfer != NULL; transfer = transfer->next) {
        if (!transfer->running || (uint32_t)transfer->entry != (flags & FLAG_ENTRY))
            continue;
        for (size_t i = 0; i < transfer->items; i++) {
            struct item *item = &transfer->item[i];
            if (item->link == link && item->role == role && item->number == number) {
                *owner = transfer;
                return item;
            }
        }
    }
    return NULL;
}

/* ---- frames ---- */

static void operation_frame(struct link *link, const struct frame *frame)
{
    struct transfer *transfer;
    struct item *item = find_item(link, frame->flags, frame->number, &transfer);
    if (frame->kind == FRAME_CANCELLED)
        remove_announcement(lane_of_peer(link, frame->flags), frame->number);
    if (item == NULL)
        return;
    if (frame->kind == FRAME_COPIED) {
        item->copied = frame->value[0] == COPIED_WELL;
        item->half = frame->value[0] == COPIED_HALF;
        item->differs = frame->value[0] == COPIED_DIFFERS;
    } else if (frame->kind == FRAME_CONFIRMED) {
        item->confirmed = true;
    } else {
        item->cancelled = true;
    }
    sim_task_wake(&transfer->task);
}

void send_receive_frame(struct link *link, const struct frame *frame, const char *body)
{
    struct lane *lane = lane_of_peer(link, frame->flags);
    (void)body;
    if (lane == NULL)
        return;
    switch (frame->kind) {
    case FRAME_OPEN:
        lane->heard = true;
        lane->peer_count = frame->value[0];
        lane->peer_type = (HcclDataType)frame->value[1];
        pthread_cond_broadcast(&link->communicator->changed);
        break;
    case FRAME_CLOSE:
        lane->heard = false;
        break;
    case FRAME_READY:
        note_announcement(lane, frame);
        send_receive_wake(link->communicator);
        break;
    case FRAME_COPIED:
    case FRAME_CONFIRMED:
    case FRAME_CANCELLED:
        operation_frame(link, frame);
        break;
    default:
        break;
    }
}

unsigned char *send_receive_window(struct link *link, uint32_t flags, uint64_t number, uint64_t offset, uint64_t size)
{
    struct transfer *transfer;
    struct item *item = find_item(link, flags & ~(uint32_t)FLAG_SENDER, number, &transfer);
    if (item == NULL || item->view == NULL || item->state != ITEM_ANNOUNCED || offset > item->bytes ||
        size > item->bytes - offset)
        return NULL;
    return item->view->bytes + offset;
}

/* ---- on the stream ---- */

static void say(struct transfer *transfer, struct item *item, enum frame_kind kind, uint64_t value)
{
    struct frame frame = {
        .kind = kind, .flags = lane_flags(transfer->entry, item->role), .number = item->number, .value = {value}};
    if (item->link->socket != NULL)
        socket_send(item->link->socket, frame, NULL, -1);
}

/* Tells the peer what it needs for its part. */
static void announce(struct transfer *transfer, struct item *item)
{
    struct frame frame = {.kind = FRAME_READY,
                          .flags = lane_flags(transfer->entry, item->role),
                          .number = item->number,
                          .value = {item->count, (uint64_t)item->type}};
    frame.value[3] = item->bytes;
    if (item->role == ROLE_SEND) {
        frame.value[2] = item->view != NULL ? item->view->offset : 0;
        frame.flags |= item->fault.action == SIM_DROP      ? FLAG_DROP
                       : item->fault.action == SIM_CORRUPT ? FLAG_CORRUPT
                                                           : 0;
        if (item->fault.action == SIM_HALF)
            frame.value[3] = item->bytes / 2;
        peer_memory_send(item->link);
    }
    item->state = ITEM_ANNOUNCED;
    if (item->link->socket != NULL)
        socket_send(item->link->socket, frame, NULL, -1);
}

/* What is injected into the whole operation; false when the task ends with `code`. No lock held. */
static bool inject(struct transfer *transfer, struct item *item, int *code)
{
    const char *where = item->role == ROLE_SEND ? "exec.send" : "exec.recv";
    struct communicator *c = transfer->communicator;
    item->fault = sim_fault(where, c->device->id, &transfer->task, NULL, NULL);
    *code = item->fault.code;
    if (item->fault.action == SIM_CODE) {
        sim_fail(*code, "%s: fault injected at %s", transfer->task.what, where);
        return false;
    }
    if (item->fault.action == SIM_ASYNC)
        atomic_store(&c->async_error, item->fault.code);
    if (item->fault.action == SIM_EOF && item->link != NULL)
        meeting_cut(item->link, &transfer->task);
    return true;
}

static bool was_cancelled(void *about)
{
    struct item *item = about;
    reception_lock();
    bool ended = item->cancelled || item->link->communicator->closing;
    reception_unlock();
    return ended;
}

/* The receiver's copy, mutex not held. The sender's faults and ours are the same to the bytes. */
static int copy_bytes(struct transfer *transfer, struct item *item, const struct announcement *from)
{
    struct peer_window window = {.link = item->link,
                                 .kind = WINDOW_OPERATION,
                                 .flags = lane_flags(transfer->entry, ROLE_RECEIVE),
                                 .number = item->number,
                                 .file_offset = from->offset,
                                 .mapped = item->link->communicator->members[item->link->peer].same_server,
                                 .cancelled = was_cancelled,
                                 .about = item};
    struct sim_fault fault = item->fault;
    size_t bytes = from->limit < item->bytes ? from->limit : item->bytes;
    if (from->flags & (FLAG_DROP | FLAG_CORRUPT))
        fault = (struct sim_fault){.action = from->flags & FLAG_DROP ? SIM_DROP : SIM_CORRUPT};
    return peer_memory_copy(&transfer->task, &window, item->view, 0, bytes, false, fault);
}

/* A receive whose partner has announced itself. Mutex held, let go while bytes move. 0, or the code of the task. */
static int receive(struct transfer *transfer, struct item *item, const struct announcement *found)
{
    const struct announcement from = *found;
    if (from.count != item->count || from.type != item->type) {
        say(transfer, item, FRAME_COPIED, COPIED_DIFFERS);
        item->differs = true;
        return 0;
    }
    int code = 0;
    if (item->view != NULL) {
        reception_unlock();
        code = copy_bytes(transfer, item, &from);
        reception_lock();
    }
    if (code > 0)
        return code;
    item->state = ITEM_COPIED;
    if (code == 0 && from.limit == item->bytes)
        say(transfer, item, FRAME_COPIED, COPIED_WELL);
    else if (code == 0)
        say(transfer, item, FRAME_COPIED, COPIED_HALF);
    return 0; /* a partner that went away is waited for, as the device does */
}

static int copy_to_twin(struct transfer *transfer, struct item *receiver)
{
    struct item *sender = receiver->twin;
    struct sim_copy copy = {receiver->view->bytes, sender->view->bytes, receiver->bytes, NULL, NULL};
    reception_unlock();
    int code = sim_copy_pieces(&transfer->task, &copy, receiver->fault);
    reception_lock();
    receiver->state = sender->state = ITEM_ENDED;
    return code;
}

/* What can be done for one item now: 0, or the code of the task. */
static int step(struct transfer *transfer, struct item *item)
{
    if (item->state == ITEM_ENDED)
        return 0;
    if (item->link == NULL)
        return item->role == ROLE_RECEIVE ? copy_to_twin(transfer, item) : 0;
    struct lane *lane = &item->link->lanes[transfer->entry][item->role];
    struct announcement *partner = find_announcement(lane, item->number);
    int code = 0;
    if (item->role == ROLE_RECEIVE && item->state == ITEM_ANNOUNCED && partner != NULL)
        code = receive(transfer, item, partner);
    if (item->differs)
        return ACL_INTERNAL_ERROR;
    if (item->half)
        return item->fault.action == SIM_HALF ? item->fault.code : 0;
    if (code == 0 && item->role == ROLE_SEND && item->copied)
        say(transfer, item, FRAME_CONFIRMED, 0);
    if (code == 0 && (item->role == ROLE_SEND ? item->copied : item->confirmed)) {
        item->state = ITEM_ENDED;
        remove_announcement(lane, item->number);
    }
    return code;
}

static bool all_ended(const struct transfer *transfer)
{
    for (size_t i = 0; i < transfer->items; i++)
        if (transfer->item[i].state != ITEM_ENDED)
            return false;
    return true;
}

/* Mutex held. */
static int carry_out(struct transfer *transfer, uint64_t deadline)
{
    struct communicator *c = transfer->communicator;
    for (;;) {
        for (size_t i = 0; i < transfer->items; i++) {
            int code = step(transfer, &transfer->item[i]);
            if (code != 0)
                return code;
        }
        if (all_ended(transfer))
            return 0;
        if (c->closing)
            return sim_fail(ACL_INTERNAL_ERROR, "%s: \"%s\" was destroyed", transfer->task.what, c->name);
        if (sim_task_aborted(&transfer->task))
            return ACL_STREAM_ABORT;
        if (sim_now() >= deadline)
            return sim_fail(ACL_WAIT_TIMEOUT, "%s: no partner within the execution time limit", transfer->task.what);
        reception_unlock();
        sim_task_wait(&transfer->task, deadline);
        reception_lock();
    }
}

static int run(struct sim_task *task)
{
    struct transfer *transfer = (struct transfer *)task;
    uint64_t limit = transfer->communicator->execution_timeout_ns;
    uint64_t deadline = limit == UINT64_MAX ? UINT64_MAX : sim_now() + limit;
    int code = 0;
    for (size_t i = 0; i < transfer->items; i++) {
        if (transfer->item[i].view != NULL && sim_view_check(task->what, transfer->item[i].view) != 0)
            return ACL_DEVICE_MEM_ERROR;
        if (transfer->entry != ENTRY_BARRIER && !inject(transfer, &transfer->item[i], &code))
            return code;
    }
    reception_lock();
    transfer->running = true;
    for (size_t i = 0; i < transfer->items; i++)
        if (transfer->item[i].link != NULL)
            announce(transfer, &transfer->item[i]);
    code = carry_out(transfer, deadline);
    bool differs = false;
    for (size_t i = 0; i < transfer->items; i++)
        differs |= transfer->item[i].differs;
    transfer->running = false;
    reception_unlock();
    if (differs)
        sim_misuse("comm_order", code, "%s: %s in \"%s\"", task->what, what_differs, transfer->communicator->name);
    return code;
}

/* The peers of what was not finished need not look for us. */
static void withdraw(struct transfer *transfer)
{
    for (size_t i = 0; i < transfer->items; i++) {
        struct item *item = &transfer->item[i];
        if (item->link == NULL || item->state == ITEM_NEW || item->state == ITEM_ENDED)
            continue;
        remove_announcement(&item->link->lanes[transfer->entry][item->role], item->number);
        say(transfer, item, FRAME_CANCELLED, 0);
    }
}

static void end(struct sim_task *task, int code)
{
    struct transfer *transfer = (struct transfer *)task;
    struct communicator *c = transfer->communicator;
    reception_lock();
    if (code != 0)
        withdraw(transfer);
    c->aborted |= code == ACL_STREAM_ABORT;
    c->failed |= code != 0;
    for (struct transfer **at = &c->transfers; *at != NULL; at = &(*at)->next)
        if (*at == transfer) {
            *at = transfer->next;
            break;
        }
    if (--c->queued == 0)
        c->stream = NULL;
    if (c->closing)
        pthread_cond_broadcast(&c->changed);
    reception_unlock();
    sim_object_put(&c->object);
    free(transfer);
}

/* ---- the first operation of a lane meets the peer's inside the call ---- */

static void open_lane(struct transfer *transfer, struct item *item)
{
    struct lane *lane = &item->link->lanes[transfer->entry][item->role];
    if (lane->open || lane->said)
        return;
    lane->said = true;
    struct frame frame = {.kind = FRAME_OPEN,
                          .flags = lane_flags(transfer->entry, item->role),
                          .value = {item->count, (uint64_t)item->type}};
    if (item->link->socket != NULL)
        socket_send(item->link->socket, frame, NULL, -1);
}

static void close_lanes(struct transfer *transfer)
{
    for (size_t i = 0; i < transfer->items; i++) {
        struct link *link = transfer->item[i].link;
        struct lane *lane = link != NULL ? &link->lanes[transfer->entry][transfer->item[i].role] : NULL;
        if (lane == NULL || lane->heard || !lane->said) /* who was heard has its answer, whatever it is */
            continue;
        lane->said = false;
        struct frame frame = {.kind = FRAME_CLOSE, .flags = lane_flags(transfer->entry, transfer->item[i].role)};
        if (link->socket != NULL)
            socket_send(link->socket, frame, NULL, -1);
    }
}

/* The peer's first operation of this lane is here: compare. */
static HcclResult await_lane(struct transfer *transfer, struct item *item, uint64_t deadline)
{
    const char *function = transfer->task.what;
    struct communicator *c = transfer->communicator;
    struct lane *lane = &item->link->lanes[transfer->entry][item->role];
    while (!lane->open && !lane->heard) {
        if (c->closing)
            return sim_fail(HCCL_E_INTERNAL, "%s: the communicator was destroyed meanwhile", function);
        if (item->link->goodbye)
            return sim_fail(HCCL_E_TCP_TRANSFER, "%s: rank %u destroyed its communicator", function, item->link->peer);
        if (sim_now() >= deadline)
            return sim_fail(HCCL_E_TIMEOUT, "%s: rank %u made no operation that meets this first one", function,
                            item->link->peer);
        reception_wait(&c->changed, deadline);
    }
    if (lane->open)
        return HCCL_SUCCESS;
    if (lane->peer_count != item->count || lane->peer_type != item->type)
        return sim_refuse("comm_order", HCCL_E_PARA, "%s: %s: %llu of type %d here, %llu of type %d at rank %u",
                          function, what_differs, (unsigned long long)item->count, item->type,
                          (unsigned long long)lane->peer_count, lane->peer_type, item->link->peer);
    lane->open = true;
    return HCCL_SUCCESS;
}

static bool all_open(const struct transfer *transfer)
{
    for (size_t i = 0; i < transfer->items; i++) {
        const struct item *item = &transfer->item[i];
        if (item->link != NULL && !item->link->lanes[transfer->entry][item->role].open)
            return false;
    }
    return true;
}

static HcclResult meet_peer(struct transfer *transfer, struct link *link, uint64_t deadline)
{
    const char *function = transfer->task.what;
    HcclResult result = communicator_fault(function, "link.meet", transfer->communicator, link);
    if (result != HCCL_SUCCESS)
        return result;
    reception_lock();
    result = meeting_await(function, link, deadline);
    reception_unlock();
    return result != HCCL_SUCCESS ? result : communicator_fault(function, "link.peer", transfer->communicator, link);
}

static bool first_of_link(const struct transfer *transfer, size_t i)
{
    const struct link *link = transfer->item[i].link;
    for (size_t before = 0; before < i; before++)
        if (transfer->item[before].link == link)
            return false;
    return link != NULL;
}

static HcclResult open_lanes(struct transfer *transfer)
{
    reception_lock();
    bool open = all_open(transfer);
    reception_unlock();
    if (open)
        return HCCL_SUCCESS;
    uint64_t deadline = sim_now() + hccl_scaled_ns((double)hccl_environment(transfer->task.what)->connect_timeout_s);
    for (size_t i = 0; i < transfer->items; i++) {
        HcclResult result =
            first_of_link(transfer, i) ? meet_peer(transfer, transfer->item[i].link, deadline) : HCCL_SUCCESS;
        if (result != HCCL_SUCCESS)
            return result;
    }
    HcclResult result = HCCL_SUCCESS;
    reception_lock();
    for (size_t i = 0; i < transfer->items; i++)
        if (transfer->item[i].link != NULL)
            open_lane(transfer, &transfer->item[i]);
    for (size_t i = 0; i < transfer->items && result == HCCL_SUCCESS; i++)
        if (transfer->item[i].link != NULL)
            result = await_lane(transfer, &transfer->item[i], deadline);
    if (result != HCCL_SUCCESS)
        close_lanes(transfer);
    reception_unlock();
    return result;
}

/* ---- enqueuing ---- */

uint64_t hccl_type_bytes(HcclDataType type)
{
    static const uint8_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
    return type >= 0 && (size_t)type < sizeof sizes ? sizes[type] : 0;
}

static void discard(struct transfer *transfer)
{
    for (size_t i = 0; i < transfer->task.use_count; i++)
        sim_view_close(&transfer->task.uses[i].view);
    free(transfer->task.uses);
    free(transfer);
}

static struct transfer *new_transfer(const char *function, struct communicator *c, enum entry_point entry, size_t items)
{
    struct transfer *transfer = calloc(1, sizeof *transfer + items * sizeof transfer->item[0]);
    if (transfer == NULL)
        return NULL;
    transfer->communicator = c;
    transfer->entry = entry;
    transfer->task.what = function;
    transfer->task.run = run;
    transfer->task.end = end;
    transfer->task.uses = calloc(items, sizeof *transfer->task.uses);
    if (transfer->task.uses != NULL)
        return transfer;
    free(transfer);
    return NULL;
}

/* Everything of one operation that can be checked here; it becomes the transfer's next item. */
static HcclResult add_item(struct transfer *transfer, enum role role, void *buffer, uint64_t count, HcclDataType type,
                           uint32_t peer)
{
    const char *function = transfer->task.what;
    struct communicator *c = transfer->communicator;
    uint64_t size = hccl_type_bytes(type);
    if (buffer == NULL)
        return sim_fail(HCCL_E_PTR, "%s: the buffer is NULL", function);
    if (size == 0)
        return sim_fail(HCCL_E_NOT_SUPPORT, "%s: data type %d", function, type);
    if (count > HCCL_COUNT_MAX)
        return sim_fail(HCCL_E_PARA, "%s: count %llu is above %llu", function, (unsigned long long)count,
                        HCCL_COUNT_MAX);
    if (peer >= c->ranks)
        return sim_fail(HCCL_E_PARA, "%s: rank %u of %u", function, peer, c->ranks);
    if (peer == c->rank && transfer->entry == ENTRY_SINGLE)
        return sim_fail(HCCL_E_NOT_SUPPORT, "%s: rank %u is the own one", function, peer);
    if (count == 0)
        return HCCL_SUCCESS;
    struct sim_use *use = &transfer->task.uses[transfer->task.use_count];
    if (sim_view_open(function, buffer, count * size, &use->view) != 0)
        return HCCL_E_PARA;
    use->writes = role == ROLE_RECEIVE;
    transfer->task.use_count++;
    if (use->view.where != SIM_DEVICE || use->view.device != c->device)
        return sim_refuse("wrong_device", HCCL_E_PARA, "%s: %p is not memory of device %d", function, buffer,
                          c->device->id);
    transfer->item[transfer->items++] = (struct item){.link = peer == c->rank ? NULL : &c->links[peer],
                                                      .role = role,
                                                      .count = count,
                                                      .bytes = count * size,
                                                      .type = type,
                                                      .view = &use->view};
    return HCCL_SUCCESS;
}

/* Gives numbers and queues. The transfer is no longer ours. */
static HcclResult submit(struct transfer *transfer, struct sim_stream *stream)
{
    const char *function = transfer->task.what;
    struct communicator *c = transfer->communicator;
    HcclResult result = HCCL_SUCCESS;
    reception_lock();
    if (c->closing)
        result = sim_fail(HCCL_E_INTERNAL, "%s: the communicator was destroyed meanwhile", function);
    else if (c->aborted)
        result = sim_misuse("comm_order", HCCL_E_PARA, "%s: an operation of \"%s\" was aborted: its order is unknown",
                            function, c->name);
    if (result == HCCL_SUCCESS && c->queued > 0 && c->stream != stream)
        result =
            sim_misuse("comm_two_streams", HCCL_E_PARA, "%s: operations of \"%s\" are queued on stream %d, this is %d",
                       function, c->name, sim_stream_id(c->stream), sim_stream_id(stream));
    if (result != HCCL_SUCCESS) {
        reception_unlock();
        discard(transfer);
        return result;
    }
    for (size_t i = 0; i < transfer->items; i++) {
        struct item *item = &transfer->item[i];
        if (item->link != NULL)
            item->number = item->link->lanes[transfer->entry][item->role].next_number++;
    }
    struct transfer **last = &c->transfers;
    while (*last != NULL)
        last = &(*last)->next;
    *last = transfer;
    c->queued++;
    c->stream = stream;
    sim_object_hold(&c->object);
    reception_unlock();
    int code = sim_enqueue(stream, &transfer->task);
    return code == 0 ? HCCL_SUCCESS : sim_fail(HCCL_E_RUNTIME, "%s: the stream takes no task (%d)", function, code);
}

/* The end of each call: first operations meet, then the work is queued. */
static HcclResult start(struct transfer *transfer, aclrtStream handle, struct sim_context *context)
{
    struct sim_stream *stream;
    const char *function = transfer->task.what;
    HcclResult result = HCCL_SUCCESS;
    if (handle == NULL)
        result = sim_fail(HCCL_E_PTR, "%s: the stream is NULL", function);
    else if (sim_stream_get(function, handle, context, &stream) != 0)
        result = HCCL_E_PARA;
    if (result != HCCL_SUCCESS) {
        discard(transfer);
        return result;
    }
    if (transfer->items == 0) {
        discard(transfer);
    } else if ((result = open_lanes(transfer)) != HCCL_SUCCESS) {
        discard(transfer);
    } else {
        result = submit(transfer, stream);
    }
    sim_stream_put(stream);
    return result;
}

static HcclResult single(const char *function, enum role role, void *buffer, uint64_t count, HcclDataType type,
                         uint32_t peer, HcclComm comm, aclrtStream stream)
{
    struct sim_context *context;
    struct communicator *c;
    HcclResult result = communicator_enter(function, comm, true, &context, &c);
    if (result != HCCL_SUCCESS)
        return result;
    struct transfer *transfer = new_transfer(function, c, ENTRY_SINGLE, 1);
    if (transfer == NULL) {
        result = sim_fail(HCCL_E_MEMORY, "%s: no memory", function);
    } else if ((result = add_item(transfer, role, buffer, count, type, peer)) != HCCL_SUCCESS) {
        discard(transfer);
    } else {
        result = start(transfer, stream, context);
    }
    communicator_leave(c, true);
    return result;
}

SIM_API HcclResult HcclSend(void *buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                            aclrtStream stream)
{
    return single("HcclSend", ROLE_SEND, buffer, count, type, peer, comm, stream);
}

SIM_API HcclResult HcclRecv(void *buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                            aclrtStream stream)
{
    return single("HcclRecv", ROLE_RECEIVE, buffer, count, type, peer, comm, stream);
}

/* Sends to oneself become copies to the receives of the same batch, in their order. */
static HcclResult pair_own(struct transfer *transfer)
{
    size_t receive = 0;
    for (size_t i = 0; i < transfer->items; i++) {
        struct item *sender = &transfer->item[i];
        if (sender->link != NULL || sender->role != ROLE_SEND)
            continue;
        while (receive < transfer->items &&
               (transfer->item[receive].link != NULL || transfer->item[receive].role != ROLE_RECEIVE))
            receive++;
        struct item *receiver = receive < transfer->items ? &transfer->item[receive++] : NULL;
        if (receiver == NULL || receiver->count != sender->count || receiver->type != sender->type)
            return sim_refuse("comm_unmatched", HCCL_E_PARA, "%s: a send to itself has no equal receive in the batch",
                              transfer->task.what);
        receiver->twin = sender;
    }
    for (size_t i = 0; i < transfer->items; i++)
        if (transfer->item[i].link == NULL && transfer->item[i].role == ROLE_RECEIVE && transfer->item[i].twin == NULL)
            return sim_refuse("comm_unmatched", HCCL_E_PARA, "%s: a receive from itself has no send in the batch",
                              transfer->task.what);
    return HCCL_SUCCESS;
}

static HcclResult fill_batch(struct transfer *transfer, const HcclSendRecvItem *items, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (items[i].kind != 0 && items[i].kind != 1)
            return sim_fail(HCCL_E_PARA, "HcclBatchSendRecv: item %u is of kind %d", i, items[i].kind);
        HcclResult result = add_item(transfer, items[i].kind == 0 ? ROLE_SEND : ROLE_RECEIVE, items[i].buf,
                                     items[i].count, items[i].dataType, items[i].remoteRank);
        if (result != HCCL_SUCCESS)
            return result;
    }
    return pair_own(transfer);
}

SIM_API HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm comm, aclrtStream stream)
{
    struct sim_context *context;
    struct communicator *c;
    HcclResult result = communicator_enter("HcclBatchSendRecv", comm, true, &context, &c);
    if (result != HCCL_SUCCESS)
        return result;
    struct transfer *transfer = NULL;
    if (count > 0 && items == NULL)
        result = sim_fail(HCCL_E_PTR, "HcclBatchSendRecv: no items");
    else if (count > 0 && (transfer = new_transfer("HcclBatchSendRecv", c, ENTRY_BATCH, count)) == NULL)
        result = sim_fail(HCCL_E_MEMORY, "HcclBatchSendRecv: no memory");
    else if (count > 0 && (result = fill_batch(transfer, items, count)) != HCCL_SUCCESS)
        discard(transfer);
    else if (count > 0)
        result = start(transfer, stream, context);
    communicator_leave(c, true);
    return result;
}

/* A barrier is an empty send to and an empty receive from every other rank. */
SIM_API HcclResult HcclBarrier(HcclComm comm, aclrtStream stream)
{
    struct sim_context *context;
    struct communicator *c;
    HcclResult result = communicator_enter("HcclBarrier", comm, true, &context, &c);
    if (result != HCCL_SUCCESS)
        return result;
    struct transfer *transfer = new_transfer("HcclBarrier", c, ENTRY_BARRIER, 2 * (size_t)c->ranks);
    if (transfer == NULL) {
        result = sim_fail(HCCL_E_MEMORY, "HcclBarrier: no memory");
    } else {
        for (uint32_t peer = 0; peer < c->ranks; peer++)
            for (int role = 0; role < ROLES && peer != c->rank; role++)
                transfer->item[transfer->items++] = (struct item){.link = &c->links[peer], .role = role};
        result = start(transfer, stream, context);
    }
    communicator_leave(c, true);
    return result;
}
