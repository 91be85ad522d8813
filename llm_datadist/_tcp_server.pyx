"""The owner's end of data connections: answers pulls and takes pushes of one linked peer, without the interpreter lock.

A server looks at the directory of its own process as a peer on the same host does, and does for its peer what that one
would do by itself: find the key, claim the cache, move the bytes, release the key. A request is believed in nothing:
sizes are bounded before memory is taken for them, and everything that it names is checked against the directory.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from llm_datadist._atomics cimport fence_full, monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._core cimport HAZARDS, DirectoryEntry, Found
from llm_datadist._outcome cimport (
    CORRUPTED, DONE, MEMORY_FAULT, PEER_DEAD, REVOKED, SOURCE_RANGE, STALE_BLOCKS,
    TARGET_READ_ONLY, Outcome,
)
from llm_datadist._pull cimport Pull
from llm_datadist._push cimport PeerTarget, Source, check_target
from llm_datadist._segment cimport Memory, Segment
from llm_datadist._stream cimport (
    STREAM_FAULT, STREAM_OK, Flow, Range, StreamEnd, discard, receive_bytes, receive_flow, send_bytes, send_flow,
    send_zeros, start_flow,
)
from llm_datadist._tcp cimport (
    BY_BLOCKS, CONSUME, MAKE_COMMUNICATOR, MAX_TABLE, PULL_BLOCKS, PULL_RANGE, PUSH_TO_ADDRESSES, PUSH_TO_KEY, SEALED,
    SUMMED, StreamReply, StreamRequest, StreamVerdict, is_verdict, sign_reply, sign_verdict, stream_magic,
    sum_of_request,
)

cdef enum:
    MOST_NS = 3600000000000   # that a request is served, whatever it says: an hour


cdef class TcpServer(PeerTarget):
    """Serves the data connections of one peer.

    Parameters
    ----------
    pool : Memory
    directory, ledger : Segment
        Of this process; stay the caller's, and open as long as a connection is served.
    claims : Segment
        Claim page of the link.
    peer_writes : bool
        Whether the peer may push.
    """

    def __init__(
        self, Memory pool not None, Segment directory not None, Segment ledger not None, Segment claims not None,
        bint peer_writes,
    ):
        super().__init__(pool, directory, ledger, claims)
        self._peer_writes = peer_writes

    def _release(self):
        """Close nothing: the segments are those of the engine."""

    def serve(self, int fd):
        """Carry out the requests of one connection until it is closed by its other end, or broken.

        Parameters
        ----------
        fd : int
            Stream socket; stays the caller's. Shutting it down ends the call.
        """
        with nogil:
            while self._serve_one(fd):
                pass

    cdef bint _serve_one(self, int fd) noexcept nogil:
        """Carry one request out; False when the connection is at its end."""
        cdef Work work
        cdef StreamRequest *request = &work.request
        cdef uint64_t timeout_ns
        cdef uint64_t *room
        cdef bint goes_on = False
        if receive_bytes(fd, request, sizeof(StreamRequest), NULL) != STREAM_OK or not _is_sane(request):
            return False
        timeout_ns = min(request.timeout_ns, <uint64_t>MOST_NS)
        work.gate = self._gate(monotonic_ns() + timeout_ns)
        room = _make_room(&work)
        if room == NULL:
            return False
        if receive_bytes(fd, room, _table_words(request) * sizeof(uint64_t), &work.gate) != STREAM_OK:
            goes_on = False
        elif request.sum != sum_of_request(request, room, _table_words(request)):
            goes_on = False  # nothing that it says can be relied on, not even where the next one begins
        else:
            _find_largest(&work)
            if request.operation == PULL_RANGE or request.operation == PULL_BLOCKS:
                goes_on = self._serve_pull(fd, &work)
            elif request.operation == MAKE_COMMUNICATOR:
                goes_on = self._serve_other(fd, &work)
            else:
                goes_on = self._serve_push(fd, &work)
        free(room)
        return goes_on

    cdef bint _serve_other(self, int fd, Work *work) noexcept nogil:
        """Carry out what is no transfer."""
        return False

    # ---- pulls

    cdef bint _serve_pull(self, int fd, Work *work) noexcept nogil:
        cdef const StreamRequest *request = &work.request
        cdef Pull pull
        cdef Outcome outcome
        memset(&pull, 0, sizeof(Pull))
        pull.kind, pull.key_id, pull.model_id, pull.slot = request.kind, request.key_id, request.model_id, request.slot
        pull.source_first, pull.source_count = request.first, <int64_t>request.count
        pull.target_count = request.tensors
        pull.consume = request.flags & CONSUME != 0
        pull.sealed = request.flags & SEALED != 0
        pull.seal = request.seal
        outcome = self._begin(&pull, work.gate.deadline_ns)
        if outcome != DONE:
            return send_reply(fd, outcome, &pull.found.entry, &work.gate)
        outcome = self._plan_pull(&pull, work)
        if outcome != DONE:
            self._end(&pull, outcome)
            return send_reply(fd, outcome, &pull.found.entry, &work.gate)
        return self._send_pull(fd, &pull, work)

    cdef Outcome _plan_pull(self, const Pull *pull, Work *work) noexcept nogil:
        """Say which ranges of which tensors are wanted."""
        cdef const StreamRequest *request = &work.request
        cdef const DirectoryEntry *entry = &pull.found.entry
        cdef uint64_t base, i
        cdef Outcome outcome
        if request.operation == PULL_RANGE:
            if request.offset > entry.stride or request.nbytes > entry.stride - request.offset:
                return SOURCE_RANGE
            work.ranges[0].address = pull.slot * entry.stride + request.offset
            work.ranges[0].nbytes = request.nbytes
            work.num_ranges = 1
        else:
            outcome = self._check_blocks(pull, request.block, work.blocks, request.blocks, work.largest, &base)
            if outcome != DONE:
                return outcome
            for i in range(request.blocks):
                _join_range(work, base + work.blocks[i] * request.block, request.block)
        return self._addresses(entry, pull.source_first, request.tensors, work.tensors)

    cdef bint _send_pull(self, int fd, Pull *pull, Work *work) noexcept nogil:
        """Send what is wanted, and release the key once the peer has it."""
        cdef StreamReply head
        cdef Flow flow
        cdef Outcome outcome = DONE
        fill_reply(&head, DONE, &pull.found.entry)
        memset(&flow, 0, sizeof(Flow))
        flow.head, flow.head_nbytes = &head, sizeof(StreamReply)
        flow.tensors, flow.num_tensors = work.tensors, work.request.tensors
        flow.ranges, flow.num_ranges = work.ranges, work.num_ranges
        flow.summed = work.request.flags & SUMMED != 0
        start_flow(&flow)
        if not _send_whole(fd, &flow, &work.gate, &outcome):
            self._end(pull, REVOKED)
            return False
        return self._finish_pull(fd, pull, work, outcome, flow.checksum)

    cdef bint _finish_pull(self, int fd, Pull *pull, Work *work, Outcome outcome, uint64_t checksum) noexcept nogil:
        """Say whether the bytes that have gone are good, and release the key once the peer has them."""
        cdef StreamVerdict verdict
        cdef bint goes_on
        # The owner revokes before it reuses memory, and breaks a seal before it writes: bytes that were read before
        # that are good.
        fence_full()
        if stopped(&work.gate):
            self._end(pull, REVOKED)
            return False
        if outcome == DONE and pull.sealed and not self._is_sealed(
            &pull.found.entry, &pull.seal, work.blocks, work.request.blocks
        ):
            outcome = STALE_BLOCKS
        verdict.outcome, verdict.checksum = <uint64_t>outcome, checksum
        verdict.confirm = outcome == DONE and self._releases(pull)
        sign_verdict(&verdict)
        goes_on = send_bytes(fd, &verdict, sizeof(StreamVerdict), &work.gate, False) == STREAM_OK
        if goes_on and verdict.confirm:
            return self._release_key(fd, pull, work)
        self._end(pull, PEER_DEAD)
        return goes_on

    cdef bint _release_key(self, int fd, Pull *pull, const Work *work) noexcept nogil:
        """Wait until the peer says that it has every byte, release the key, and say so."""
        cdef StreamVerdict verdict
        cdef bint said = receive_bytes(fd, &verdict, sizeof(StreamVerdict), &work.gate) == STREAM_OK
        if not said or not is_verdict(&verdict):
            self._end(pull, PEER_DEAD)
            return False
        self._end(pull, DONE if verdict.outcome == DONE else CORRUPTED)
        return send_bytes(fd, &verdict, sizeof(StreamVerdict), &work.gate, False) == STREAM_OK

    # ---- pushes

    cdef bint _serve_push(self, int fd, Work *work) noexcept nogil:
        cdef Found claims[HAZARDS]
        cdef uint64_t claimed = 0
        cdef uint64_t i
        cdef bint goes_on
        cdef Outcome outcome = self._enter(work.gate.deadline_ns)
        if outcome != DONE:
            return False
        claims[0].entry.tensors = claims[0].entry.slots = claims[0].entry.stride = 0
        outcome = self._plan_push(work, claims, &claimed)
        if outcome == DONE:
            goes_on = self._receive_push(fd, work, &outcome)
        else:
            goes_on = self._refuse_push(fd, work)
        for i in range(claimed):
            self._drop_hazard(claims[i].hazard)
        self._leave()
        return goes_on and send_reply(fd, outcome, &claims[0].entry, &work.gate)

    cdef Outcome _plan_push(self, Work *work, Found *claims, uint64_t *claimed) noexcept nogil:
        """Claim what the peer pushes into, and say which ranges of which tensors that is."""
        cdef const StreamRequest *request = &work.request
        cdef bint by_blocks = request.flags & BY_BLOCKS != 0
        cdef Source wanted
        cdef uint64_t base = 0
        cdef uint64_t i
        cdef Outcome outcome
        wanted.first, wanted.tensors, wanted.base, wanted.block = 0, request.tensors, 0, request.block
        if request.operation == PUSH_TO_ADDRESSES:
            for i in range(request.tensors):
                work.tensors[i] = work.addresses[i]
            outcome = self._resolve_all(
                &wanted, by_blocks, work.largest, work.tensors, claims, claimed, work.tensors + request.tensors,
                &work.gate,
            )
        else:
            outcome = self._claim_key(request.kind, request.key_id, request.model_id, &work.gate, claims)
            if outcome != DONE:
                return outcome
            claimed[0] = 1
            outcome = check_target(
                &claims[0].entry, &wanted, request.slot, request.first, by_blocks, work.largest
            )
            if outcome == DONE:
                outcome = self._addresses(&claims[0].entry, request.first, request.tensors, work.tensors)
            base = 0 if by_blocks else request.slot * claims[0].entry.stride
        if outcome != DONE:
            return outcome
        if not self._peer_writes:
            return TARGET_READ_ONLY
        if by_blocks:
            for i in range(request.blocks):
                _join_range(work, work.blocks[i] * request.block, request.block)
        else:
            _join_range(work, base, request.block)
        return DONE

    cdef bint _receive_push(self, int fd, Work *work, Outcome *outcome) noexcept nogil:
        cdef StreamVerdict verdict
        cdef Flow flow
        cdef StreamEnd end
        memset(&flow, 0, sizeof(Flow))
        flow.tensors, flow.num_tensors = work.tensors, work.request.tensors
        flow.ranges, flow.num_ranges = work.ranges, work.num_ranges
        flow.tail, flow.tail_nbytes = &verdict, sizeof(StreamVerdict)
        flow.summed = work.request.flags & SUMMED != 0
        start_flow(&flow)
        end = receive_flow(fd, &flow, &work.gate)
        if end == STREAM_FAULT:
            outcome[0] = MEMORY_FAULT
            end = discard(fd, flow.left, &work.gate)
        elif end == STREAM_OK:
            if not is_verdict(&verdict):
                return False
            outcome[0] = <Outcome>verdict.outcome if verdict.outcome == DONE else MEMORY_FAULT
            if flow.summed and outcome[0] == DONE and verdict.checksum != flow.checksum:
                outcome[0] = CORRUPTED
        # Bytes that came after the link was taken down were not wanted any more.
        return end == STREAM_OK and not stopped(&work.gate)

    cdef bint _refuse_push(self, int fd, const Work *work) noexcept nogil:
        """Take in the bytes that were sent without waiting for an answer."""
        return discard(fd, work.request.nbytes + sizeof(StreamVerdict), &work.gate) == STREAM_OK


cdef bint _is_sane(const StreamRequest *request) noexcept nogil:
    """Whether a request can be read on, and its numbers multiplied."""
    cdef uint64_t each
    if request.magic != stream_magic() or request.tensors > MAX_TABLE:
        return False
    if request.blocks > MAX_TABLE or request.block >= <uint64_t>1 << 48:
        return False
    if request.operation == PULL_RANGE or request.operation == MAKE_COMMUNICATOR:
        return request.blocks == 0
    if request.operation == PULL_BLOCKS:
        return True
    if request.operation != PUSH_TO_ADDRESSES and request.operation != PUSH_TO_KEY:
        return False
    # What is announced must be what the plan has room for: less would leave the rest of a tensor for the next request.
    each = request.blocks if request.flags & BY_BLOCKS else 1
    if not request.flags & BY_BLOCKS and request.blocks != 0:
        return False
    if each != 0 and request.tensors != 0 and request.block > (<uint64_t>1 << 62) // each // request.tensors:
        return False
    return request.nbytes == each * request.block * request.tensors


cdef uint64_t _table_words(const StreamRequest *request) noexcept nogil:
    return request.blocks + (request.tensors if request.operation == PUSH_TO_ADDRESSES else 0)


cdef uint64_t *_make_room(Work *work) noexcept nogil:
    """Make room for the words of a request and its plan; the caller frees it."""
    cdef uint64_t tensors = work.request.tensors
    cdef uint64_t blocks = work.request.blocks
    cdef uint64_t words = _table_words(&work.request)
    cdef uint64_t *room = <uint64_t *>malloc((words + 2 * tensors + 2 * (blocks + 1)) * sizeof(uint64_t))
    if room == NULL:
        return NULL
    work.addresses = room
    work.blocks = room + words - blocks
    work.tensors = room + words
    work.ranges = <Range *>(room + words + 2 * tensors)
    work.num_ranges = work.largest = 0
    return room


cdef void _find_largest(Work *work) noexcept nogil:
    cdef uint64_t i
    for i in range(work.request.blocks):
        if work.blocks[i] > work.largest:
            work.largest = work.blocks[i]


cdef void _join_range(Work *work, uint64_t address, uint64_t nbytes) noexcept nogil:
    """Add a range, to the last one if it follows that."""
    cdef Range *last = &work.ranges[work.num_ranges - 1] if work.num_ranges != 0 else NULL
    if last != NULL and last.address + last.nbytes == address:
        last.nbytes += nbytes
        return
    work.ranges[work.num_ranges].address = address
    work.ranges[work.num_ranges].nbytes = nbytes
    work.num_ranges += 1


cdef void fill_reply(StreamReply *reply, Outcome outcome, const DirectoryEntry *entry) noexcept nogil:
    reply.outcome = <uint64_t>outcome
    reply.tensors, reply.slots, reply.stride = entry.tensors, entry.slots, entry.stride
    sign_reply(reply)


cdef bint send_reply(int fd, Outcome outcome, const DirectoryEntry *entry, const Gate *gate) noexcept nogil:
    cdef StreamReply reply
    fill_reply(&reply, outcome, entry)
    return send_bytes(fd, &reply, sizeof(StreamReply), gate, False) == STREAM_OK


cdef bint _send_whole(int fd, Flow *flow, const Gate *gate, Outcome *outcome) noexcept nogil:
    """Send a flow; in place of memory that is not mapped zeros, so that the verdict is found behind them."""
    cdef StreamEnd end = send_flow(fd, flow, gate, True)
    if end == STREAM_FAULT:
        outcome[0] = MEMORY_FAULT
        end = send_zeros(fd, flow.left, gate)
    return end == STREAM_OK
