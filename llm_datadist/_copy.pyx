"""Copy engine: carries out a plan of tensors x runs without the interpreter lock, in one thread or in several.

A plan names addresses in this process, or on one side in another one; where they come from (a pool, a peer's mapping,
registered tensors) is the caller's business, and so is the check that they may be touched. Bytes are moved in chunks,
and the gate is read between two chunks, so that a deadline, a dead peer or a closing link ends a copy within about a
millisecond.

Memory of another process is read and written through the kernel (process_vm_readv(2)): one-sided, the other process
takes no part in it and need not even run.
"""

import os

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EPERM, ESRCH, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from llm_datadist._atomics cimport compare_exchange, load_acquire, monotonic_ns, relax, store_release

cdef extern from "stream_copy.h" nogil:
    void stream_copy(void *target, const void *source, size_t nbytes, const void *next)
    void stream_fence()

cdef extern from "copy_workers.h" nogil:
    void copy_workers_enter()
    void copy_workers_leave()
    void copy_workers_run(void (*run)(void *) noexcept nogil, void *work, unsigned helpers)
    void copy_workers_forget()

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(
        int pid, const iovec *local, unsigned long num_local, const iovec *remote, unsigned long num_remote,
        unsigned long flags,
    )
    ssize_t process_vm_writev(
        int pid, const iovec *local, unsigned long num_local, const iovec *remote, unsigned long num_remote,
        unsigned long flags,
    )

# Bytes between two looks at the gate: long enough that the look (about 30 ns) does not show, short enough that a
# deadline is met within a fraction of a millisecond.
cdef uint64_t CHUNK = 1 << 20

# Plans of so many bytes go past the caches. Below it the target may still be in a cache when it is read next, and a
# plain copy of warm buffers is faster; above it a stream copy moved 15 to 17 GB/s where a plain one moved 8 to 10
# (one core of an AMD EPYC).
cdef uint64_t STREAM_FROM = 4 << 20

cdef enum:
    SHARE_BYTES = 1 << 20     # waking a parked thread costs 10 us, in which one core copies 200 KiB
    PIECE = 512 << 10         # what a thread takes at a time
    VECTORS = 256             # ranges in one call to the kernel, which takes 1024 (IOV_MAX); more brings nothing


cdef bint stopped(const Gate *gate) noexcept nogil:
    return (
        (gate.peer_dead != NULL and load_acquire(gate.peer_dead) != 0)
        or (gate.revoked != NULL and load_acquire(gate.revoked) != 0)
        or (gate.closing != NULL and load_acquire(gate.closing) != 0)
    )


cdef CopyOutcome execute(const Plan *plan, const Gate *gate) noexcept nogil:
    """Copy the whole plan, or as much of it as the gate allows."""
    return _execute_part(plan, gate, 0, _bytes_of(plan))


cdef uint64_t _bytes_of_tensor(const Plan *plan) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint64_t r
    for r in range(plan.num_runs):
        total += plan.runs[r].nbytes
    return total


cdef uint64_t _bytes_of(const Plan *plan) noexcept nogil:
    return _bytes_of_tensor(plan) * plan.tensors


# ---- one thread

# Where a part of a plan stands: the runs of the first tensor, then those of the next, as one sequence of bytes.
cdef struct Cursor:
    uint64_t tensor
    uint64_t run
    uint64_t done             # bytes of the run that are behind us
    uint64_t left             # bytes of the part that are before us


cdef struct Piece:
    uint64_t source
    uint64_t target
    uint64_t nbytes


cdef Cursor _start_at(const Plan *plan, uint64_t begin, uint64_t end) noexcept nogil:
    cdef Cursor at
    cdef uint64_t per_tensor = _bytes_of_tensor(plan)
    cdef uint64_t skip
    at.run = 0
    at.left = end - begin
    at.tensor = begin // per_tensor if per_tensor != 0 else 0
    skip = begin - at.tensor * per_tensor
    while at.left != 0 and skip >= plan.runs[at.run].nbytes:
        skip -= plan.runs[at.run].nbytes
        at.run += 1
    at.done = skip
    return at


cdef Piece _next_piece(const Plan *plan, Cursor *at, uint64_t most) noexcept nogil:
    """Take up to `most` bytes that lie together on both sides; the part must not be at its end."""
    cdef Piece piece
    cdef const Run *run = &plan.runs[at.run]
    piece.source = plan.sources[at.tensor] + run.source + at.done
    piece.target = plan.targets[at.tensor] + run.target + at.done
    piece.nbytes = min(run.nbytes - at.done, at.left, most)
    at.done += piece.nbytes
    at.left -= piece.nbytes
    while at.left != 0 and at.done == plan.runs[at.run].nbytes:
        at.done = 0
        at.run += 1
        if at.run == plan.num_runs:
            at.run = 0
            at.tensor += 1
    return piece


