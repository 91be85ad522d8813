/* The memory of each device in this process: a file without a name, mapped twice. The program gets addresses of the
   first mapping, which allows nothing; the simulator works through the second one. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define IMPORT_SPACE (32 * GIB)

struct block {
    size_t start, size;
};

struct memory {
    pthread_mutex_t lock; /* over the blocks */
    int file;
    size_t span;
    uintptr_t base; /* the program's */
    unsigned char *bytes; /* the simulator's; NULL: not opened */
    struct block *free_blocks; /* sorted */
    size_t free_count, free_room;
    struct block *quarantine; /* oldest first */
    size_t quarantine_count, quarantine_room, quarantine_bytes;
};

static struct memory memories[SIM_MAX_DEVICES];
static struct block *import_blocks; /* free address space for imports, as offsets in the range */
static size_t import_count, import_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over the range and import_blocks */
static void *reserved;
static size_t reserved_size;
static atomic_uintptr_t range_begin, range_end;

/* ---- lists of free blocks ---- */

static bool put_block(struct block **blocks, size_t *count, size_t *room, struct block block)
{
    size_t place = 0;
    while (place < *count && (*blocks)[place].start < block.start)
        place++;
    if (place && (*blocks)[place - 1].start + (*blocks)[place - 1].size == block.start) {
        (*blocks)[--place].size += block.size;
    } else {
        if (*count == *room) {
            size_t more = *room ? 2 * *room : 64;
            struct block *larger = realloc(*blocks, more * sizeof *larger);
            if (!larger)
                return false; /* this much address space is lost until the end */
            *blocks = larger;
            *room = more;
        }
        memmove(*blocks + place + 1, *blocks + place, ((*count)++ - place) * sizeof **blocks);
        (*blocks)[place] = block;
    }
    struct block *here = *blocks + place;
    if (place + 1 < *count && here->start + here->size == here[1].start) {
        here->size += here[1].size;
        memmove(here + 1, here + 2, (--*count - place - 1) * sizeof *here);
    }
    return true;
}

/* The first place that fits. */
static bool get_block(struct block **blocks, size_t *count, size_t *room, size_t size, size_t alignment, size_t *start)
{
    for (size_t i = 0; i < *count; i++) {
        struct block block = (*blocks)[i];
        size_t begin = sim_round_up(block.start, alignment);
        if (begin - block.start > block.size || block.size - (begin - block.start) < size)
            continue;
        memmove(*blocks + i, *blocks + i + 1, (--*count - i) * sizeof **blocks);
        if (begin > block.start)
            put_block(blocks, count, room, (struct block){block.start, begin - block.start});
        if (begin + size < block.start + block.size)
            put_block(blocks, count, room, (struct block){begin + size, block.start + block.size - begin - size});
        *start = begin;
        return true;
    }
    return false;
}

/* ---- opening ---- */

/* Twice the device, so that pieces between others do not make it full before its bytes are. */
static size_t span_of_device(void)
{
    return sim_round_up(2 * (size_t)sim_knob(SIM_HBM_MIB) * MIB + (size_t)sim_knob(SIM_QUARANTINE_MIB) * MIB, GIB);
}

/* One range for all devices and imports. Where it lies differs between processes, so that a mixed-up address is
   found. */
