"""The two ends of a link over HCCL: requests and answers go over data connections, the bytes over a communicator.

A transfer is asked for as on a link over tcp. Both ends post operations only when the owner has accepted: an operation
whose partner never comes would wait for minutes. So the bytes have a way of their own, and what goes over the
connection is:

    pull   initiator: StreamRequest, source blocks
           owner:     StreamReply; unless its outcome is DONE, nothing follows
           both move the bytes
           owner:     StreamVerdict; with `confirm` in it the two that follow over tcp
    push   initiator: StreamRequest, addresses, target blocks
           owner:     StreamReply; unless its outcome is DONE, nothing follows
           both move the bytes
           owner:     StreamReply

An end that cannot go on closes the connection, which the other one sees while it waits for its streams. The
communicator is lost then; the next transfer, from whichever side, has another one made (MAKE_COMMUNICATOR).
"""

import logging

from libc.stdint cimport uint64_t
from libc.string cimport memset

from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._core cimport DirectoryEntry
from llm_datadist._hccl_exchange cimport Exchange, Row, start_row
from llm_datadist._outcome cimport DEVICE_FAILED, DONE, NO_COMMUNICATOR, REVOKED, TIMED_OUT, Outcome
from llm_datadist._pull cimport Pull
from llm_datadist._segment cimport Memory, Segment
from llm_datadist._stream cimport (
    STREAM_LATE, STREAM_OK, STREAM_SPOILT, StreamEnd, receive_bytes, send_bytes,
)
from llm_datadist._tcp cimport (
    MAKE_COMMUNICATOR, PULL_RANGE, StreamReply, StreamRequest, StreamVerdict, is_reply, is_verdict, stream_magic,
    sum_of_request,
)
from llm_datadist._tcp_end cimport TcpPeer, Transfer, known_outcome
from llm_datadist._tcp_server cimport TcpServer, Work, send_reply

from llm_datadist._outcome import TransferFault

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    DEATH_NS = 200000000      # between a data connection that closes and word that the whole link has

_log = logging.getLogger("llm_datadist.link")