cdef CopyOutcome _execute_part(const Plan *plan, const Gate *gate, uint64_t begin, uint64_t end) noexcept nogil:
    """Copy the bytes from `begin` to `end` of the plan."""
    cdef Cursor at = _start_at(plan, begin, end)
    return _execute_from(plan, gate, &at, end - begin >= STREAM_FROM)


cdef CopyOutcome _execute_from(const Plan *plan, const Gate *gate, Cursor *at, bint streaming) noexcept nogil:
    cdef CopyOutcome outcome
    if stopped(gate):
        return COPY_STOPPED
    if plan.carrier != IN_PROCESS:
        return _copy_between_processes(plan, gate, at)
    if not streaming:
        return _copy_through_caches(plan, gate, at)
    outcome = _copy_past_caches(plan, gate, at)
    stream_fence()
    return outcome


cdef CopyOutcome _copy_through_caches(const Plan *plan, const Gate *gate, Cursor *at) noexcept nogil:
    cdef uint64_t budget = CHUNK
    cdef Piece piece
    while at.left != 0:
        piece = _next_piece(plan, at, budget)
        memcpy(<void *>piece.target, <const void *>piece.source, piece.nbytes)
        budget -= piece.nbytes
        if budget == 0 and at.left != 0:
            budget = CHUNK
            if stopped(gate):
                return COPY_STOPPED
            if monotonic_ns() > gate.deadline_ns:
                return COPY_TIMED_OUT
    return COPIED


cdef CopyOutcome _copy_past_caches(const Plan *plan, const Gate *gate, Cursor *at) noexcept nogil:
    cdef uint64_t copied = 0
    cdef Piece piece, next_piece
    if at.left == 0:
        return COPIED
    next_piece = _next_piece(plan, at, CHUNK)
    while True:
        piece = next_piece
        if at.left == 0:
            stream_copy(<void *>piece.target, <const void *>piece.source, piece.nbytes, <const void *>piece.source)
            return COPIED
        next_piece = _next_piece(plan, at, CHUNK)
        stream_copy(<void *>piece.target, <const void *>piece.source, piece.nbytes, <const void *>next_piece.source)
        copied += piece.nbytes
        if copied >= CHUNK:
            copied = 0
            if stopped(gate):
                return COPY_STOPPED
            if monotonic_ns() > gate.deadline_ns:
                return COPY_TIMED_OUT


cdef CopyOutcome _copy_between_processes(const Plan *plan, const Gate *gate, Cursor *at) noexcept nogil:
    cdef iovec local[VECTORS]
    cdef iovec remote[VECTORS]
    cdef bint reading = plan.carrier == READ_PROCESS
    cdef uint64_t budget
    cdef unsigned long count
    cdef ssize_t moved
    cdef Piece piece
    while at.left != 0:
        count = 0
        budget = CHUNK
        while at.left != 0 and budget != 0 and count < VECTORS:
            piece = _next_piece(plan, at, budget)
            local[count].iov_base = <void *>(piece.target if reading else piece.source)
            remote[count].iov_base = <void *>(piece.source if reading else piece.target)
            local[count].iov_len = remote[count].iov_len = piece.nbytes
            budget -= piece.nbytes
            count += 1
        if reading:
            moved = process_vm_readv(plan.pid, local, count, remote, count, 0)
        else:
            moved = process_vm_writev(plan.pid, local, count, remote, count, 0)
        if moved < 0:
            return COPY_NO_PROCESS if errno == ESRCH else COPY_DENIED if errno == EPERM else COPY_FAULT
        if <uint64_t>moved != CHUNK - budget:
            return COPY_FAULT  # it stops at the first page that is not there
        if stopped(gate):
            return COPY_STOPPED
        if at.left != 0 and monotonic_ns() > gate.deadline_ns:
            return COPY_TIMED_OUT
    return COPIED


# ---- several threads

# What the threads of one copy share. A thread takes a piece at a time, so one that comes late, or is held up, costs
# no more than its piece.
cdef struct Shared:
    const Plan *plan
    const Gate *gate
    uint64_t lock             # 1: a thread moves `at`
    Cursor at                 # what no thread has taken
    uint64_t piece            # bytes
    bint streaming
    uint64_t outcome          # of the first piece that did not end well


