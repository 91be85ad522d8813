from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._link_end cimport LinkEnd
from llm_datadist._local cimport BlockPairs, LocalCache
from llm_datadist._outcome cimport Outcome
from llm_datadist._stream cimport Range, StreamEnd
from llm_datadist._tcp cimport StreamReply, StreamRequest, StreamVerdict


# One transfer: what it asks for, and where the bytes lie on this side.
cdef struct Transfer:
    StreamRequest request
    uint64_t *table           # words after the request
    uint64_t table_words
    uint64_t *tensors         # addresses here
    Range *ranges
    uint64_t num_ranges
    StreamReply reply
    Gate gate


cdef class TcpPeer(LinkEnd):
    cdef bint _summed

    cdef Outcome _push(
        self, Transfer *transfer, LocalCache source, uint64_t first, uint64_t slot, BlockPairs pairs,
        uint64_t block_nbytes, uint64_t *targets, uint64_t deadline_ns,
    ) noexcept nogil
    cdef Outcome _run(
        self, Transfer *transfer, LocalCache local, uint64_t first, uint64_t deadline_ns
    ) noexcept nogil
    cdef Outcome _ask(self, Transfer *transfer) noexcept nogil
    cdef int _find_channel(self, const Gate *gate) noexcept nogil
    cdef Outcome _why_broken(self, StreamEnd end, const Gate *gate) noexcept nogil
    cdef StreamEnd _send_request(self, int fd, Transfer *transfer, bint more) noexcept nogil
    cdef StreamEnd _confirm(self, int fd, StreamVerdict *verdict, Outcome outcome, const Gate *gate) noexcept nogil
    # How the bytes move. Anything but STREAM_OK closes the connection; `answered`: the owner has begun.
    cdef StreamEnd _pull_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil
    cdef StreamEnd _push_once(self, int fd, Transfer *transfer, Outcome *outcome, bint *answered) noexcept nogil
    cdef int _report(self, const Transfer *transfer, Outcome outcome) except -1


cdef Outcome known_outcome(uint64_t outcome) noexcept nogil
