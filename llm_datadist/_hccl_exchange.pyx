"""Moves scattered bytes between two devices over a communicator: one transfer at a time, the same steps at both ends.

Sending, with two streams. The copy stream gathers a step into one half of the staging buffer while that of the
communicator sends the other half; events keep either from overtaking. Receiving is the same backwards. Steps that lie
in one piece on the device touch neither buffer nor copy stream. Memory of the host, and pieces that the device cannot
copy by itself, are copied by the caller's thread in between.

Nothing in here waits without a limit. After a failure or a deadline nobody knows how far the peer has come: both
streams are aborted, so that no byte of the caller's memory changes any more, and the communicator is lost.
"""

import time

from libc.stdint cimport uint64_t
from libc.string cimport memset

from llm_datadist._acl cimport (
    ACL_COPY_ALIGNMENT, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT,
    ACL_ERROR_RT_WAIT_TIMEOUT, ACL_MEMCPY_DEVICE_TO_DEVICE,
    ACL_MEMCPY_DEVICE_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE, ACL_SLICE_MS, ACL_SUCCESS, Device, DeviceMemory, Event,
    Scope, Stream, aclError, failure_error, is_device_memory, note_failure,
)
from llm_datadist._atomics cimport compare_exchange, exchange, load_acquire, monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._hccl cimport (
    HCCL_DATA_TYPE_UINT8, HCCL_RECV, HCCL_SEND, HCCL_SUCCESS, Communicator, HcclResult, HcclSendRecvItem,
    hccl_failure_error, hccl_functions, note_hccl_failure,
)
from llm_datadist._outcome cimport DEVICE_FAILED, DONE, NO_COMMUNICATOR, TIMED_OUT, Outcome
from llm_datadist._segment cimport Memory
from llm_datadist._stream cimport Range

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void *buffer, size_t nbytes, int flags)
    int MSG_PEEK, MSG_DONTWAIT

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    WARM_UP_BYTES = 64


cdef class Half:
    """One half of the staging buffer."""

    def __init__(self, Device device not None, uint64_t offset):
        self.offset = offset
        self.filled = Event(device)
        try:
            self.emptied = Event(device)
        except BaseException:
            self.filled.close()
            raise

    def close(self):
        self.filled.close()
        self.emptied.close()