cdef CopyOutcome execute_shared(const Plan *plan, const Gate *gate, uint64_t threads, bint in_order) noexcept nogil:
    """Carry a plan out, in several threads if it is large; with `in_order` the runs of a tensor one after the other."""
    cdef Shared shared
    cdef uint64_t total = _bytes_of(plan)
    threads = min(threads, total // SHARE_BYTES)
    if in_order:
        threads = min(threads, plan.tensors)
    if threads < 2:
        return _execute_part(plan, gate, 0, total)
    shared.plan = plan
    shared.gate = gate
    shared.lock = 0
    shared.at = _start_at(plan, 0, total)
    shared.streaming = total >= STREAM_FROM
    shared.piece = _bytes_of_tensor(plan) if in_order else PIECE
    shared.outcome = COPIED
    copy_workers_run(_copy_pieces, &shared, <unsigned>(threads - 1))
    return <CopyOutcome>load_acquire(&shared.outcome)


cdef void _copy_pieces(void *argument) noexcept nogil:
    """Body of each thread of a copy: take pieces until none is left, or one did not end well."""
    cdef Shared *shared = <Shared *>argument
    cdef Cursor piece
    cdef CopyOutcome outcome
    while load_acquire(&shared.outcome) == COPIED and _take_piece(shared, &piece):
        outcome = _execute_from(shared.plan, shared.gate, &piece, shared.streaming)
        if outcome == COPIED and monotonic_ns() > shared.gate.deadline_ns and shared.at.left != 0:
            outcome = COPY_TIMED_OUT
        if outcome != COPIED:
            compare_exchange(&shared.outcome, COPIED, outcome)


cdef bint _take_piece(Shared *shared, Cursor *piece) noexcept nogil:
    """Take the next piece; False if nothing is left."""
    cdef bint found
    while not compare_exchange(&shared.lock, 0, 1):
        relax()
    found = shared.at.left != 0
    if found:
        piece[0] = shared.at
        piece.left = min(shared.at.left, shared.piece)
        _skip(shared.plan, &shared.at, piece.left)
    store_release(&shared.lock, 0)
    return found


cdef void _skip(const Plan *plan, Cursor *at, uint64_t nbytes) noexcept nogil:
    while nbytes != 0:
        nbytes -= _next_piece(plan, at, nbytes).nbytes


def enter_workers():
    """Let large copies of this process use threads, which stay parked between them, until `leave_workers`."""
    copy_workers_enter()


def leave_workers():
    """Take one `enter_workers` back; with the last one the threads end. No copy of the caller may be running."""
    with nogil:
        copy_workers_leave()


def _forget_threads():
    copy_workers_forget()


os.register_at_fork(after_in_child=_forget_threads)


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


def copy_runs(
    list sources not None, list targets not None, list runs not None, uint64_t deadline_ns, *, int pid=0,
    bint writing=False, uint64_t threads=1,
):
    """Copy bytes between addresses of this process, or between this process and another one.

    Parameters
    ----------
    sources, targets : list of int
        Address of each tensor; both lists have the same length. The caller vouches for the addresses.
    runs : list of (int, int, int)
        Offset in the source tensor, offset in the target tensor, bytes. Neighbouring runs are joined.
    deadline_ns : int
        End of the time allowed, on the clock of ``time.monotonic_ns``.
    pid : int
        Other process, whose memory the sources are in; 0 = none.
    writing : bool
        The targets are in the other process, and the sources in this one.
    threads : int
        Threads that the copy may use, the caller's included.

    Returns
    -------
    int
        0 when everything was copied; 1 when the deadline passed first; 3, 4, 5 when memory is not mapped, the process
        is gone, or the kernel denies the access. A part may have been copied then.
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
            if nbytes:
                used = join_run(joined, used, source, target, nbytes)
        plan.sources = addresses
        plan.targets = addresses + tensors
        plan.tensors = tensors
        plan.runs = joined
        plan.num_runs = used
        plan.carrier = IN_PROCESS if pid == 0 else WRITE_PROCESS if writing else READ_PROCESS
        plan.pid = pid
        gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=NULL)
        with nogil:
            copy_workers_enter()
            outcome = execute_shared(&plan, &gate, threads, False)
            copy_workers_leave()
        return <int>outcome
    finally:
        PyMem_Free(addresses)
        PyMem_Free(joined)
