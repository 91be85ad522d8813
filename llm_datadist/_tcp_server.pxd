from libc.stdint cimport uint64_t

from llm_datadist._copy cimport Gate
from llm_datadist._core cimport DirectoryEntry, Found
from llm_datadist._outcome cimport Outcome
from llm_datadist._pull cimport Pull
from llm_datadist._push cimport PeerTarget
from llm_datadist._stream cimport Range
from llm_datadist._tcp cimport StreamReply, StreamRequest


# A request, the words that came with it, and room for the plan that is made of them.
cdef struct Work:
    StreamRequest request
    uint64_t *addresses       # of PUSH_TO_ADDRESSES
    uint64_t *blocks
    uint64_t largest          # of the blocks
    uint64_t *tensors         # addresses here; of a push followed by a word for each
    Range *ranges
    uint64_t num_ranges
    Gate gate


cdef class TcpServer(PeerTarget):
    cdef bint _peer_writes

    cdef bint _serve_one(self, int fd) noexcept nogil
    cdef bint _serve_other(self, int fd, Work *work) noexcept nogil
    cdef bint _serve_pull(self, int fd, Work *work) noexcept nogil
    cdef Outcome _plan_pull(self, const Pull *pull, Work *work) noexcept nogil
    cdef bint _finish_pull(self, int fd, Pull *pull, Work *work, Outcome outcome, uint64_t checksum) noexcept nogil
    cdef bint _release_key(self, int fd, Pull *pull, const Work *work) noexcept nogil
    cdef bint _serve_push(self, int fd, Work *work) noexcept nogil
    cdef Outcome _plan_push(self, Work *work, Found *claims, uint64_t *claimed) noexcept nogil
    # How the bytes move. False: the connection is at its end.
    cdef bint _send_pull(self, int fd, Pull *pull, Work *work) noexcept nogil
    cdef bint _receive_push(self, int fd, Work *work, Outcome *outcome) noexcept nogil
    cdef bint _refuse_push(self, int fd, const Work *work) noexcept nogil


cdef void fill_reply(StreamReply *reply, Outcome outcome, const DirectoryEntry *entry) noexcept nogil
cdef bint send_reply(int fd, Outcome outcome, const DirectoryEntry *entry, const Gate *gate) noexcept nogil
