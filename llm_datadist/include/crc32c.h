/* CRC-32C (Castagnoli; RFC 3720, appendix B.4) of bytes that arrive in pieces: crc = crc32c(crc, piece, nbytes), from 0 on.

   With the processor's instruction where there is one. One instruction takes 8 bytes and waits 3 cycles for the one
   before it, so three stretches of a piece are summed side by side and joined afterwards. */

#ifndef LLM_DATADIST_CRC32C_H
#define LLM_DATADIST_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define CRC32C_TARGET __attribute__((target("sse4.2")))
#define CRC32C_WORD(crc, word) __builtin_ia32_crc32di((crc), (word))
#define CRC32C_BYTE(crc, byte) __builtin_ia32_crc32qi((uint32_t)(crc), (byte))
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#define CRC32C_TARGET __attribute__((target("+crc")))
#define CRC32C_WORD(crc, word) __crc32cd((uint32_t)(crc), (word))
#define CRC32C_BYTE(crc, byte) __crc32cb((uint32_t)(crc), (byte))
#endif

#define CRC32C_POLYNOMIAL 0x82F63B78u /* reflected */
#define CRC32C_STRETCH 4096           /* bytes of one of the three */

/* Of each byte; and what a sum becomes when CRC32C_STRETCH zero bytes follow it, for each byte of the sum. */
static uint32_t crc32c_of_byte[256];
static uint32_t crc32c_over_stretch[4][256];
static int crc32c_ready; /* 0 = tables are not filled, 1 = no instruction, 2 = with it */

static inline uint32_t crc32c_by_table(uint32_t crc, const unsigned char *bytes, size_t nbytes)
{
    while (nbytes--)
        crc = crc32c_of_byte[(crc ^ *bytes++) & 0xFF] ^ (crc >> 8);
    return crc;
}

static inline uint32_t crc32c_skip_stretch(uint32_t crc)
{
    return crc32c_over_stretch[0][crc & 0xFF] ^ crc32c_over_stretch[1][(crc >> 8) & 0xFF] ^
           crc32c_over_stretch[2][(crc >> 16) & 0xFF] ^ crc32c_over_stretch[3][crc >> 24];
}

/* Fills the tables; call once, before any thread sums. */
static inline void crc32c_prepare(void)
{
    static const unsigned char zeros[CRC32C_STRETCH];
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? CRC32C_POLYNOMIAL : 0);
        crc32c_of_byte[byte] = crc;
    }
    /* The sum is linear: what becomes of 32 single bits tells what becomes of everything. */
    for (int place = 0; place < 4; place++) {
        uint32_t of_bit[8];
        for (int bit = 0; bit < 8; bit++)
            of_bit[bit] = crc32c_by_table((uint32_t)1 << (8 * place + bit), zeros, CRC32C_STRETCH);
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t crc = 0;
            for (int bit = 0; bit < 8; bit++)
                crc ^= byte >> bit & 1 ? of_bit[bit] : 0;
            crc32c_over_stretch[place][byte] = crc;
        }
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    crc32c_ready = __builtin_cpu_supports("sse4.2") ? 2 : 1;
#elif defined(__aarch64__)
    crc32c_ready = getauxval(AT_HWCAP) & HWCAP_CRC32 ? 2 : 1;
#else
    crc32c_ready = 1;
#endif
}

#ifdef CRC32C_TARGET
static inline uint64_t crc32c_load(const unsigned char *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof(word));
    return word;
}

CRC32C_TARGET static uint32_t crc32c_by_instruction(uint32_t sum, const unsigned char *bytes, size_t nbytes)
{
    uint64_t crc = sum;
    while (nbytes >= 3 * CRC32C_STRETCH) {
        const unsigned char *second = bytes + CRC32C_STRETCH, *third = bytes + 2 * CRC32C_STRETCH;
        uint64_t of_second = 0, of_third = 0;
        for (size_t at = 0; at < CRC32C_STRETCH; at += 8) {
            crc = CRC32C_WORD(crc, crc32c_load(bytes + at));
            of_second = CRC32C_WORD(of_second, crc32c_load(second + at));
            of_third = CRC32C_WORD(of_third, crc32c_load(third + at));
        }
        crc = crc32c_skip_stretch((uint32_t)crc) ^ of_second;
        crc = crc32c_skip_stretch((uint32_t)crc) ^ of_third;
        bytes += 3 * CRC32C_STRETCH;
        nbytes -= 3 * CRC32C_STRETCH;
    }
    for (; nbytes >= 8; bytes += 8, nbytes -= 8)
        crc = CRC32C_WORD(crc, crc32c_load(bytes));
    for (; nbytes; bytes++, nbytes--)
        crc = CRC32C_BYTE(crc, *bytes);
    return (uint32_t)crc;
}
#endif

static inline uint32_t crc32c(uint32_t crc, const void *bytes, size_t nbytes)
{
    crc = ~crc;
#ifdef CRC32C_TARGET
    if (crc32c_ready == 2)
        return ~crc32c_by_instruction(crc, bytes, nbytes);
#endif
    return ~crc32c_by_table(crc, bytes, nbytes);
}

#endif