cdef class HcclPeer(TcpPeer):
    """The initiator's end.

    Parameters
    ----------
    exchange : Exchange
        Of the link; shared with the other direction.
    """

    def __init__(self, Exchange exchange not None):
        super().__init__(False)
        self.exchange = exchange
        self._detail = ""

    def _want_communicator(self, uint64_t deadline_ns):
        """Have a communicator made; tells whether there is one at the deadline. Raises if it cannot be made."""
        return False

    def take_channel(self, uint64_t deadline_ns):
        """Take a data connection to oneself; gives its descriptor, or -1 if none is free by the deadline."""
        cdef Gate gate = self._gate(deadline_ns)
        cdef int descriptor
        with nogil:
            descriptor = self._find_channel(&gate)
        return descriptor

    def keep_channel(self, int descriptor):
        """Give back what `take_channel` gave."""
        self._keep_channel(descriptor)

    def drop_channel(self, int descriptor):
        """Close what `take_channel` gave."""
        self._drop_channel(descriptor)

    # ---- transfers

    cdef Outcome _ask(self, Transfer *transfer) noexcept nogil:
        cdef Outcome outcome = NO_COMMUNICATOR
        cdef int _attempt
        for _attempt in range(2):
            if not self.exchange.is_ready():
                outcome = self._have_communicator(&transfer.gate)
                if outcome != DONE:
                    return outcome
            outcome = TcpPeer._ask(self, transfer)
            if outcome != NO_COMMUNICATOR:
                return outcome
            self.exchange.lose()  # the owner has lost it, so this one is of no use either
        return outcome

    cdef Outcome _have_communicator(self, const Gate *gate) noexcept nogil:
        cdef Outcome outcome = TIMED_OUT
        with gil:
            self._detail = ""
            try:
                if self._want_communicator(gate.deadline_ns):
                    outcome = DONE
            except Exception as error:
                self._detail = str(error)
                outcome = NO_COMMUNICATOR
        return outcome if outcome == DONE else self._why_lost(outcome, gate)

    cdef StreamEnd _pull_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        return self._in_turn(fd, transfer, outcome, answered, False)

    cdef StreamEnd _push_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        return self._in_turn(fd, transfer, outcome, answered, True)

    cdef StreamEnd _in_turn(
        self, int fd, Transfer *transfer, Outcome *outcome, bint *answered, bint sending
    ) noexcept nogil:
        """Carry the transfer out; rank 0 takes its turn before it asks."""
        cdef bint first = self.exchange.rank == 0
        cdef StreamEnd end = STREAM_OK
        cdef Row row
        start_row(
            &row, transfer.tensors, transfer.request.tensors, transfer.ranges, transfer.num_ranges,
            _unit(&transfer.request),
        )
        if first and not self.exchange.take_turn(&transfer.gate):
            outcome[0] = self._why_stopped() if stopped(&transfer.gate) else TIMED_OUT
            return STREAM_OK
        if not self.exchange.is_ready() or first != (self.exchange.rank == 0):
            outcome[0] = NO_COMMUNICATOR
        else:
            outcome[0] = TIMED_OUT
            end = self._exchange(fd, transfer, &row, outcome, answered, sending, not first)
        if first:
            self.exchange.give_turn()
        return end

    cdef StreamEnd _exchange(
        self, int fd, Transfer *transfer, Row *row, Outcome *outcome, bint *answered, bint sending, bint takes_turn
    ) noexcept nogil:
        cdef const Gate *gate = &transfer.gate
        cdef Outcome moved
        cdef StreamEnd end = self._request(fd, transfer, outcome, answered)
        if end != STREAM_OK or outcome[0] != DONE:
            return end
        outcome[0] = TIMED_OUT
        if takes_turn and not self.exchange.take_turn(gate):
            self.exchange.lose()  # the owner has posted
            return STREAM_LATE
        moved = self.exchange.move(row, sending, fd, gate)
        if takes_turn:
            self.exchange.give_turn()
        if moved != DONE:  # what is lost already is made anew at once
            outcome[0] = moved if moved == NO_COMMUNICATOR else self._why_lost(moved, gate)
            return STREAM_LATE
        if sending:
            return self._hear_reply(fd, transfer, outcome)
        return self._hear_verdict(fd, outcome, gate)

    cdef StreamEnd _request(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil:
        """Ask for a transfer, and hear whether the owner accepts it."""
        cdef StreamEnd end = self._send_request(fd, transfer, False)
        if end == STREAM_OK:
            end = self._hear_reply(fd, transfer, outcome)
        if end == STREAM_OK:
            answered[0] = True
        return end

    cdef StreamEnd _hear_reply(self, int fd, Transfer *transfer, Outcome *outcome) noexcept nogil:
        cdef StreamEnd end = receive_bytes(fd, &transfer.reply, sizeof(StreamReply), &transfer.gate)
        if end != STREAM_OK:
            return end
        if not is_reply(&transfer.reply):
            return STREAM_SPOILT
        outcome[0] = known_outcome(transfer.reply.outcome)
        return STREAM_OK

    cdef StreamEnd _hear_verdict(self, int fd, Outcome *outcome, const Gate *gate) noexcept nogil:
        cdef StreamVerdict verdict
        cdef StreamEnd end = receive_bytes(fd, &verdict, sizeof(StreamVerdict), gate)
        if end != STREAM_OK:
            return end
        if not is_verdict(&verdict):
            return STREAM_SPOILT
        outcome[0] = known_outcome(verdict.outcome)
        return self._confirm(fd, &verdict, outcome[0], gate) if verdict.confirm else STREAM_OK

    cdef Outcome _why_lost(self, Outcome outcome, const Gate *gate) noexcept nogil:
        """Tell a device that failed from a peer that is gone, of which the device often hears first."""
        cdef uint64_t give_up = min(monotonic_ns() + DEATH_NS, gate.deadline_ns)
        while outcome != TIMED_OUT and not stopped(gate) and monotonic_ns() < give_up:
            usleep(1000)
        return self._why_stopped() if stopped(gate) else outcome

    cdef int _report(self, const Transfer *transfer, Outcome outcome) except -1:
        if outcome == NO_COMMUNICATOR:
            raise TransferFault(<int>outcome, detail=self._detail)
        if outcome == DEVICE_FAILED:
            failure = self.exchange.failure or "at the other end, whose log says more"
            raise TransferFault(<int>outcome, detail=str(failure))
        return TcpPeer._report(self, transfer, outcome)

    # ---- making a communicator

    def ask_for_communicator(self, int fd, uint64_t timeout_ns):
        """Say over a data connection that a communicator is to be made; tells whether that has gone.

        What follows is up to whoever has taken the connection.
        """
        cdef StreamRequest request
        cdef StreamEnd end
        cdef Gate gate = self._gate(monotonic_ns() + timeout_ns)
        memset(&request, 0, sizeof(StreamRequest))
        request.magic, request.operation, request.timeout_ns = stream_magic(), MAKE_COMMUNICATOR, timeout_ns
        request.sum = sum_of_request(&request, NULL, 0)
        with nogil:
            end = send_bytes(fd, &request, sizeof(StreamRequest), &gate, False)
        return end == STREAM_OK


cdef class HcclServer(TcpServer):
    """The owner's end; the parameters are those of `TcpServer`, and the exchange of the link."""

    def __init__(
        self, Memory pool not None, Segment directory not None, Segment ledger not None, Segment claims not None,
        bint peer_writes, Exchange exchange not None,
    ):
        super().__init__(pool, directory, ledger, claims, peer_writes)
        self.exchange = exchange

    def _make_communicator(self, int fd, uint64_t timeout_ns):
        """Make a communicator with the peer, who has asked for it; tells whether the connection is still good."""
        return False

    cdef bint _send_pull(self, int fd, Pull *pull, Work *work) noexcept nogil:
        cdef Row row
        cdef bint goes_on
        start_row(&row, work.tensors, work.request.tensors, work.ranges, work.num_ranges, _unit(&work.request))
        if not self.exchange.take_turn(&work.gate):
            self._end(pull, REVOKED)
            return False
        if not self.exchange.is_ready():
            self.exchange.give_turn()
            self._end(pull, NO_COMMUNICATOR)
            return send_reply(fd, NO_COMMUNICATOR, &pull.found.entry, &work.gate)
        goes_on = send_reply(fd, DONE, &pull.found.entry, &work.gate)
        if goes_on:
            goes_on = self._move_row(fd, work, &row, True)
        self.exchange.give_turn()
        if not goes_on:
            self._end(pull, REVOKED)
            return False
        return self._finish_pull(fd, pull, work, DONE, 0)

    cdef bint _receive_push(self, int fd, Work *work, Outcome *outcome) noexcept nogil:
        cdef Row row
        cdef DirectoryEntry nothing
        cdef bint goes_on
        start_row(&row, work.tensors, work.request.tensors, work.ranges, work.num_ranges, _unit(&work.request))
        if not self.exchange.take_turn(&work.gate):
            return False
        outcome[0] = DONE if self.exchange.is_ready() else NO_COMMUNICATOR
        goes_on = True
        if outcome[0] == DONE:
            memset(&nothing, 0, sizeof(DirectoryEntry))
            goes_on = send_reply(fd, DONE, &nothing, &work.gate)
            goes_on = goes_on and self._move_row(fd, work, &row, False)
        self.exchange.give_turn()
        # Bytes that came after the link was taken down were not wanted any more.
        return goes_on and not stopped(&work.gate)

    cdef bint _refuse_push(self, int fd, const Work *work) noexcept nogil:
        return True  # nothing is under way

    cdef bint _move_row(self, int fd, Work *work, Row *row, bint sending) noexcept nogil:
        cdef Outcome moved = self.exchange.move(row, sending, fd, &work.gate)
        if moved == DEVICE_FAILED and not stopped(&work.gate):
            self._tell_failure()
        return moved == DONE

    cdef void _tell_failure(self) noexcept nogil:
        with gil:
            _log.error("a transfer that the peer asked for has failed: %s", self.exchange.failure)

    cdef bint _serve_other(self, int fd, Work *work) noexcept nogil:
        cdef bint goes_on = False
        if work.request.operation == MAKE_COMMUNICATOR:
            with gil:
                try:
                    goes_on = self._make_communicator(fd, work.request.timeout_ns)
                except Exception:
                    _log.exception("no communicator for the peer")
        return goes_on


cdef uint64_t _unit(const StreamRequest *request) noexcept nogil:
    """How the bytes of a transfer are divided, as both ends know it."""
    return request.nbytes if request.operation == PULL_RANGE else request.block