cdef class Exchange:
    """One communicator after the other between this process and one peer, and what a transfer over it needs.

    It begins without one: `adopt` gives it one, and again after a failure.

    Parameters
    ----------
    device : Device
        Of this process.
    pool : Memory
        Of the caches on it.
    """

    def __init__(self, Device device not None, Memory pool not None):
        self.device = device
        self._pool_base, self._pool_size = pool.base, pool.size
        self._failure.function = NULL

    # ---- the communicator

    @property
    def ready(self) -> bool:
        """Whether transfers can run."""
        return self.is_ready()

    @property
    def failure(self):
        """What went wrong last, as an exception; None if nothing did."""
        if self._failure.function == NULL:
            return None
        if self._failure.code == ACL_SUCCESS:
            return ConnectionError("the peer has given the transfer up, its log says why")
        return hccl_failure_error(&self._failure) if self._of_hccl else failure_error(&self._failure)

    def adopt(self, Communicator communicator not None, bint batched):
        """Take over a communicator that nobody has used yet, and make streams for it; the turn must be held.

        Parameters
        ----------
        communicator : Communicator
            Of two ranks.
        batched : bool
            Whether both ends post the operations of a step in one call.

        Raises
        ------
        AclError
            There is no stream, no event, or no device memory for the staging buffer, which stays for the communicators
            that follow: a transfer must not wait for the interpreter to get it. The communicator stays the caller's.
        """
        owned = []
        try:
            if self._staging is None:
                self._staging = DeviceMemory(self.device, 2 * STEP_BYTES)
            owned.append(Stream(self.device))
            owned.append(Stream(self.device))
            owned.append(Half(self.device, 0))
            owned.append(Half(self.device, STEP_BYTES))
        except BaseException:
            for each in owned:
                each.close()
            raise
        self._stream, self._copies, self._even, self._odd = owned
        self._hccl = hccl_functions()
        self._communicator, self._batched, self.rank = communicator, batched, communicator.rank
        self._failure.function = NULL

    def open(self):
        """Let transfers run: the communicator is warm."""
        exchange(&self._ready, 1)

    def warm_up(self, uint64_t deadline_ns):
        """Meet the peer, which does the same: the first operation of each direction waits for it inside the call.

        Raises
        ------
        AclError, HcclError
            The two have not met.
        TimeoutError
            Not by the deadline (clock of ``time.monotonic_ns``).
        """
        cdef Gate gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=NULL)
        cdef Scope scope
        cdef Outcome outcome
        cdef Step step
        cdef int operation
        if self.device.enter(&scope) != ACL_SUCCESS:
            raise RuntimeError("the device is closed")
        outcome = DONE
        with nogil:
            step.num_items, step.nbytes, step.staged = 1, WARM_UP_BYTES, False
            step.items[0].offset, step.items[0].nbytes = 0, WARM_UP_BYTES
            step.items[0].address = self._staging.base  # nothing is in it yet
            for operation in range(2):
                if outcome == DONE:
                    outcome = self._post(&step, 0, operation == self.rank)
                if outcome == DONE:
                    outcome = self._wait(-1, &gate)
            if outcome != DONE:
                self._abort()
            self.device.leave(&scope)
        if outcome == TIMED_OUT:
            raise TimeoutError("the peer's device has not answered in time")
        if outcome != DONE:
            raise self.failure

    def begin_change(self, uint64_t deadline_ns):
        """Wait until no transfer runs, and let none begin; False if one still does at the deadline."""
        cdef Gate gate = Gate(deadline_ns=deadline_ns, peer_dead=NULL, revoked=NULL, closing=NULL)
        cdef bint taken
        with nogil:
            taken = self.take_turn(&gate)
        return taken

    def end_change(self):
        """Let transfers begin again."""
        self.give_turn()

    def discard(self, uint64_t deadline_ns):
        """Give the communicator up with all that belongs to it; the turn must be held. May be called twice.

        Waits for HCCL until the deadline (clock of ``time.monotonic_ns``) at the most.
        """
        exchange(&self._ready, 0)
        communicator, self._communicator = self._communicator, None
        owned = (self._stream, self._copies, self._even, self._odd)
        self._stream = self._copies = self._even = self._odd = None
        if communicator is not None:
            communicator.destroy(deadline_ns)
        for each in owned:
            if each is not None:
                each.close()

    def close(self):
        """Give up the staging buffer too."""
        self.discard(time.monotonic_ns() + 1_000_000_000)
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    cdef bint is_ready(self) noexcept nogil:
        return load_acquire(&self._ready) != 0

    cdef void lose(self) noexcept nogil:
        """Let no transfer run until there is another communicator."""
        exchange(&self._ready, 0)

    # ---- whose turn it is

    # There is one order of operations for both ends. Rank 0 grants: it takes its own turn before it asks for a
    # transfer, and before it answers one that is asked for. Rank 1 takes its own after it was answered, or before it
    # answers. So the turn of rank 0 always comes first, and no two can wait for each other.

    cdef bint take_turn(self, const Gate *gate) noexcept nogil:
        while not compare_exchange(&self._turn, 0, 1):
            if stopped(gate) or monotonic_ns() > gate.deadline_ns:
                return False
            usleep(20)
        return True

    cdef void give_turn(self) noexcept nogil:
        exchange(&self._turn, 0)

    # ---- a transfer

    cdef Outcome move(self, Row *row, bint sending, int fd, const Gate *gate) noexcept nogil:
        """Send or receive every byte; the turn must be held, and the peer does the opposite.

        `fd` is the connection to the peer, which it closes if it cannot go on. Unless the outcome is DONE the
        communicator is lost, and no byte of this side changes any more. NO_COMMUNICATOR: it was lost already while the
        caller waited for its turn.
        """
        cdef Scope scope
        cdef aclError code
        cdef Outcome outcome
        if row.left == 0:
            return DONE
        if not self.is_ready():
            return NO_COMMUNICATOR
        code = self.device.enter(&scope)
        if code != ACL_SUCCESS:
            self.lose()
            return self._failed("aclrtSetCurrentContext", code)
        outcome = self._post_all(row, sending, gate)
        if outcome == DONE:
            outcome = self._wait(fd, gate)
        if outcome != DONE:
            self.lose()
            self._abort()
        self.device.leave(&scope)
        return outcome

    cdef void _abort(self) noexcept nogil:
        """Let no task touch memory any more; if that fails, no memory of the device is given back."""
        if self._stream.abort() != ACL_SUCCESS:
            self.device.lost = True
        if self._copies.abort() != ACL_SUCCESS:
            self.device.lost = True

    cdef Outcome _post_all(self, Row *row, bint sending, const Gate *gate) noexcept nogil:
        cdef Step step
        cdef Row ahead
        cdef bint odd = False
        cdef Outcome outcome = DONE
        self._even.used = self._odd.used = False
        while row.left != 0 and outcome == DONE:
            ahead = row[0]
            self._plan_step(&ahead, &step)
            if not step.staged:
                outcome = self._post(&step, 0, sending)
            elif odd:
                outcome = self._staged_step(row, &step, self._odd, sending, gate)
            else:
                outcome = self._staged_step(row, &step, self._even, sending, gate)
            odd = odd != step.staged
            row[0] = ahead
        return outcome

    cdef Outcome _staged_step(
        self, Row *row, const Step *step, Half half, bint sending, const Gate *gate
    ) noexcept nogil:
        cdef Outcome outcome
        if sending:
            outcome = self._send_step(row, step, half, gate)
        else:
            outcome = self._receive_step(row, step, half, gate)
        half.used = True
        return outcome

    cdef Outcome _send_step(self, Row *row, const Step *step, Half half, const Gate *gate) noexcept nogil:
        cdef aclError code = half.emptied.make_wait(self._copies) if half.used else ACL_SUCCESS
        cdef Outcome outcome
        if code != ACL_SUCCESS:
            return self._failed("aclrtStreamWaitEvent", code)
        outcome = self._copy_step(row, step, half, half.emptied, True, gate)
        if outcome == DONE:
            outcome = self._hand_over(half.filled, self._copies, self._stream)
        if outcome == DONE:
            outcome = self._post(step, half.offset, True)
        if outcome == DONE:
            code = half.emptied.record(self._stream)
            if code != ACL_SUCCESS:
                return self._failed("aclrtRecordEvent", code)
        return outcome

    cdef Outcome _receive_step(self, Row *row, const Step *step, Half half, const Gate *gate) noexcept nogil:
        cdef aclError code = half.emptied.make_wait(self._stream) if half.used else ACL_SUCCESS
        cdef Outcome outcome
        if code != ACL_SUCCESS:
            return self._failed("aclrtStreamWaitEvent", code)
        outcome = self._post(step, half.offset, False)
        if outcome == DONE:
            outcome = self._hand_over(half.filled, self._stream, self._copies)
        half.used = True  # a copy by this thread has to wait for the bytes
        if outcome == DONE:
            outcome = self._copy_step(row, step, half, half.filled, False, gate)
        if outcome == DONE:
            code = half.emptied.record(self._copies)
            if code != ACL_SUCCESS:
                return self._failed("aclrtRecordEvent", code)
        return outcome

    cdef Outcome _hand_over(self, Event event, Stream done, Stream goes_on) noexcept nogil:
        """Let a stream go on only when another one has come to where it is now."""
        cdef aclError code = event.record(done)
        if code != ACL_SUCCESS:
            return self._failed("aclrtRecordEvent", code)
        code = event.make_wait(goes_on)
        return DONE if code == ACL_SUCCESS else self._failed("aclrtStreamWaitEvent", code)

    cdef Outcome _post(self, const Step *step, uint64_t offset, bint sending) noexcept nogil:
        """Hand the operations of a step to HCCL; `offset` is that of the half which its staged items go through."""
        cdef HcclSendRecvItem items[MAX_ITEMS]
        cdef uint64_t staging = self._staging.base + offset
        cdef HcclResult code = HCCL_SUCCESS
        cdef uint64_t i, address
        for i in range(step.num_items):
            address = step.items[i].address
            items[i].type = HCCL_SEND if sending else HCCL_RECV
            items[i].buffer = <void *>(address if address != 0 else staging + step.items[i].offset)
            items[i].count = step.items[i].nbytes
            items[i].data_type = HCCL_DATA_TYPE_UINT8
            items[i].remote_rank = 1 - self.rank
        if self._batched:
            code = self._hccl.HcclBatchSendRecv(
                items, <unsigned>step.num_items, self._communicator.handle, self._stream.handle
            )
            if code != HCCL_SUCCESS:
                return self._hccl_failed("HcclBatchSendRecv", code)
            return DONE
        for i in range(step.num_items):
            if sending:
                code = self._hccl.HcclSend(
                    items[i].buffer, items[i].count, HCCL_DATA_TYPE_UINT8, 1 - self.rank, self._communicator.handle,
                    self._stream.handle,
                )
            else:
                code = self._hccl.HcclRecv(
                    items[i].buffer, items[i].count, HCCL_DATA_TYPE_UINT8, 1 - self.rank, self._communicator.handle,
                    self._stream.handle,
                )
            if code != HCCL_SUCCESS:
                return self._hccl_failed("HcclSend" if sending else "HcclRecv", code)
        return DONE

    # ---- the staging buffer

    cdef Outcome _copy_step(
        self, Row *row, const Step *step, Half half, Event event, bint sending, const Gate *gate
    ) noexcept nogil:
        """Copy the items that lie in pieces into a half of the staging buffer, or out of it.

        The copy stream waits for the event by itself, if the half was used before; copies by this thread do it here.
        """
        cdef bint must_wait = half.used
        cdef uint64_t staged, left, nbytes, address, i
        cdef Row walk = row[0]
        cdef Outcome outcome
        for i in range(step.num_items):
            staged = self._staging.base + half.offset + step.items[i].offset
            left = step.items[i].nbytes
            while left != 0:
                nbytes = next_piece(&walk, left, &address)
                if step.items[i].address == 0:
                    outcome = self._copy_piece(address, staged, nbytes, sending, event, &must_wait, gate)
                    if outcome != DONE:
                        return outcome
                staged += nbytes
                left -= nbytes
        return DONE

    cdef Outcome _copy_piece(
        self, uint64_t address, uint64_t staged, uint64_t nbytes, bint sending, Event event, bint *must_wait,
        const Gate *gate,
    ) noexcept nogil:
        cdef bint on_device = self._is_on_device(address)
        cdef void *source = <void *>(address if sending else staged)
        cdef void *target = <void *>(staged if sending else address)
        cdef int kind = ACL_MEMCPY_DEVICE_TO_DEVICE
        cdef aclError code
        if on_device and (address | staged) % ACL_COPY_ALIGNMENT == 0:
            code = self.device.acl.aclrtMemcpyAsync(target, nbytes, source, nbytes, kind, self._copies.handle)
            return DONE if code == ACL_SUCCESS else self._failed("aclrtMemcpyAsync", code)
        if must_wait[0]:
            code = event.wait(gate)
            if code == ACL_ERROR_RT_EVENT_SYNC_TIMEOUT:
                return TIMED_OUT
            if code != ACL_SUCCESS:
                return self._failed("aclrtSynchronizeEventWithTimeout", code)
            must_wait[0] = False
        if not on_device:
            kind = ACL_MEMCPY_HOST_TO_DEVICE if sending else ACL_MEMCPY_DEVICE_TO_HOST
        code = self.device.acl.aclrtMemcpy(target, nbytes, source, nbytes, kind)
        return DONE if code == ACL_SUCCESS else self._failed("aclrtMemcpy", code)

    # ---- waiting

    cdef Outcome _wait(self, int fd, const Gate *gate) noexcept nogil:
        """Wait until both streams have done everything."""
        cdef Outcome outcome = self._wait_for(self._stream, fd, gate)
        return self._wait_for(self._copies, fd, gate) if outcome == DONE else outcome

    cdef Outcome _wait_for(self, Stream stream, int fd, const Gate *gate) noexcept nogil:
        cdef Gate slice = gate[0]
        cdef aclError code
        cdef char byte
        while True:
            slice.deadline_ns = min(gate.deadline_ns, monotonic_ns() + ACL_SLICE_MS * 1000000)
            code = stream.wait(&slice)
            if code == ACL_SUCCESS:
                return DONE
            if code != ACL_ERROR_RT_STREAM_SYNC_TIMEOUT:
                return self._failed("aclrtSynchronizeStreamWithTimeout", code)
            if stopped(gate) or monotonic_ns() >= gate.deadline_ns:
                return TIMED_OUT
            if fd >= 0 and recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0:
                return self._failed("the peer", ACL_SUCCESS)

    cdef Outcome _failed(self, const char *function, int code) noexcept nogil:
        self._of_hccl = False
        note_failure(&self._failure, function, code)
        # HCCL has given up earlier than this transfer: the peer has not posted its part.
        return TIMED_OUT if code == ACL_ERROR_RT_WAIT_TIMEOUT else DEVICE_FAILED

    cdef Outcome _hccl_failed(self, const char *function, int code) noexcept nogil:
        self._of_hccl = True
        note_hccl_failure(&self._failure, function, code)
        return DEVICE_FAILED

    # ---- how a row is cut

    cdef void _plan_step(self, Row *row, Step *step) noexcept nogil:
        """Cut the next step off a row, and say where its items lie."""
        cdef uint64_t nbytes
        step.num_items, step.nbytes, step.staged = 0, 0, False
        while row.left != 0 and step.nbytes < STEP_BYTES:
            nbytes = min(row.left, STEP_BYTES - step.nbytes)
            if row.unit >= DIRECT_FROM:
                nbytes = min(nbytes, row.to_unit)
            step.items[step.num_items].offset = step.nbytes
            step.items[step.num_items].nbytes = nbytes
            self._plan_item(row, &step.items[step.num_items])
            step.staged = step.staged or step.items[step.num_items].address == 0
            step.nbytes += nbytes
            step.num_items += 1

    cdef void _plan_item(self, Row *row, Item *item) noexcept nogil:
        cdef uint64_t left = item.nbytes
        cdef uint64_t nbytes, address, expected
        cdef bint direct = True
        item.address = expected = 0
        while left != 0:
            nbytes = next_piece(row, left, &address)
            if left == item.nbytes:
                item.address = expected = address
            direct = direct and address == expected and self._is_on_device(address)
            expected = address + nbytes
            left -= nbytes
        if not direct:
            item.address = 0

    cdef bint _is_on_device(self, uint64_t address) noexcept nogil:
        return address - self._pool_base < self._pool_size or is_device_memory(address)


