/* Copies that go past the caches.
 *
 * A plain copy reads each line of the target into the cache before it overwrites it, and evicts what others have there.
 * Non-temporal stores do neither: for copies too large to be read again from the cache they move nearly twice as much.
 * The vector width is picked at run time. Elsewhere than on x86-64 a stream copy is a plain one.
 */
#ifndef LLM_DATADIST_STREAM_COPY_H
#define LLM_DATADIST_STREAM_COPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

#define STREAM_LINE 64u        /* bytes of a cache line: targets of the loops below start at a multiple of it */
#define STREAM_PREFETCH 1024u  /* bytes to read ahead; measured, anything from 512 to 2048 does as well */

__attribute__((target("avx2"))) static inline void stream_lines_avx2(char *target, const char *source, size_t nbytes) {
    for (size_t at = 0; at < nbytes; at += STREAM_LINE) {
        _mm_prefetch(source + at + STREAM_PREFETCH, _MM_HINT_NTA);
        __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)(source + at));
        __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(source + at + 32));
        _mm256_stream_si256((__m256i *)(void *)(target + at), low);
        _mm256_stream_si256((__m256i *)(void *)(target + at + 32), high);
    }
}

static inline void stream_lines_sse2(char *target, const char *source, size_t nbytes) {
    for (size_t at = 0; at < nbytes; at += STREAM_LINE) {
        _mm_prefetch(source + at + STREAM_PREFETCH, _MM_HINT_NTA);
        for (size_t part = 0; part < STREAM_LINE; part += 16) {
            __m128i value = _mm_loadu_si128((const __m128i *)(const void *)(source + at + part));
            _mm_stream_si128((__m128i *)(void *)(target + at + part), value);
        }
    }
}

/* Copy without caching the target. `stream_fence` must follow before anyone is told that the bytes are there. */
static inline void stream_copy(void *target, const void *source, size_t nbytes) {
    char *to = (char *)target;
    const char *from = (const char *)source;
    size_t head = (size_t)(-(uintptr_t)to & (STREAM_LINE - 1));
    if (nbytes < head + STREAM_LINE) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, head);
    to += head;
    from += head;
    nbytes -= head;
    size_t lines = nbytes & ~(size_t)(STREAM_LINE - 1);
    if (__builtin_cpu_supports("avx2")) {
        stream_lines_avx2(to, from, lines);
    } else {
        stream_lines_sse2(to, from, lines);
    }
    memcpy(to + lines, from + lines, nbytes - lines);
}

static inline void stream_fence(void) { _mm_sfence(); }

#else

static inline void stream_copy(void *target, const void *source, size_t nbytes) { memcpy(target, source, nbytes); }
static inline void stream_fence(void) {}

#endif
#endif
