"""Copy engine: carries out a plan of tensors x runs without the interpreter lock.

A plan names addresses in this process; where they come from (a pool, a peer's mapping, registered tensors) is the
caller's business, and so is the check that they may be touched. Bytes are moved in chunks, and the gate is read
between two chunks, so that a deadline, a dead peer or a closing link ends a copy within about a millisecond.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from llm_datadist._atomics cimport load_acquire, monotonic_ns

cdef extern from "stream_copy.h" nogil:
    void stream_copy(void *target, const void *source, size_t nbytes)
    void stream_fence()

# Bytes between two looks at the gate: long enough that the look (about 30 ns) does not show, short enough that a
# deadline is met within a fraction of a millisecond.
cdef uint64_t CHUNK = 1 << 20

# Plans of so many bytes go past the caches. Below it the target may still be in a cache when it is read next, and a
# plain copy of warm buffers is faster; above it a stream copy moved 15 to 17 GB/s where a plain one moved 8 to 10
# (one core of an AMD EPYC).
cdef uint64_t STREAM_FROM = 4 << 20


cdef bint stopped(const Gate *gate) noexcept nogil:
    return (
        (gate.peer_dead != NULL and load_acquire(gate.peer_dead) != 0)
        or (gate.revoked != NULL and load_acquire(gate.revoked) != 0)
        or (gate.closing != NULL and load_acquire(gate.closing) != 0)
    )


cdef CopyOutcome execute(const Plan *plan, const Gate *gate) noexcept nogil:
    """Copy the whole plan, or as much of it as the gate allows."""
    cdef bint streaming = _bytes_of(plan) >= STREAM_FROM
    cdef CopyOutcome outcome = _execute(plan, gate, streaming)
    if streaming:
        stream_fence()
    return outcome


cdef uint64_t _bytes_of(const Plan *plan) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint64_t r
    for r in range(plan.num_runs):
        total += plan.runs[r].nbytes
    return total * plan.tensors


cdef CopyOutcome _execute(const Plan *plan, const Gate *gate, bint streaming) noexcept nogil:
    cdef uint64_t budget = CHUNK
    cdef uint64_t t, r, source, target, left, piece
    if stopped(gate):
        return COPY_STOPPED
    for t in range(plan.tensors):
        for r in range(plan.num_runs):
            source = plan.sources[t] + plan.runs[r].source
            target = plan.targets[t] + plan.runs[r].target
            left = plan.runs[r].nbytes
            while left != 0:
                piece = left if left < budget else budget
                if streaming:
                    stream_copy(<void *>target, <const void *>source, piece)
                else:
                    memcpy(<void *>target, <const void *>source, piece)
                source += piece
                target += piece
                left -= piece
                budget -= piece
                if budget == 0:
                    budget = CHUNK
                    if stopped(gate):
                        return COPY_STOPPED
                    if monotonic_ns() > gate.deadline_ns:
                        return COPY_TIMED_OUT
    return COPIED


cdef uint64_t join_run(Run *runs, uint64_t num_runs, uint64_t source, uint64_t target, uint64_t nbytes) noexcept nogil:
    """Append a run, or lengthen the last one if the new one goes on where it ends on both sides; returns the count."""
    cdef Run *last
    if num_runs != 0:
        last = &runs[num_runs - 1]
        if last.source + last.nbytes == source and last.target + last.nbytes == target:
            last.nbytes += nbytes
            return num_runs
    runs[num_runs].source = source
    runs[num_runs].target = target
    runs[num_runs].nbytes = nbytes
    return num_runs + 1


def copy_runs(list sources not None, list targets not None, list runs not None, uint64_t deadline_ns):
    """Copy bytes between addresses of this process.

    Parameters
    ----------
    sources, targets : list of int
        Address of each tensor; both lists have the same length. The caller vouches for the addresses.
    runs : list of (int, int, int)
        Offset in the source tensor, offset in the target tensor, bytes. Neighbouring runs are joined.
    deadline_ns : int
        End of the time allowed, on the clock of ``time.monotonic_ns``.

    Returns
    -------
    int
        0 when everything was copied, 1 when the deadline passed first (a part may have been copied).
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} source tensors but {len(targets)} target tensors")
    cdef uint64_t tensors = len(sources)
    cdef uint64_t count = len(runs)
    cdef uint64_t *addresses = <uint64_t *>PyMem_Malloc((2 * tensors + 1) * sizeof(uint64_t))
    cdef Run *joined = <Run *>PyMem_Malloc((count + 1) * sizeof(Run))
    cdef Plan plan
    cdef Gate gate
    cdef CopyOutcome outcome
    cdef uint64_t i
    cdef uint64_t used = 0
    try:
        if addresses == NULL or joined == NULL:
            raise MemoryError()
        for i in range(tensors):
            addresses[i] = sources[i]
            addresses[tensors + i] = targets[i]
        for source, target, nbytes in runs:
            used = join_run(joined, used, source, target, nbytes)
        plan = Plan(sources=addresses, targets=addresses + tensors, tensors=tensors, runs=joined, num_runs=used)
        gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=NULL)
        with nogil:
            outcome = execute(&plan, &gate)
        return <int>outcome
    finally:
        PyMem_Free(addresses)
        PyMem_Free(joined)
