"""Copies inside a process whose caches lie on an Ascend device: between slots and blocks, and with memory of the host.

Calls from several threads run beside each other, each on a lane of its own, up to a limit.
"""

import logging
import threading

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint64_t

from llm_datadist._acl cimport AclFailure, Device, failure_error
from llm_datadist._ascend_lane cimport Lane
from llm_datadist._atomics cimport fetch_add, fetch_sub, monotonic_ns
from llm_datadist._copy cimport (
    COPIED, COPY_STOPPED, COPY_TIMED_OUT, IN_PROCESS, CopyOutcome, Gate, Plan, Run, stopped,
)
from llm_datadist._local cimport LocalCache
from llm_datadist._local_copies cimport LocalCopier

from llm_datadist._local_copies import LocalOutcome

_log = logging.getLogger("llm_datadist")

MOST_LANES = 4  # each may take 8 MiB of pinned memory; a device has few copy engines, so more would not be faster
_SLICE_S = 0.01  # longest wait for a lane that does not look at the gate


cdef class AscendCopier(LocalCopier):
    """Carries out copies between memory of a device and of the process; safe to use from many threads.

    Parameters
    ----------
    device : Device
        Its owner closes it; the copier must be closed before.
    threads : int
        Threads of the host that one copy may use, the caller's included.
    """

    def __init__(self, Device device not None, uint64_t threads=1):
        super().__init__(threads)
        self.device = device
        self._room = threading.Semaphore(MOST_LANES)
        self._idle = []

    def close(self, uint64_t deadline_ns):
        """Let no copy start, end the running ones with `CLOSED`; tells whether all have ended by the deadline."""
        idle = super().close(deadline_ns)
        if idle:
            lanes, self._idle = self._idle, []
            for lane in lanes:
                lane.close()
        return idle

    def read(self, uint64_t address, into, uint64_t deadline_ns):
        """Fill a buffer with what is at an address of the device.

        Parameters
        ----------
        address : int
            The caller vouches for it.
        into : buffer
            Writable and contiguous.
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        AclError
            The device cannot do it.
        """
        return self._move(into, True, address, deadline_ns)

    def write(self, uint64_t address, data, uint64_t deadline_ns):
        """Put the bytes of a contiguous buffer at an address of the device; as `read` otherwise."""
        return self._move(data, False, address, deadline_ns)

    cdef object _move(self, object buffer, bint out, unsigned long long address, unsigned long long deadline_ns):
        cdef Py_buffer view
        cdef AclFailure failure
        cdef Gate gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=&self._closing)
        cdef Run run
        cdef Plan plan
        cdef uint64_t ends[2]  # target, source
        cdef bint lost = False
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE if out else PyBUF_SIMPLE)
        ends[0], ends[1] = address, <uint64_t>view.buf
        if out:
            ends[0], ends[1] = ends[1], ends[0]
        run = Run(source=0, target=0, nbytes=<uint64_t>view.len)
        plan = Plan(
            sources=&ends[1], targets=&ends[0], tensors=1, runs=&run, num_runs=1 if view.len else 0,
            carrier=IN_PROCESS, pid=0,
        )
        fetch_add(&self._running, 1)
        try:
            return _result(self.carry(&plan, False, &gate, &failure, &lost), &failure)
        finally:
            fetch_sub(&self._running, 1)
            if not lost:
                PyBuffer_Release(&view)

    cdef object _copy(
        self, const uint64_t *sources, const uint64_t *targets, uint64_t tensors, const Run *runs, uint64_t num_runs,
        bint in_order, LocalCache source, LocalCache target, uint64_t deadline_ns,
    ):
        cdef Plan plan = Plan(
            sources=sources, targets=targets, tensors=tensors, runs=runs, num_runs=num_runs, carrier=IN_PROCESS, pid=0
        )
        cdef Gate gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=&self._closing)
        cdef AclFailure failure
        cdef bint lost = False
        if not source.pin():
            return self._why_released()
        if not target.pin():
            source.unpin()
            return self._why_released()
        # In this order, so that either `close` sees the copy or the copy sees that it is closed.
        fetch_add(&self._running, 1)
        try:
            return _result(self.carry(&plan, in_order, &gate, &failure, &lost), &failure)
        finally:
            fetch_sub(&self._running, 1)
            if not lost:
                source.unpin()
                target.unpin()

    cdef CopyOutcome carry(
        self, const Plan *plan, bint in_order, const Gate *gate, AclFailure *failure, bint *lost
    ) except *:
        cdef CopyOutcome outcome
        cdef Lane lane
        cdef bint sound = False
        lost[0] = False
        if stopped(gate):
            return COPY_STOPPED
        if plan.num_runs == 0 or plan.tensors == 0:
            return COPIED
        lane = self._take_lane(gate)
        if lane is None:
            return COPY_STOPPED if stopped(gate) else COPY_TIMED_OUT
        try:
            outcome = self._carry_on(lane, plan, in_order, gate, failure, lost)
            sound = outcome == COPIED
        finally:
            # A lane on which something went wrong is not used again: whether its stream and its events still work is
            # not known. It goes with the last reference; one that could not be aborted must not go at all.
            if lost[0]:
                Py_INCREF(lane)
                self.device.lost = True
                _log.error("a copy on device %d cannot be aborted; its memory stays taken", self.device.device_id)
            elif sound:
                self._idle.append(lane)
            self._room.release()
        return outcome

    cdef CopyOutcome _carry_on(
        self, Lane lane, const Plan *plan, bint in_order, const Gate *gate, AclFailure *failure, bint *lost
    ) except *:
        cdef CopyOutcome outcome
        cdef bint bounced = False
        cdef uint8_t *ways = <uint8_t *>PyMem_Malloc(plan.tensors)
        if ways == NULL:
            raise MemoryError()
        try:
            lane.find_ways(plan, ways, &bounced)
            if bounced:
                lane.make_buffers()
            with nogil:
                outcome = lane.carry(plan, ways, in_order, self._threads, gate, failure, lost)
        finally:
            PyMem_Free(ways)
        return outcome

    cdef Lane _take_lane(self, const Gate *gate):
        """Give a lane that nobody else uses; None if the gate ends the wait."""
        cdef uint64_t now
        while not self._room.acquire(blocking=False):
            now = monotonic_ns()
            if stopped(gate) or now >= gate.deadline_ns:
                return None
            if self._room.acquire(timeout=min(_SLICE_S, (gate.deadline_ns - now) / 1e9)):
                break
        try:
            return self._idle.pop() if self._idle else Lane(self.device)
        except BaseException:
            self._room.release()
            raise


cdef object _result(CopyOutcome outcome, AclFailure *failure):
    if outcome == COPIED:
        return LocalOutcome.DONE
    if outcome == COPY_TIMED_OUT:
        return LocalOutcome.TIMED_OUT
    if outcome == COPY_STOPPED:
        return LocalOutcome.CLOSED
    raise failure_error(failure)
