from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._hccl_exchange cimport Exchange, Row
from llm_datadist._outcome cimport Outcome
from llm_datadist._stream cimport StreamEnd
from llm_datadist._tcp_end cimport TcpPeer, Transfer
from llm_datadist._tcp_server cimport TcpServer, Work


cdef class HcclPeer(TcpPeer):
    cdef readonly Exchange exchange
    cdef str _detail              # why there is no communicator

    cdef Outcome _have_communicator(self, const Gate *gate) noexcept nogil
    cdef StreamEnd _in_turn(
        self, int fd, Transfer *transfer, Outcome *outcome, bint *answered, bint sending
    ) noexcept nogil
    cdef StreamEnd _exchange(
        self, int fd, Transfer *transfer, Row *row, Outcome *outcome, bint *answered, bint sending, bint takes_turn
    ) noexcept nogil
    cdef StreamEnd _request(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil
    cdef StreamEnd _hear_reply(self, int fd, Transfer *transfer, Outcome *outcome) noexcept nogil
    cdef StreamEnd _hear_verdict(self, int fd, Outcome *outcome, const Gate *gate) noexcept nogil
    cdef Outcome _why_lost(self, Outcome outcome, const Gate *gate) noexcept nogil


cdef class HcclServer(TcpServer):
    cdef readonly Exchange exchange

    cdef bint _move_row(self, int fd, Work *work, Row *row, bint sending) noexcept nogil
    cdef void _tell_failure(self) noexcept nogil