static int reserve(void)
{
    if (reserved)
        return 0;
    char letters[3];
    sim_nonce(letters, 3);
    size_t number = ((size_t)(letters[0] - 'a') * 26 + (size_t)(letters[1] - 'a')) * 26 + (size_t)(letters[2] - 'a');
    /* Somewhere in the middle of the address space, and, where the system takes no advice, somewhere in what it
       gives. */
    void *hint = (void *)(0x120000000000 + number * 2 * GIB);
    size_t shift = number % 64 * GIB;
    size_t size = (size_t)sim_device_count() * span_of_device() + IMPORT_SPACE + GIB + shift;
    void *got = mmap(hint, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return sim_fail(ACL_INTERNAL_ERROR, "no address space for devices: %s", strerror(errno));
    madvise(got, size, MADV_DONTDUMP);
    madvise(got, size, MADV_DONTFORK);
    reserved = got;
    reserved_size = size;
    uintptr_t begin = sim_round_up((uintptr_t)got, GIB) + shift;
    put_block(&import_blocks, &import_count, &import_room,
              (struct block){(size_t)sim_device_count() * span_of_device(), IMPORT_SPACE});
    atomic_store(&range_begin, begin);
    atomic_store(&range_end, (uintptr_t)got + size);
    return 0;
}

bool sim_is_device_address(const void *address)
{
    uintptr_t begin = atomic_load(&range_begin);
    return begin && (uintptr_t)address >= begin && (uintptr_t)address < atomic_load(&range_end);
}

static int map_device(struct memory *memory, uintptr_t base)
{
    int rights = sim_knob(SIM_HOST_VISIBLE) ? PROT_READ | PROT_WRITE : PROT_NONE;
    memory->span = span_of_device();
    memory->file = memfd_create("llmdd-sim-device", MFD_CLOEXEC);
    if (memory->file < 0 || ftruncate(memory->file, (off_t)memory->span))
        return errno;
    void *named = mmap((void *)base, memory->span, rights, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, memory->file, 0);
    void *bytes = mmap(NULL, memory->span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory->file, 0);
    if (named == MAP_FAILED || bytes == MAP_FAILED)
        return errno;
    madvise(named, memory->span, MADV_DONTDUMP);
    madvise(named, memory->span, MADV_DONTFORK);
    madvise(bytes, memory->span, MADV_DONTDUMP);
    madvise(bytes, memory->span, MADV_DONTFORK);
    memory->base = base;
    memory->bytes = bytes;
    put_block(&memory->free_blocks, &memory->free_count, &memory->free_room, (struct block){0, memory->span});
    return 0;
}

int sim_memory_open(struct sim_device *device)
{
    struct memory *memory = &memories[device->id];
    int code = sim_table_open();
    if (code || memory->bytes)
        return code;
    pthread_mutex_lock(&lock);
    code = reserve();
    pthread_mutex_unlock(&lock);
    if (code)
        return code;
    pthread_mutex_init(&memory->lock, NULL);
    int error = map_device(memory, atomic_load(&range_begin) + (uintptr_t)device->id * span_of_device());
    return error ? sim_fail(ACL_INTERNAL_ERROR, "no memory for device %d: %s", device->id, strerror(error)) : 0;
}

static void close_memory(struct memory *memory)
{
    if (!memory->bytes)
        return;
    munmap(memory->bytes, memory->span);
    close(memory->file);
    free(memory->free_blocks);
    free(memory->quarantine);
    pthread_mutex_destroy(&memory->lock);
    memset(memory, 0, sizeof *memory);
}

void sim_memory_close(void)
{
    for (struct sim_range *left; (left = sim_range_take_any(NULL));)
        sim_range_put(left);
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        close_memory(&memories[i]);
    pthread_mutex_lock(&lock);
    if (reserved)
        munmap(reserved, reserved_size);
    reserved = NULL;
    free(import_blocks);
    import_blocks = NULL;
    import_count = import_room = 0;
    atomic_store(&range_begin, 0);
    pthread_mutex_unlock(&lock);
}

int sim_device_file(struct sim_device *device)
{
    return memories[device->id].bytes ? memories[device->id].file : -1;
}

size_t sim_device_span(struct sim_device *device)
{
    return memories[device->id].span;
}

unsigned char *sim_device_bytes(struct sim_device *device)
{
    return memories[device->id].bytes;
}

uintptr_t sim_device_base(struct sim_device *device)
{
    return memories[device->id].base;
}

/* ---- blocks ---- */

/* The oldest block back to the system and to the free ones. Under the memory's lock. */
static void release_oldest(struct memory *memory)
{
    struct block block = memory->quarantine[0];
    memmove(memory->quarantine, memory->quarantine + 1, --memory->quarantine_count * sizeof block);
    memory->quarantine_bytes -= block.size;
    fallocate(memory->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)block.start, (off_t)block.size);
    put_block(&memory->free_blocks, &memory->free_count, &memory->free_room, block);
}

bool sim_block_take(struct sim_device *device, size_t size, size_t alignment, size_t *start)
{
    struct memory *memory = &memories[device->id];
    pthread_mutex_lock(&memory->lock);
    bool found;
    while (
        !(found = get_block(&memory->free_blocks, &memory->free_count, &memory->free_room, size, alignment, start)) &&
        memory->quarantine_count)
        release_oldest(memory);
    pthread_mutex_unlock(&memory->lock);
    return found;
}

void sim_block_release(struct sim_device *device, size_t start, size_t size)
{
    struct memory *memory = &memories[device->id];
    size_t most = (size_t)sim_knob(SIM_QUARANTINE_MIB) * MIB;
    if (size <= most)
        memset(memory->bytes + start, 0xdd, size); /* who still reads it shall see that */
    pthread_mutex_lock(&memory->lock);
    if (memory->quarantine_count == memory->quarantine_room) {
        size_t more = memory->quarantine_room ? 2 * memory->quarantine_room : 64;
        struct block *larger = realloc(memory->quarantine, more * sizeof *larger);
        if (larger) {
            memory->quarantine = larger;
            memory->quarantine_room = more;
        }
    }
    if (memory->quarantine_count < memory->quarantine_room) {
        memory->quarantine[memory->quarantine_count++] = (struct block){start, size};
        memory->quarantine_bytes += size;
    }
    while (memory->quarantine_bytes > most)
        release_oldest(memory);
    pthread_mutex_unlock(&memory->lock);
}

void *sim_import_space(size_t size, size_t alignment)
{
    size_t start;
    pthread_mutex_lock(&lock);
    uintptr_t begin = atomic_load(&range_begin);
    bool found = begin && get_block(&import_blocks, &import_count, &import_room, size, alignment, &start);
    pthread_mutex_unlock(&lock);
    return found ? (void *)(begin + start) : NULL;
}

void sim_import_space_free(void *address, size_t size)
{
    mmap(address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    pthread_mutex_lock(&lock);
    put_block(&import_blocks, &import_count, &import_room,
              (struct block){(uintptr_t)address - atomic_load(&range_begin), size});
    pthread_mutex_unlock(&lock);
}

void sim_memory_clear(struct sim_device *device)
{
    for (struct sim_range *left; (left = sim_range_take_any(device));) {
        sim_discharge(device, left->charged);
        sim_range_put(left);
    }
}
