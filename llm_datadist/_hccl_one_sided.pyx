"""The two ends of a link over HCCL whose bytes are copied by one end alone, the one that they are meant for.

That end gets a description of where the bytes are; the memory itself it reaches over the communicator. What goes over
the data connection is:

    pull   initiator: StreamRequest, source blocks
           owner:     StreamReply; unless its outcome is DONE, nothing follows. RowHead, where the bytes are
           initiator copies
           initiator: StreamVerdict
           owner:     StreamVerdict; with `confirm` in it the two that follow over tcp
    push   initiator: StreamRequest, addresses, target blocks; RowHead, where the bytes are
           owner copies
           owner:     StreamReply

The owner of a pull keeps its claim until it has heard the verdict, and looks at seals and revocation after that. An end
that cannot go on closes the connection, which the one that copies sees while it waits for its stream.
"""

import logging

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from llm_datadist._copy cimport Gate, stopped
from llm_datadist._hccl_end cimport HcclPeer, HcclServer
from llm_datadist._hccl_exchange cimport Row, start_row
from llm_datadist._hccl_gets cimport OneSidedExchange
from llm_datadist._outcome cimport (
    DEVICE_FAILED, DONE, MEMORY_DENIED, NO_COMMUNICATOR, REVOKED, TIMED_OUT, Outcome,
)
from llm_datadist._pull cimport Pull
from llm_datadist._segment cimport Memory, Segment
from llm_datadist._stream cimport (
    STREAM_LATE, STREAM_OK, STREAM_SPOILT, Range, StreamEnd, receive_bytes, send_bytes, sum_bytes,
)
from llm_datadist._tcp cimport MAX_TABLE, StreamVerdict, is_verdict, sign_verdict
from llm_datadist._tcp_end cimport Transfer
from llm_datadist._tcp_server cimport Work, send_reply

_log = logging.getLogger("llm_datadist.link")


cdef class OneSidedPeer(HcclPeer):
    """The initiator's end; the parameters are those of `HcclPeer`."""

    cdef OneSidedExchange _gets           # the same as `exchange`

    def __init__(self, OneSidedExchange exchange not None):
        super().__init__(exchange)
        self._gets = exchange

    cdef StreamEnd _pull_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        cdef const Gate *gate = &transfer.gate
        cdef RowLetter source
        cdef StreamVerdict verdict
        cdef StreamEnd end = self._request(fd, transfer, outcome, answered)
        if end != STREAM_OK or outcome[0] != DONE:
            return end
        outcome[0] = TIMED_OUT
        end = _receive_row(fd, transfer.request.tensors, &source, gate)
        if end != STREAM_OK:
            return end
        outcome[0] = self._get(fd, transfer, &source)
        free(source.words)
        if outcome[0] != DONE:
            return STREAM_LATE  # the owner sees that the connection is closed
        outcome[0] = TIMED_OUT  # until the owner has said that the bytes are good
        memset(&verdict, 0, sizeof(StreamVerdict))
        verdict.outcome = DONE
        sign_verdict(&verdict)
        end = send_bytes(fd, &verdict, sizeof(StreamVerdict), gate, False)
        return self._hear_verdict(fd, outcome, gate) if end == STREAM_OK else end

    cdef StreamEnd _push_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        cdef const Gate *gate = &transfer.gate
        cdef StreamEnd end = self._send_request(fd, transfer, True)
        if end == STREAM_OK:
            end = _send_row(
                fd, transfer.tensors, transfer.request.tensors, transfer.ranges, transfer.num_ranges, gate
            )
        if end == STREAM_OK:
            end = self._hear_reply(fd, transfer, outcome)
        if end == STREAM_OK:
            answered[0] = True
        else:
            self._gets.note_doubt()  # the owner may be reading until it sees the connection close
        return end

    cdef Outcome _get(self, int fd, Transfer *transfer, const RowLetter *source) noexcept nogil:
        cdef const Gate *gate = &transfer.gate
        cdef Outcome outcome = _get_row(
            self._gets, transfer.tensors, transfer.request.tensors, transfer.ranges,
            transfer.num_ranges, source, fd, gate,
        )
        if outcome == DEVICE_FAILED:
            return self._why_lost(outcome, gate)
        return self._why_stopped() if outcome == TIMED_OUT and stopped(gate) else outcome

    cdef int _report(self, const Transfer *transfer, Outcome outcome) except -1:
        failure = self.exchange.failure if outcome != DONE else None
        if failure is not None:
            _log.warning("a transfer has failed: %s", failure)
        return HcclPeer._report(self, transfer, outcome)


