"""Copies scattered bytes out of the memory of a peer, which takes no part in it: one transfer at a time and end."""

from libc.stdint cimport uint64_t

from llm_datadist._acl cimport ACL_SUCCESS, Scope, Stream, aclError
from llm_datadist._atomics cimport exchange, load_acquire, monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._hccl cimport (
    HCCL_DATA_TYPE_UINT8, HCCL_MOST_DESCRIPTORS, HCCL_SUCCESS, HcclOneSideOpDesc, HcclResult, hccl_functions,
    hccl_most_bytes,
)
from llm_datadist._hccl_exchange cimport Exchange, Row, next_piece
from llm_datadist._hccl_regions cimport OneSidedCommunicator
from llm_datadist._outcome cimport BAD_DIRECTORY, DONE, MEMORY_DENIED, TIMED_OUT, Outcome

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    SETTLE_NS = 100000000     # that what was aborted may still need in the network before memory is unbound

cdef uint64_t MOST_ADDRESS = <uint64_t>1 << 62  # two of them can be added

cdef class OneSidedExchange(Exchange):
    """As an exchange, over communicators that memory is bound to; the parameters are the same."""

    def adopt_bound(self, OneSidedCommunicator communicator not None, uint64_t peer_address, uint64_t peer_nbytes):
        """Take over a communicator that nobody has used yet, and make a stream for it; the turn must be held.

        Parameters
        ----------
        communicator : OneSidedCommunicator
            With the pool of this end bound to it.
        peer_address, peer_nbytes : int
            What the peer has bound, as its own process sees it.

        Raises
        ------
        AclError
            There is no stream; the communicator stays the caller's.
        ValueError
            There is no such memory.
        """
        if peer_address >= MOST_ADDRESS or peer_nbytes >= MOST_ADDRESS:
            raise ValueError(f"the peer has bound {peer_nbytes} bytes at address {peer_address}, which cannot be")
        self._stream = Stream(self.device)
        self._hccl = hccl_functions()
        self._communicator, self._batched, self.rank = communicator, False, communicator.rank
        self._peer_base, self._peer_size = peer_address, peer_nbytes
        self._failure.function = NULL

    def discard(self, uint64_t deadline_ns):
        """Give the communicator up with all that belongs to it; see `Exchange.discard`.

        Waits a moment longer if a transfer was not ended by word of whoever copied: by then what was aborted is gone
        from the network, too, and a peer has seen that its connection was closed.
        """
        cdef uint64_t settled = load_acquire(&self._doubt_ns)
        cdef uint64_t now = monotonic_ns()
        if settled != 0 and self._communicator is not None:
            settled = min(settled + SETTLE_NS, deadline_ns)
            if settled > now:
                with nogil:
                    usleep(<unsigned>((settled - now) // 1000))
            exchange(&self._doubt_ns, 0)
        Exchange.discard(self, deadline_ns)

    cdef void note_doubt(self) noexcept nogil:
        exchange(&self._doubt_ns, monotonic_ns())

    cdef bint is_reachable(self, const Row *row) noexcept nogil:
        return _lies_within(row, self._pool_base, self._pool_size)

    cdef Outcome get(self, Row *target, Row *source, int fd, const Gate *gate) noexcept nogil:
        cdef Scope scope
        cdef aclError code
        cdef Outcome outcome
        if source.left != target.left or not _lies_within(source, self._peer_base, self._peer_size):
            return BAD_DIRECTORY
        if not self.is_reachable(target):
            return MEMORY_DENIED
        if target.left == 0:
            return DONE
        code = self.device.enter(&scope)
        if code != ACL_SUCCESS:
            self.lose()
            return self._failed("aclrtSetCurrentContext", code)
        outcome = self._enqueue_all(target, source, gate)
        if outcome == DONE:
            outcome = self._wait_for(self._stream, fd, gate)
        if outcome != DONE:
            self._stop()
        self.device.leave(&scope)
        return outcome

    cdef Outcome _enqueue_all(self, Row *target, Row *source, const Gate *gate) noexcept nogil:
        """Cut both rows where either has a gap, and hand the pieces to HCCL, many in one call."""
        cdef Batch batch
        cdef Row ahead
        cdef uint64_t nbytes, local, remote
        cdef Outcome outcome
        batch.count = 0
        while target.left != 0:
            ahead = source[0]
            nbytes = next_piece(&ahead, min(ahead.left, hccl_most_bytes()), &remote)
            nbytes = next_piece(target, nbytes, &local)
            next_piece(source, nbytes, &remote)
            # Blocks that are pulled twice into one place are legal, and the last one stays there.
            if _overlaps(&batch, local, nbytes) or not _add(&batch, local, remote, nbytes):
                outcome = self._enqueue(&batch, gate)
                if outcome != DONE:
                    return outcome
                _add(&batch, local, remote, nbytes)
        return self._enqueue(&batch, gate)

    cdef Outcome _enqueue(self, Batch *batch, const Gate *gate) noexcept nogil:
        cdef HcclResult code
        if stopped(gate) or monotonic_ns() >= gate.deadline_ns:
            return TIMED_OUT
        code = self._hccl.HcclBatchGet(
            self._communicator.handle, 1 - self.rank, batch.descriptors, batch.count, self._stream.handle
        )
        batch.count = 0
        return DONE if code == HCCL_SUCCESS else self._hccl_failed("HcclBatchGet", code)

    cdef void _stop(self) noexcept nogil:
        """See to it that no byte changes any more, and ask what HCCL knows of the way to the peer."""
        cdef HcclResult known = HCCL_SUCCESS
        self.lose()
        self.note_doubt()
        if self._stream.abort() != ACL_SUCCESS:
            self.device.lost = True  # what its tasks may touch is never given back
        if self._hccl.HcclGetCommAsyncError(self._communicator.handle, &known) == HCCL_SUCCESS:
            if known != HCCL_SUCCESS:
                self._hccl_failed("the way to the peer", known)


cdef bint _lies_within(const Row *row, uint64_t base, uint64_t size) noexcept nogil:
    """Whether every byte of a row that anybody may have sent lies in a piece of memory."""
    cdef uint64_t low = MOST_ADDRESS
    cdef uint64_t high = 0
    cdef uint64_t i
    if row.left == 0:
        return True
    for i in range(row.num_ranges):
        if row.ranges[i].nbytes == 0:
            continue
        if row.ranges[i].address >= MOST_ADDRESS or row.ranges[i].nbytes >= MOST_ADDRESS:
            return False
        low = min(low, row.ranges[i].address)
        high = max(high, row.ranges[i].address + row.ranges[i].nbytes)
    for i in range(row.num_tensors):
        if row.tensors[i] >= MOST_ADDRESS or row.tensors[i] + low < base or row.tensors[i] + high > base + size:
            return False
    return True


cdef bint _overlaps(const Batch *batch, uint64_t address, uint64_t nbytes) noexcept nogil:
    """Whether a piece is written to where another one of the batch is; blocks that ascend are not compared."""
    cdef uint64_t begin, i
    if batch.count == 0 or address >= batch.high or address + nbytes <= batch.low:
        return False
    for i in range(batch.count):
        begin = <uint64_t>batch.descriptors[i].local_address
        if address < begin + batch.descriptors[i].count and begin < address + nbytes:
            return True
    return False


cdef bint _add(Batch *batch, uint64_t local, uint64_t remote, uint64_t nbytes) noexcept nogil:
    """Add a piece, to the last one if it follows that on both sides; False if the batch is full."""
    cdef HcclOneSideOpDesc *last = &batch.descriptors[batch.count - 1] if batch.count != 0 else NULL
    if (
        last != NULL
        and <uint64_t>last.local_address + last.count == local
        and <uint64_t>last.remote_address + last.count == remote
        and last.count + nbytes <= hccl_most_bytes()
    ):
        last.count += nbytes
    elif batch.count == HCCL_MOST_DESCRIPTORS:
        return False
    else:
        last = &batch.descriptors[batch.count]
        last.local_address, last.remote_address = <void *>local, <void *>remote
        last.count, last.data_type = nbytes, HCCL_DATA_TYPE_UINT8
        batch.count += 1
    batch.low = min(batch.low, local) if batch.count > 1 else min(local, <uint64_t>last.local_address)
    batch.high = max(batch.high, local + nbytes) if batch.count > 1 else local + nbytes
    return True
