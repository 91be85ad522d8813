"""The initiator's end of data connections: pulls from, and pushes into, a peer whose memory cannot be mapped.

One request carries the whole plan to the data server of the owner, which checks and claims; the bytes then go straight
between the tensors of both sides. Each running transfer has a connection to itself. One that broke while nobody used
it is noticed with the next request, which goes to another one then: nothing was answered, so nothing was done.
"""

import logging

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from llm_datadist._atomics cimport load_acquire, monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._core cimport BLOCKS_KEY, read_token
from llm_datadist._link_end cimport MAX_CHANNELS, LinkEnd
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._outcome cimport (
    BAD_DIRECTORY, CACHE_RELEASED, CORRUPTED, DONE, MEMORY_FAULT, NO_COMMUNICATOR, NO_MEMORY, PEER_DEAD, TIMED_OUT,
    Outcome,
)
from llm_datadist._push cimport Source, check_source
from llm_datadist._stream cimport (
    STREAM_CLOSED, STREAM_FAULT, STREAM_LATE, STREAM_OK, STREAM_SPOILT, Flow, Range, StreamEnd, receive_bytes,
    receive_some, send_bytes, send_flow, send_zeros, start_flow,
)
from llm_datadist._tcp cimport (
    BY_BLOCKS, CONSUME, MAX_TABLE, PULL_BLOCKS, PULL_RANGE, PUSH_TO_ADDRESSES, PUSH_TO_KEY, SEALED, SUMMED,
    StreamReply, StreamRequest, StreamVerdict, is_reply, is_verdict, sign_verdict, stream_magic, sum_of_request,
)

from llm_datadist._outcome import TransferFault

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    DEATH_NS = 50000000       # between a data connection that closes and word that the whole link has


_log = logging.getLogger("llm_datadist.link")