cdef void start_row(
    Row *row, const uint64_t *tensors, uint64_t num_tensors, const Range *ranges, uint64_t num_ranges, uint64_t unit
) noexcept nogil:
    """Begin with the first byte.

    `unit` is what both ends know of how the bytes are divided: a block, or what is moved of each tensor.
    """
    cdef uint64_t of_tensor = 0
    cdef uint64_t i
    memset(row, 0, sizeof(Row))
    for i in range(num_ranges):
        of_tensor += ranges[i].nbytes
    row.tensors, row.num_tensors = tensors, num_tensors
    row.ranges, row.num_ranges = ranges, num_ranges
    row.unit = row.to_unit = unit
    row.left = num_tensors * of_tensor


cdef uint64_t next_piece(Row *row, uint64_t most, uint64_t *address) noexcept nogil:
    cdef const Range *at
    cdef uint64_t nbytes
    while row.ranges[row.range].nbytes == row.range_done:
        row.range_done = 0
        row.range += 1
        if row.range == row.num_ranges:
            row.range = 0
            row.tensor += 1
    at = &row.ranges[row.range]
    nbytes = min(most, at.nbytes - row.range_done)
    address[0] = row.tensors[row.tensor] + at.address + row.range_done
    row.range_done += nbytes
    row.left -= nbytes
    row.to_unit = row.to_unit - nbytes % row.unit if nbytes % row.unit < row.to_unit else (
        row.to_unit + row.unit - nbytes % row.unit
    )
    return nbytes
