/* Copies that go past the caches.
 *
 * A plain copy reads each line of the target into the cache before it overwrites it, and evicts what others have there.
 * Non-temporal stores do neither: for copies too large to be read again from the cache they move nearly twice as much.
 * The vector width is picked at run time on x86-64 (AVX-512, AVX2, SSE2); aarch64 stores pairs of registers.
 *
 * The source is read ahead, far into the second cache and near into the first, and at the end of a run what is copied
 * next: more lines can be on their way to the second cache than to the first, and in small blocks at random places the
 * first lines of a block would else be waited for. Against reading ahead into the first cache alone, blocks of 4 KiB
 * move 40 % faster and those of 64 KiB 15 % (AMD EPYC).
 */
#ifndef LLM_DATADIST_STREAM_COPY_H
#define LLM_DATADIST_STREAM_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define STREAM_LINE 64u     /* bytes of a cache line: targets of the loops below start at a multiple of it */
#define STREAM_STEP 128u    /* bytes in one turn of the loops: two lines */
#define STREAM_FAR 2560u    /* bytes to read ahead: of 1024 to 4096 and 256 to 1024 the best pair over all sizes */
#define STREAM_NEAR 1024u

#if defined(__x86_64__)
#include <immintrin.h>
#define STREAM_PREFETCH_FAR(address) _mm_prefetch((address), _MM_HINT_T1)
#define STREAM_PREFETCH_NEAR(address) _mm_prefetch((address), _MM_HINT_T0)

__attribute__((target("avx512f"))) static inline void stream_line_avx512(char *target, const char *source) {
    _mm512_stream_si512((__m512i *)(void *)target, _mm512_loadu_si512((const void *)source));
}

__attribute__((target("avx2"))) static inline void stream_line_avx2(char *target, const char *source) {
    __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)source);
    __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(source + 32));
    _mm256_stream_si256((__m256i *)(void *)target, low);
    _mm256_stream_si256((__m256i *)(void *)(target + 32), high);
}

static inline void stream_line_sse2(char *target, const char *source) {
    for (size_t part = 0; part < STREAM_LINE; part += 16) {
        __m128i value = _mm_loadu_si128((const __m128i *)(const void *)(source + part));
        _mm_stream_si128((__m128i *)(void *)(target + part), value);
    }
}

#elif defined(__aarch64__)
#define STREAM_PREFETCH_FAR(address) __asm__ __volatile__("prfm pldl2strm, [%0]" : : "r"(address))
#define STREAM_PREFETCH_NEAR(address) __asm__ __volatile__("prfm pldl1strm, [%0]" : : "r"(address))

static inline void stream_line_neon(char *target, const char *source) {
    __asm__ __volatile__(
        "ldp q0, q1, [%1]\n\t"
        "ldp q2, q3, [%1, #32]\n\t"
        "stnp q0, q1, [%0]\n\t"
        "stnp q2, q3, [%0, #32]"
        :
        : "r"(target), "r"(source)
        : "v0", "v1", "v2", "v3", "memory");
}
#endif

/* A loop over whole steps for one way to store a line. */
#define STREAM_LINES(name, attributes, stream_line)                                                        \
    attributes static void name(char *target, const char *source, size_t nbytes, const char *next) {       \
        size_t at = 0;                                                                                     \
        if (nbytes > STREAM_FAR) {                                                                         \
            for (; at < nbytes - STREAM_FAR; at += STREAM_STEP) {                                          \
                STREAM_PREFETCH_FAR(source + at + STREAM_FAR);                                             \
                STREAM_PREFETCH_FAR(source + at + STREAM_FAR + STREAM_LINE);                               \
                STREAM_PREFETCH_NEAR(source + at + STREAM_NEAR);                                           \
                STREAM_PREFETCH_NEAR(source + at + STREAM_NEAR + STREAM_LINE);                             \
                stream_line(target + at, source + at);                                                     \
                stream_line(target + at + STREAM_LINE, source + at + STREAM_LINE);                         \
            }                                                                                              \
        }                                                                                                  \
        for (; at < nbytes; at += STREAM_STEP, next += STREAM_STEP) {                                      \
            STREAM_PREFETCH_FAR(next);                                                                     \
            STREAM_PREFETCH_FAR(next + STREAM_LINE);                                                       \
            stream_line(target + at, source + at);                                                         \
            stream_line(target + at + STREAM_LINE, source + at + STREAM_LINE);                             \
        }                                                                                                  \
    }

#if defined(__x86_64__)
STREAM_LINES(stream_lines_avx512, __attribute__((target("avx512f"))), stream_line_avx512)
STREAM_LINES(stream_lines_avx2, __attribute__((target("avx2"))), stream_line_avx2)
STREAM_LINES(stream_lines_sse2, , stream_line_sse2)

static inline void stream_lines(char *target, const char *source, size_t nbytes, const char *next) {
    if (__builtin_cpu_supports("avx512f")) {
        stream_lines_avx512(target, source, nbytes, next);
    } else if (__builtin_cpu_supports("avx2")) {
        stream_lines_avx2(target, source, nbytes, next);
    } else {
        stream_lines_sse2(target, source, nbytes, next);
    }
}

static inline void stream_fence(void) { _mm_sfence(); }

#elif defined(__aarch64__)
STREAM_LINES(stream_lines, , stream_line_neon)

static inline void stream_fence(void) { __asm__ __volatile__("dmb ishst" : : : "memory"); }

#else

static inline void stream_lines(char *target, const char *source, size_t nbytes, const char *next) {
    (void)next;
    memcpy(target, source, nbytes);
}

static inline void stream_fence(void) {}
#endif

/* Copy without caching the target; `next` is what will be copied after it, or the source itself. `stream_fence` must
 * follow before anyone is told that the bytes are there. */
static inline void stream_copy(void *target, const void *source, size_t nbytes, const void *next) {
    char *to = (char *)target;
    const char *from = (const char *)source;
    size_t head = (size_t)(-(uintptr_t)to & (STREAM_LINE - 1));
    if (nbytes < head + STREAM_STEP) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, head);
    to += head;
    from += head;
    nbytes -= head;
    size_t whole = nbytes & ~(size_t)(STREAM_STEP - 1);
    stream_lines(to, from, whole, (const char *)next);
    memcpy(to + whole, from + whole, nbytes - whole);
}

#endif