cdef class OneSidedServer(HcclServer):
    """The owner's end; the parameters are those of `HcclServer`."""

    cdef OneSidedExchange _gets           # the same as `exchange`

    def __init__(
        self, Memory pool not None, Segment directory not None, Segment ledger not None, Segment claims not None,
        bint peer_writes, OneSidedExchange exchange not None,
    ):
        super().__init__(pool, directory, ledger, claims, peer_writes, exchange)
        self._gets = exchange

    cdef bint _send_pull(self, int fd, Pull *pull, Work *work) noexcept nogil:
        cdef StreamVerdict verdict
        cdef Row row
        cdef bint goes_on
        cdef Outcome outcome = DONE
        start_row(&row, work.tensors, work.request.tensors, work.ranges, work.num_ranges, 1)
        if not self._gets.is_ready():
            outcome = NO_COMMUNICATOR
        elif not self._gets.is_reachable(&row):
            outcome = MEMORY_DENIED
        if outcome != DONE:
            self._end(pull, outcome)
            return send_reply(fd, outcome, &pull.found.entry, &work.gate)
        goes_on = send_reply(fd, DONE, &pull.found.entry, &work.gate)
        goes_on = goes_on and _send_row(
            fd, work.tensors, work.request.tensors, work.ranges, work.num_ranges, &work.gate
        ) == STREAM_OK
        goes_on = goes_on and receive_bytes(fd, &verdict, sizeof(StreamVerdict), &work.gate) == STREAM_OK
        if not goes_on or not is_verdict(&verdict) or verdict.outcome != DONE:
            self._gets.note_doubt()
            self._end(pull, REVOKED)
            return False
        return self._finish_pull(fd, pull, work, DONE, 0)

    cdef bint _receive_push(self, int fd, Work *work, Outcome *outcome) noexcept nogil:
        cdef RowLetter source
        if _receive_row(fd, work.request.tensors, &source, &work.gate) != STREAM_OK:
            return False
        outcome[0] = _get_row(
            self._gets, work.tensors, work.request.tensors, work.ranges, work.num_ranges, &source,
            fd, &work.gate,
        )
        free(source.words)
        if outcome[0] == DEVICE_FAILED and not stopped(&work.gate):
            self._tell_failure()
        # Bytes that came after the link was taken down were not wanted any more.
        return not stopped(&work.gate)

    cdef bint _refuse_push(self, int fd, const Work *work) noexcept nogil:
        """Take in what was sent without waiting for an answer."""
        cdef RowLetter source
        if _receive_row(fd, work.request.tensors, &source, &work.gate) != STREAM_OK:
            return False
        free(source.words)
        return True


cdef Outcome _get_row(
    OneSidedExchange exchange, const uint64_t *tensors, uint64_t num_tensors, const Range *ranges, uint64_t num_ranges,
    const RowLetter *source, int fd, const Gate *gate,
) noexcept nogil:
    """Copy what a letter describes to a row of this end, when no other transfer uses the communicator."""
    cdef Row target
    cdef Row described
    cdef Outcome outcome = NO_COMMUNICATOR
    start_row(&target, tensors, num_tensors, ranges, num_ranges, 1)
    start_row(&described, source.tensors, source.head.tensors, source.ranges, source.head.ranges, 1)
    if not exchange.take_turn(gate):
        return TIMED_OUT
    if exchange.is_ready():
        outcome = exchange.get(&target, &described, fd, gate)
    exchange.give_turn()
    return outcome


# ---- letters

cdef StreamEnd _send_row(
    int fd, const uint64_t *tensors, uint64_t num_tensors, const Range *ranges, uint64_t num_ranges, const Gate *gate
) noexcept nogil:
    cdef RowHead head
    cdef StreamEnd end
    head.magic, head.tensors, head.ranges = row_magic(), num_tensors, num_ranges
    head.sum = _sum_of_row(&head, tensors, ranges)
    # The kernel keeps bytes that others are said to follow, so that must be true.
    end = send_bytes(fd, &head, sizeof(RowHead), gate, num_tensors + num_ranges != 0)
    if end == STREAM_OK:
        end = send_bytes(fd, tensors, num_tensors * sizeof(uint64_t), gate, num_ranges != 0)
    if end == STREAM_OK:
        end = send_bytes(fd, ranges, num_ranges * sizeof(Range), gate, False)
    return end


cdef StreamEnd _receive_row(int fd, uint64_t num_tensors, RowLetter *letter, const Gate *gate) noexcept nogil:
    """Receive where bytes of so many tensors are; unless the end is STREAM_OK there is nothing to be freed."""
    cdef uint64_t words
    cdef StreamEnd end = receive_bytes(fd, &letter.head, sizeof(RowHead), gate)
    if end != STREAM_OK:
        return end
    if letter.head.magic != row_magic() or letter.head.tensors != num_tensors or letter.head.ranges > MAX_TABLE:
        return STREAM_SPOILT
    words = num_tensors + 2 * letter.head.ranges
    letter.words = <uint64_t *>malloc((words + 1) * sizeof(uint64_t))
    if letter.words == NULL:
        return STREAM_LATE  # as good as one that cannot go on
    letter.tensors, letter.ranges = letter.words, <Range *>(letter.words + num_tensors)
    end = receive_bytes(fd, letter.words, words * sizeof(uint64_t), gate)
    if end == STREAM_OK and not _is_sound(letter):
        end = STREAM_SPOILT
    if end != STREAM_OK:
        free(letter.words)
    return end


cdef bint _is_sound(const RowLetter *letter) noexcept nogil:
    """Whether a letter is as it was sent, and the bytes that it describes can be counted."""
    cdef uint64_t most = (<uint64_t>1 << 62) // max(letter.head.tensors, <uint64_t>1)
    cdef uint64_t of_tensor = 0
    cdef uint64_t i
    if letter.head.sum != _sum_of_row(&letter.head, letter.tensors, letter.ranges):
        return False
    for i in range(letter.head.ranges):
        if letter.ranges[i].nbytes > most - of_tensor:
            return False
        of_tensor += letter.ranges[i].nbytes
    return True


cdef uint64_t _sum_of_row(const RowHead *head, const uint64_t *tensors, const Range *ranges) noexcept nogil:
    cdef uint64_t sum = sum_bytes(0, head, sizeof(RowHead) - sizeof(uint64_t))
    sum = sum_bytes(sum, tensors, head.tensors * sizeof(uint64_t))
    return sum_bytes(sum, ranges, head.ranges * sizeof(Range))
