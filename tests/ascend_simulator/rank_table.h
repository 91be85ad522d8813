/* Rank tables, versions 1.0 and 1.2, read as strictly as their description allows. */
#ifndef RANK_TABLE_H
#define RANK_TABLE_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>

#define RANK_TABLE_BYTES_MAX 65536
#define RANK_TABLE_DEFAULT_PORT 16666
#define RANK_TABLE_RANKS_MAX 64

struct rank_entry {
    int server;                     /* index in the table */
    uint32_t device;                /* physical id on its server */
    char address[INET6_ADDRSTRLEN]; /* the first one of the list, empty without */
    uint16_t port;
    int pod; /* index of the super pod, -1 without */
    bool has_super_device;
};

struct rank_table {
    uint32_t ranks;
    int servers;
    int pods;
    uint64_t digest;                               /* of the text */
    struct rank_entry entry[RANK_TABLE_RANKS_MAX]; /* by rank */
};

/* True when the text obeys every rule that needs no knowledge of the machine; else `reason` says which one it breaks.
 * `super_pods` is whether the product knows version 1.2. */
bool rank_table_parse(const char *text, bool super_pods, struct rank_table *table, char *reason, size_t reason_size);

uint64_t rank_table_digest(const char *text);

/* Whether the two ranks reach each other without their network ports on a product with or without super pods. */
bool rank_table_near(const struct rank_table *table, uint32_t a, uint32_t b);

#endif