cdef class TcpPeer(LinkEnd):
    """One end of a link over data connections.

    Parameters
    ----------
    summed : bool
        Whether bytes that this end asks for or sends are summed (CRC-32C) and compared.
    """

    def __init__(self, bint summed):
        self._summed = summed
        self._patience_ns = <uint64_t>-1

    def _want_channel(self):
        """See to it that there will be another connection; a transfer finds none free. Must not block."""

    def pull_cache(
        self, LocalCache target not None, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        uint64_t local_slot, uint64_t nbytes, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, uint64_t source_offset, uint64_t target_offset, bint consume, uint64_t deadline_ns,
    ):
        """Copy bytes of one remote slot into one local slot; see `PeerSource.pull_cache`."""
        cdef Transfer transfer
        cdef Outcome outcome
        cdef bint has_room = _start(&transfer, PULL_RANGE, target_count, 0, 1)
        try:
            if not has_room:
                raise MemoryError()
            _name(&transfer.request, kind, key_id, model_id, remote_slot, source_first, <uint64_t>source_count)
            if consume:
                transfer.request.flags |= CONSUME
            transfer.request.offset, transfer.request.nbytes = source_offset, nbytes
            with nogil:
                _add_range(&transfer, local_slot * target.stride + target_offset, nbytes)
                outcome = self._run(&transfer, target, target_first, deadline_ns)
            self._report(&transfer, outcome)
        finally:
            free(transfer.table)

    def pull_blocks(
        self, LocalCache target not None, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot,
        BlockPairs pairs not None, uint64_t source_first, int64_t source_count, uint64_t target_first,
        uint64_t target_count, bytes token, uint64_t deadline_ns,
    ):
        """Copy remote blocks into blocks of a local cache; see `PeerSource.pull_blocks`."""
        cdef Transfer transfer
        cdef uint64_t i
        cdef Outcome outcome
        cdef bint has_room = _start(&transfer, PULL_BLOCKS, target_count, pairs.count, pairs.count)
        try:
            if not has_room:
                raise MemoryError()
            _name(&transfer.request, kind, key_id, model_id, remote_slot, source_first, <uint64_t>source_count)
            if kind != BLOCKS_KEY:
                transfer.request.flags |= CONSUME
            if token is not None:
                read_token(token, &transfer.request.seal)
                transfer.request.flags |= SEALED
            transfer.request.block, transfer.request.blocks = target.stride, pairs.count
            with nogil:
                for i in range(pairs.count):
                    transfer.table[i] = pairs._sources[i]
                    _add_range(&transfer, pairs._targets[i] * target.stride, target.stride)
                outcome = self._run(&transfer, target, target_first, deadline_ns)
            self._report(&transfer, outcome)
        finally:
            free(transfer.table)

    def push(
        self, LocalCache source not None, uint64_t source_first, list addresses not None, uint64_t source_slot,
        BlockPairs pairs, uint64_t block_nbytes, uint64_t deadline_ns,
    ):
        """Copy slots or blocks of local tensors to addresses in the peer's process; see `PeerTarget.push`."""
        cdef Transfer transfer
        cdef uint64_t tensors = <uint64_t>len(addresses)
        cdef uint64_t blocks = pairs.count if pairs is not None else 0
        cdef uint64_t i
        cdef Outcome outcome
        cdef bint has_room = _start(&transfer, PUSH_TO_ADDRESSES, tensors, tensors + blocks, blocks + 1)
        try:
            if not has_room:
                raise MemoryError()
            for i in range(tensors):
                transfer.table[i] = addresses[i]
            with nogil:
                outcome = self._push(
                    &transfer, source, source_first, source_slot, pairs, block_nbytes, transfer.table + tensors,
                    deadline_ns,
                )
            self._report(&transfer, outcome)
        finally:
            free(transfer.table)

    def push_to_key(
        self, LocalCache source not None, uint64_t source_first, uint64_t tensors, uint64_t source_slot,
        uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t remote_slot, uint64_t target_first,
        BlockPairs pairs, uint64_t block_nbytes, uint64_t deadline_ns,
    ):
        """Copy slots or blocks of local tensors into a cache of the peer; see `PeerTarget.push_to_key`."""
        cdef Transfer transfer
        cdef uint64_t blocks = pairs.count if pairs is not None else 0
        cdef Outcome outcome
        cdef bint has_room = _start(&transfer, PUSH_TO_KEY, tensors, blocks, blocks + 1)
        try:
            if not has_room:
                raise MemoryError()
            _name(&transfer.request, kind, key_id, model_id, remote_slot, target_first, tensors)
            with nogil:
                outcome = self._push(
                    &transfer, source, source_first, source_slot, pairs, block_nbytes, transfer.table, deadline_ns
                )
            self._report(&transfer, outcome)
        finally:
            free(transfer.table)

    cdef Outcome _push(
        self, Transfer *transfer, LocalCache source, uint64_t first, uint64_t slot, BlockPairs pairs,
        uint64_t block_nbytes, uint64_t *targets, uint64_t deadline_ns,
    ) noexcept nogil:
        """Say what is pushed, and push it; the target blocks go into the table."""
        cdef StreamRequest *request = &transfer.request
        cdef Source wanted
        cdef uint64_t i
        cdef Outcome outcome
        wanted.first, wanted.tensors = first, request.tensors
        outcome = check_source(&wanted, source, slot, pairs, block_nbytes)
        if outcome != DONE:
            return outcome
        request.block = wanted.block
        if pairs is None:
            _add_range(transfer, wanted.base, wanted.block)
        else:
            request.flags |= BY_BLOCKS
            request.blocks = pairs.count
            for i in range(pairs.count):
                targets[i] = pairs._targets[i]
                _add_range(transfer, wanted.base + pairs._sources[i] * wanted.block, wanted.block)
        request.nbytes = request.tensors * wanted.block * (pairs.count if pairs is not None else 1)
        return self._run(transfer, source, first, deadline_ns)

    # ---- one transfer

    cdef Outcome _run(
        self, Transfer *transfer, LocalCache local, uint64_t first, uint64_t deadline_ns
    ) noexcept nogil:
        """Carry a transfer out whose request, table and ranges are filled."""
        cdef uint64_t i
        cdef Outcome outcome = self._enter(deadline_ns)
        if outcome != DONE:
            return outcome
        transfer.gate = self._gate(deadline_ns)
        if self._summed:
            transfer.request.flags |= SUMMED
        if local.pin():
            for i in range(transfer.request.tensors):
                transfer.tensors[i] = local.tensor_at(first + i)
            outcome = self._ask(transfer)
            local.unpin()
        else:
            outcome = CACHE_RELEASED
        self._leave()
        return outcome

    cdef Outcome _ask(self, Transfer *transfer) noexcept nogil:
        """Find a connection that works, and carry the transfer out on it."""
        cdef const Gate *gate = &transfer.gate
        cdef StreamEnd end = STREAM_CLOSED
        cdef bint answered = False
        cdef Outcome outcome
        cdef int _attempt, descriptor
        if transfer.request.blocks > MAX_TABLE or transfer.request.tensors > MAX_TABLE:
            return NO_MEMORY
        for _attempt in range(MAX_CHANNELS + 1):
            descriptor = self._find_channel(gate)
            if descriptor < 0:
                return self._why_stopped() if stopped(gate) else TIMED_OUT
            outcome = TIMED_OUT
            if transfer.request.operation == PULL_RANGE or transfer.request.operation == PULL_BLOCKS:
                end = self._pull_once(descriptor, transfer, &outcome, &answered)
            else:
                end = self._push_once(descriptor, transfer, &outcome, &answered)
            if end == STREAM_OK:
                self._keep_channel(descriptor)
                return outcome
            self._drop_channel(descriptor)
            if outcome != TIMED_OUT:
                return outcome  # every byte is here, and what broke came after that; or it is known why not
            if end != STREAM_CLOSED or answered or stopped(gate):
                break
        return self._why_broken(end, gate)

    cdef int _find_channel(self, const Gate *gate) noexcept nogil:
        cdef int i
        for i in range(MAX_CHANNELS):
            if load_acquire(&self._channels[i]) != 0:
                return self._take_channel(gate)
        if load_acquire(&self._num_channels) < MAX_CHANNELS:
            with gil:
                try:
                    self._want_channel()
                except Exception:
                    _log.exception("no further data connection")
        return self._take_channel(gate)

    cdef Outcome _why_broken(self, StreamEnd end, const Gate *gate) noexcept nogil:
        cdef uint64_t give_up = monotonic_ns() + DEATH_NS
        if end == STREAM_FAULT:
            return MEMORY_FAULT
        if end == STREAM_SPOILT:
            return CORRUPTED
        while end == STREAM_CLOSED and not stopped(gate) and monotonic_ns() < give_up:
            usleep(1000)
        if stopped(gate):
            return self._why_stopped()
        return TIMED_OUT if end == STREAM_LATE else PEER_DEAD

    cdef StreamEnd _send_request(self, int fd, Transfer *transfer, bint more) noexcept nogil:
        cdef uint64_t now = monotonic_ns()
        cdef Flow flow
        transfer.request.timeout_ns = transfer.gate.deadline_ns - now if transfer.gate.deadline_ns > now else 0
        memset(&flow, 0, sizeof(Flow))
        transfer.request.sum = sum_of_request(&transfer.request, transfer.table, transfer.table_words)
        flow.head, flow.head_nbytes = &transfer.request, sizeof(StreamRequest)
        flow.tail, flow.tail_nbytes = transfer.table, transfer.table_words * sizeof(uint64_t)
        start_flow(&flow)
        return send_flow(fd, &flow, &transfer.gate, more)

    cdef StreamEnd _pull_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        cdef StreamVerdict verdict
        cdef Flow flow
        cdef StreamEnd end = self._send_request(fd, transfer, False)
        cdef bint checked = False
        if end != STREAM_OK:
            return end
        _start_local(&flow, transfer)
        flow.head, flow.head_nbytes = &transfer.reply, sizeof(StreamReply)
        flow.tail, flow.tail_nbytes = &verdict, sizeof(StreamVerdict)
        start_flow(&flow)
        while flow.left != 0:
            end = receive_some(fd, &flow, &transfer.gate)
            if end != STREAM_OK:
                return end
            answered[0] = True
            if not checked and flow.head_done == sizeof(StreamReply):
                checked = True
                if not is_reply(&transfer.reply):
                    return STREAM_SPOILT
                if transfer.reply.outcome != DONE:
                    outcome[0] = known_outcome(transfer.reply.outcome)
                    return STREAM_OK  # nothing follows
        if not is_verdict(&verdict):
            return STREAM_SPOILT
        outcome[0] = known_outcome(verdict.outcome)
        if self._summed and outcome[0] == DONE and verdict.checksum != flow.checksum:
            outcome[0] = CORRUPTED
        return self._confirm(fd, &verdict, outcome[0], &transfer.gate) if verdict.confirm else STREAM_OK

    cdef StreamEnd _confirm(
        self, int fd, StreamVerdict *verdict, Outcome outcome, const Gate *gate
    ) noexcept nogil:
        """Tell the owner whether every byte is here, and hear that the key has been released."""
        cdef StreamEnd end
        verdict.outcome = <uint64_t>outcome
        sign_verdict(verdict)
        end = send_bytes(fd, verdict, sizeof(StreamVerdict), gate, False)
        return receive_bytes(fd, verdict, sizeof(StreamVerdict), gate) if end == STREAM_OK else end

    cdef StreamEnd _push_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        cdef StreamVerdict verdict
        cdef Flow flow
        cdef StreamEnd end = self._send_request(fd, transfer, True)
        if end != STREAM_OK:
            return end
        verdict.outcome, verdict.confirm = DONE, 0
        _start_local(&flow, transfer)
        start_flow(&flow)
        end = send_flow(fd, &flow, &transfer.gate, True)
        if end == STREAM_FAULT:
            verdict.outcome = MEMORY_FAULT
            end = send_zeros(fd, flow.left, &transfer.gate)
        verdict.checksum = flow.checksum
        sign_verdict(&verdict)
        if end == STREAM_OK:
            end = send_bytes(fd, &verdict, sizeof(StreamVerdict), &transfer.gate, False)
        if end == STREAM_OK:
            end = receive_bytes(fd, &transfer.reply, sizeof(StreamReply), &transfer.gate)
        if end != STREAM_OK:
            return end
        answered[0] = True
        if not is_reply(&transfer.reply):
            return STREAM_SPOILT
        outcome[0] = known_outcome(transfer.reply.outcome)
        return STREAM_OK

    cdef int _report(self, const Transfer *transfer, Outcome outcome) except -1:
        if outcome != DONE:
            raise TransferFault(<int>outcome, transfer.reply.tensors, transfer.reply.slots, transfer.reply.stride)
        return 0


