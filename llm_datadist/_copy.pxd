from libc.stdint cimport uint64_t

# A transfer plan: for every tensor t and every run r, `runs[r].nbytes` bytes go
# from sources[t] + runs[r].source to targets[t] + runs[r].target.
cdef struct Run:
    uint64_t source
    uint64_t target
    uint64_t nbytes

# Whose memory the addresses of a plan are in; of the two sides at most one belongs to another process.
cdef enum Carrier:
    IN_PROCESS = 0            # both sides are mapped here
    READ_PROCESS = 1          # sources are in process `pid`
    WRITE_PROCESS = 2         # targets are in process `pid`

cdef struct Plan:
    const uint64_t *sources   # address of each source tensor
    const uint64_t *targets   # address of each target tensor
    uint64_t tensors
    const Run *runs
    uint64_t num_runs
    Carrier carrier
    int pid                   # of the other process

# What may end a copy early. The words are read between chunks; a null pointer is never raised.
cdef struct Gate:
    uint64_t deadline_ns      # monotonic clock
    const uint64_t *peer_dead
    const uint64_t *revoked
    const uint64_t *closing

cdef enum CopyOutcome:
    COPIED = 0
    COPY_TIMED_OUT = 1
    COPY_STOPPED = 2
    COPY_FAULT = 3            # an address of the other process, or of this one in a transfer with it, is not mapped
    COPY_NO_PROCESS = 4       # the other process is gone
    COPY_DENIED = 5           # the kernel does not let us touch its memory

cdef CopyOutcome execute(const Plan *plan, const Gate *gate) noexcept nogil
cdef CopyOutcome execute_shared(const Plan *plan, const Gate *gate, uint64_t threads, bint in_order) noexcept nogil
cdef bint stopped(const Gate *gate) noexcept nogil
cdef uint64_t join_run(Run *runs, uint64_t num_runs, uint64_t source, uint64_t target, uint64_t nbytes) noexcept nogil
