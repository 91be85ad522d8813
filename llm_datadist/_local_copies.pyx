"""Copies inside one process: between slots and blocks of its caches, and between them and host memory of its caller.

A large copy is shared out over threads. Where a block that an earlier pair wrote is the source or the target of a later
one, the runs of a tensor are carried out one after the other, and threads share the tensors only.
"""

from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from llm_datadist._atomics cimport exchange, fetch_add, fetch_sub, load_acquire, monotonic_ns
from llm_datadist._copy cimport (
    COPIED, COPY_TIMED_OUT, IN_PROCESS, CopyOutcome, Gate, Plan, Run, execute_shared, join_run,
)
from llm_datadist._local cimport BlockPairs, LocalCache

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)


# Blocks, above which nobody looks whether the order of a copy shows: a byte is needed for each.
cdef uint64_t MOST_NUMBERS = 64 << 20


cdef class LocalCopier:
    """Carries out copies between memory of this process; safe to use from many threads.

    The callers have checked every slot and every offset.

    Parameters
    ----------
    threads : int
        Threads that one copy may use, the caller's included.
    """

    def __init__(self, uint64_t threads):
        self._threads = threads

    def close(self, uint64_t deadline_ns):
        """Let no copy start, end the running ones with `CLOSED`; tells whether all have ended by the deadline."""
        cdef bint idle
        exchange(&self._closing, 1)
        with nogil:
            while True:
                idle = load_acquire(&self._running) == 0
                if idle or monotonic_ns() > deadline_ns:
                    break
                usleep(20)
        return idle

    def copy_slot(
        self, LocalCache target not None, LocalCache source not None, uint64_t target_slot, uint64_t source_slot,
        uint64_t offset, uint64_t nbytes, uint64_t deadline_ns,
    ):
        """Copy bytes of one slot into one slot of a cache with as many tensors, tensor by tensor.

        Parameters
        ----------
        target, source : LocalCache
            They may be the same.
        offset, nbytes : int
            The bytes, inside of both slots.
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.
        """
        cdef Run run
        if target is source and target_slot == source_slot:
            return LocalOutcome.DONE
        run.source = source_slot * source.stride + offset
        run.target = target_slot * target.stride + offset
        run.nbytes = nbytes
        cdef uint64_t tensors = source.tensors
        cdef uint64_t *addresses = _new_addresses(tensors)
        try:
            _put_tensors(addresses, source)
            _put_tensors(addresses + tensors, target)
            return self._copy(addresses, addresses + tensors, tensors, &run, 1, False, source, target, deadline_ns)
        finally:
            PyMem_Free(addresses)

    def copy_blocks(self, LocalCache cache not None, BlockPairs pairs not None, uint64_t deadline_ns):
        """Copy blocks inside a cache, in every tensor, as if one pair were copied after the other."""
        cdef uint64_t stride = cache.stride
        cdef uint64_t tensors = cache.tensors
        cdef uint64_t used = 0
        cdef uint64_t i
        cdef uint64_t *addresses = NULL
        cdef Run *runs = NULL
        cdef bint in_order
        try:
            addresses = _new_addresses(tensors)
            runs = _new_runs(pairs.count)
            _put_tensors(addresses, cache)
            with nogil:
                in_order = _order_shows(pairs, True)
                for i in range(pairs.count):
                    used = _join_apart(runs, used, pairs._sources[i] * stride, pairs._targets[i] * stride, stride)
            return self._copy(addresses, addresses, tensors, runs, used, in_order, cache, cache, deadline_ns)
        finally:
            PyMem_Free(addresses)
            PyMem_Free(runs)

    def swap_blocks(
        self, LocalCache cache not None, list host not None, BlockPairs pairs not None, uint64_t block_nbytes,
        bint swap_in, uint64_t deadline_ns,
    ):
        """Copy blocks between a cache and host memory, in every tensor, in the order of the pairs.

        Parameters
        ----------
        cache : LocalCache
        host : list of int
            Address of each tensor in host memory. The caller vouches for the memory.
        block_nbytes : int
            Bytes of a block; block i starts at byte ``i * block_nbytes`` of a tensor, on both sides.
        swap_in : bool
            From the host into the cache, or the other way.
        """
        cdef uint64_t tensors = cache.tensors
        cdef uint64_t used = 0
        cdef uint64_t i
        cdef uint64_t *addresses = NULL
        cdef uint64_t *sources
        cdef uint64_t *targets
        cdef Run *runs = NULL
        cdef bint in_order
        try:
            addresses = _new_addresses(tensors)
            runs = _new_runs(pairs.count)
            _put_tensors(addresses, cache)
            _put_addresses(addresses + tensors, host, tensors)
            sources, targets = addresses, addresses + tensors
            if swap_in:
                sources, targets = targets, sources
            with nogil:
                in_order = _order_shows(pairs, False)
                for i in range(pairs.count):
                    used = join_run(
                        runs, used, pairs._sources[i] * block_nbytes, pairs._targets[i] * block_nbytes, block_nbytes
                    )
            return self._copy(sources, targets, tensors, runs, used, in_order, cache, cache, deadline_ns)
        finally:
            PyMem_Free(addresses)
            PyMem_Free(runs)

    def copy_range(
        self, LocalCache cache not None, uint64_t tensor, uint64_t offset, uint64_t host, uint64_t nbytes,
        bint into_cache, uint64_t deadline_ns,
    ):
        """Copy bytes between one tensor of a cache and host memory.

        Parameters
        ----------
        cache : LocalCache
        tensor, offset, nbytes : int
            Which bytes of which tensor; they exist.
        host : int
            Address in host memory. The caller vouches for the memory.
        into_cache : bool
            From the host into the cache, or the other way.
        """
        cdef Run run = Run(source=0, target=0, nbytes=nbytes)
        cdef uint64_t inside = cache.tensor_at(tensor) + offset
        if nbytes == 0:
            return LocalOutcome.DONE
        if into_cache:
            return self._copy(&host, &inside, 1, &run, 1, False, cache, cache, deadline_ns)
        return self._copy(&inside, &host, 1, &run, 1, False, cache, cache, deadline_ns)

    cdef object _copy(
        self, const uint64_t *sources, const uint64_t *targets, uint64_t tensors, const Run *runs, uint64_t num_runs,
        bint in_order, LocalCache source, LocalCache target, uint64_t deadline_ns,
    ):
        cdef Plan plan = Plan(
            sources=sources, targets=targets, tensors=tensors, runs=runs, num_runs=num_runs, carrier=IN_PROCESS, pid=0
        )
        cdef Gate gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=&self._closing)
        cdef CopyOutcome outcome
        if not source.pin():
            return self._why_released()
        if not target.pin():
            source.unpin()
            return self._why_released()
        with nogil:
            # In this order, so that either `close` sees the copy or the copy sees that it is closed.
            fetch_add(&self._running, 1)
            outcome = execute_shared(&plan, &gate, self._threads, in_order)
            fetch_sub(&self._running, 1)
        source.unpin()
        target.unpin()
        if outcome == COPIED:
            return LocalOutcome.DONE
        return LocalOutcome.TIMED_OUT if outcome == COPY_TIMED_OUT else LocalOutcome.CLOSED

    cdef object _why_released(self):
        """Tell a cache that was deallocated from one that went when everything was closed."""
        return LocalOutcome.CLOSED if load_acquire(&self._closing) != 0 else LocalOutcome.CACHE_RELEASED


