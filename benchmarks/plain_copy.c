/* The limit once more, in plain C that shares nothing with the library: each thread copies its part with non-temporal
 * stores. Built and run by limits.py with the flags of this machine's processor; prints the seconds of each run. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { RUNS = 11, WARM_UP = 2, HUGE_PAGE = 2 << 20 };

static char *source, *target;
static size_t nbytes;
static long threads;
static pthread_barrier_t barrier;

static void copy(char *to, const char *from, size_t size)
{
#if defined(__AVX512F__)
    for (size_t i = 0; i < size; i += 64)
        _mm512_stream_si512((void *)(to + i), _mm512_load_si512(from + i));
    _mm_sfence();
#elif defined(__AVX2__)
    for (size_t i = 0; i < size; i += 32)
        _mm256_stream_si256((void *)(to + i), _mm256_load_si256((const void *)(from + i)));
    _mm_sfence();
#elif defined(__x86_64__)
    for (size_t i = 0; i < size; i += 16)
        _mm_stream_si128((void *)(to + i), _mm_load_si128((const void *)(from + i)));
    _mm_sfence();
#else
    memcpy(to, from, size);
#endif
}

static void *body(void *argument)
{
    size_t part = nbytes / threads / 64 * 64, begin = (size_t)(intptr_t)argument * part;
    size_t size = (intptr_t)argument == threads - 1 ? nbytes - begin : part;
    for (int run = 0; run < WARM_UP + RUNS; run++) {
        pthread_barrier_wait(&barrier);
        copy(target + begin, source + begin, size);
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static char *buffer(int value)
{
    char *memory = aligned_alloc(HUGE_PAGE, nbytes);
    madvise(memory, nbytes, MADV_HUGEPAGE);
    return memset(memory, value, nbytes);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    nbytes = strtoull(arguments[1], NULL, 10) / HUGE_PAGE * HUGE_PAGE;
    threads = strtol(arguments[2], NULL, 10);
    source = buffer(7);
    target = buffer(1);
    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (long i = 0; i < threads; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, body, (void *)(intptr_t)i);
        pthread_detach(thread);
    }
    for (int run = 0; run < WARM_UP + RUNS; run++) {
        double started = now();
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        if (run >= WARM_UP)
            printf("%.9f\n", now() - started);
    }
    return memcmp(source, target, nbytes) != 0;
}
