/* Structures of the ACL runtime that pass between this library and the vendor's: no vendor header at build time, so that
 * wheels can be built on a plain machine. The sizes are those that a 64-bit compiler gives the public header. */
#ifndef LLM_DATADIST_ACL_STRUCTURES_H
#define LLM_DATADIST_ACL_STRUCTURES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t id;
    int32_t type;
} llmdd_acl_mem_location;

typedef struct {
    llmdd_acl_mem_location location;
    uint32_t page_size;
    uint32_t reserved[4];
} llmdd_acl_pointer_attributes;

_Static_assert(sizeof(llmdd_acl_mem_location) == 8, "aclrtMemLocation");
_Static_assert(sizeof(llmdd_acl_pointer_attributes) == 28, "aclrtPtrAttributes");
_Static_assert(sizeof(int) == 4, "aclError and every enumeration are 32 bits wide");
_Static_assert(sizeof(size_t) == 8 && sizeof(void *) == 8, "a 64-bit machine");

#endif