cdef bint _start(
    Transfer *transfer, uint64_t operation, uint64_t tensors, uint64_t table_words, uint64_t ranges
) noexcept nogil:
    """Begin with the description of a transfer; False if there is no memory. The caller frees the table."""
    memset(transfer, 0, sizeof(Transfer))
    transfer.table = <uint64_t *>malloc((table_words + tensors + 2 * ranges + 1) * sizeof(uint64_t))
    if transfer.table == NULL:
        return False
    transfer.table_words = table_words
    transfer.tensors = transfer.table + table_words
    transfer.ranges = <Range *>(transfer.tensors + tensors)
    transfer.request.magic = stream_magic()
    transfer.request.operation = operation
    transfer.request.tensors = tensors
    return True


cdef void _name(
    StreamRequest *request, uint64_t kind, uint64_t key_id, uint64_t model_id, uint64_t slot, uint64_t first,
    uint64_t count,
) noexcept nogil:
    """Say which tensors of which cache of the owner are meant."""
    request.kind, request.key_id, request.model_id, request.slot = kind, key_id, model_id, slot
    request.first, request.count = first, count


cdef void _add_range(Transfer *transfer, uint64_t address, uint64_t nbytes) noexcept nogil:
    """Add a range of the local tensors, to the last one if it follows that."""
    cdef Range *last = &transfer.ranges[transfer.num_ranges - 1] if transfer.num_ranges != 0 else NULL
    if last != NULL and last.address + last.nbytes == address:
        last.nbytes += nbytes
        return
    transfer.ranges[transfer.num_ranges].address = address
    transfer.ranges[transfer.num_ranges].nbytes = nbytes
    transfer.num_ranges += 1


cdef void _start_local(Flow *flow, Transfer *transfer) noexcept nogil:
    memset(flow, 0, sizeof(Flow))
    flow.tensors, flow.num_tensors = transfer.tensors, transfer.request.tensors
    flow.ranges, flow.num_ranges = transfer.ranges, transfer.num_ranges
    flow.summed = transfer.request.flags & SUMMED != 0


cdef Outcome known_outcome(uint64_t outcome) noexcept nogil:
    """Give an outcome that a peer has sent; what it does not mean is the peer's mistake."""
    return <Outcome>outcome if outcome <= NO_COMMUNICATOR else BAD_DIRECTORY
