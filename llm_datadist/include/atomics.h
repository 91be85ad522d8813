/* Atomic operations on 64-bit words that several processes share, and the monotonic clock.
 *
 * One small set of named operations, so that every access to shared memory says in its name which order it has.
 * GCC and Clang builtins; lock-free for aligned 64-bit words on x86-64 and aarch64, which shared memory requires.
 */
#ifndef LLM_DATADIST_ATOMICS_H
#define LLM_DATADIST_ATOMICS_H

#include <stdint.h>
#include <time.h>

_Static_assert(__atomic_always_lock_free(sizeof(uint64_t), 0), "64-bit atomics must be lock-free to be shared");

static inline uint64_t load_relaxed(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint64_t load_acquire(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void store_relaxed(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void store_release(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static inline uint64_t exchange(uint64_t *word, uint64_t value) {
    return __atomic_exchange_n(word, value, __ATOMIC_SEQ_CST);
}
static inline uint64_t fetch_add(uint64_t *word, uint64_t value) {
    return __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
}
static inline uint64_t fetch_sub(uint64_t *word, uint64_t value) {
    return __atomic_fetch_sub(word, value, __ATOMIC_SEQ_CST);
}
static inline uint64_t fetch_or(uint64_t *word, uint64_t bits) {
    return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}
static inline uint64_t fetch_and(uint64_t *word, uint64_t bits) {
    return __atomic_fetch_and(word, bits, __ATOMIC_SEQ_CST);
}
static inline int compare_exchange(uint64_t *word, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static inline void fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
static inline void fence_full(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Index of the lowest set bit; the word must not be zero. */
static inline unsigned lowest_bit(uint64_t word) { return (unsigned)__builtin_ctzll(word); }

/* A hint to the processor inside a spin loop. */
static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Nanoseconds of the clock that Python calls time.monotonic_ns(). */
static inline uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

#endif