cdef bint _order_shows(BlockPairs pairs, bint same_memory) noexcept nogil:
    """Tell whether a target is also another pair's target or, in the same memory, a source."""
    cdef uint64_t size = max(pairs.max_source, pairs.max_target) + 1
    cdef uint8_t *seen = <uint8_t *>calloc(size, 1) if size <= MOST_NUMBERS else NULL
    cdef bint shows = False
    cdef uint64_t i
    if seen == NULL:
        return True  # in order is always right
    if same_memory:
        for i in range(pairs.count):
            seen[pairs._sources[i]] = 1
    for i in range(pairs.count):
        if seen[pairs._targets[i]]:
            shows = True
            break
        seen[pairs._targets[i]] = 1
    free(seen)
    return shows


cdef uint64_t *_new_addresses(uint64_t tensors) except NULL:
    """Make room for the addresses of both sides."""
    cdef uint64_t *addresses = <uint64_t *>PyMem_Malloc((2 * tensors + 1) * sizeof(uint64_t))
    if addresses == NULL:
        raise MemoryError()
    return addresses


cdef Run *_new_runs(uint64_t count) except NULL:
    cdef Run *runs = <Run *>PyMem_Malloc((count + 1) * sizeof(Run))
    if runs == NULL:
        raise MemoryError()
    return runs


cdef void _put_tensors(uint64_t *out, LocalCache cache) noexcept:
    cdef uint64_t i
    for i in range(cache.tensors):
        out[i] = cache.tensor_at(i)


cdef int _put_addresses(uint64_t *out, list addresses, uint64_t tensors) except -1:
    cdef uint64_t i
    if <uint64_t>len(addresses) != tensors:
        raise ValueError(f"{len(addresses)} host addresses for {tensors} tensors")
    for i in range(tensors):
        out[i] = addresses[i]
    return 0


cdef uint64_t _join_apart(Run *runs, uint64_t used, uint64_t source, uint64_t target, uint64_t nbytes) noexcept nogil:
    """Append a run or lengthen the last one, but never into its own source: its pairs would no longer be in order."""
    cdef uint64_t distance
    if source == target:
        return used
    if used != 0:
        distance = target - source if target > source else source - target
        if distance < runs[used - 1].nbytes + nbytes:
            return used + join_run(&runs[used], 0, source, target, nbytes)
    return join_run(runs, used, source, target, nbytes)
