/* Memory that the process has registered for one-sided access, and which communicator shows which of it. */
#ifndef REGISTRATIONS_H
#define REGISTRATIONS_H

#include "communicator.h"

struct registration {
    struct sim_object object;
    struct registration *next;
    struct sim_device *device;
    CommMem memory;
    struct sim_view view;
    int bindings;
};

struct binding {
    struct binding *next;
    struct registration *registration;
    bool shown; /* bound before the preparation: peers know it by `number` */
    uint64_t number;
};

/* The binding that contains the whole range, or NULL. Mutex held. */
struct binding *binding_of(struct communicator *communicator, const void *address, uint64_t size);

#endif
