# What goes over a data connection between two hosts. Words are 64 bits in little-endian order, which is that of every
# machine this runs on. One request at a time; it carries the whole plan.
#
#   pull   initiator: StreamRequest, source blocks (PULL_BLOCKS)
#          owner:     StreamReply; and if its outcome is DONE: the bytes, tensor by tensor, StreamVerdict
#          with `confirm` in it: initiator: StreamVerdict; owner: StreamVerdict
#   push   initiator: StreamRequest, addresses (PUSH_TO_ADDRESSES), target blocks, the bytes, StreamVerdict
#          owner:     StreamReply
#
# A key is released between the two verdicts that follow a `confirm`: an initiator that dies before it has said that it
# has every byte leaves the key as it was. An end that cannot go on closes the stream.
#
# Requests with their tables, replies and verdicts always carry a CRC-32C of themselves: a number that changed on the
# way would move the wrong bytes. Whoever sees one closes the stream.

from libc.stdint cimport uint64_t

from llm_datadist._core cimport Seal
from llm_datadist._stream cimport sum_bytes

cdef enum:
    MAX_TABLE = 1 << 22       # words after a request: what a peer can make the owner allocate

cdef enum StreamOperation:
    PULL_RANGE = 1
    PULL_BLOCKS = 2
    PUSH_TO_ADDRESSES = 3
    PUSH_TO_KEY = 4
    MAKE_COMMUNICATOR = 5     # on links over HCCL, see _hccl_end.pyx

cdef enum RequestFlag:
    CONSUME = 1
    SEALED = 2
    SUMMED = 4                # the sender of the bytes sums them, the receiver compares
    BY_BLOCKS = 8             # of a push: into blocks

cdef struct StreamRequest:
    uint64_t magic
    uint64_t operation
    uint64_t flags
    uint64_t timeout_ns       # that the initiator still has
    uint64_t kind             # of the key; not of PUSH_TO_ADDRESSES
    uint64_t key_id
    uint64_t model_id
    uint64_t slot             # of the owner's cache; for CACHE_ID
    uint64_t first            # tensor of the owner's cache
    uint64_t count            # of tensors there; 2**64 - 1 = all of them
    uint64_t tensors          # on the initiator's side
    uint64_t block            # bytes of a block, or what is pushed of each tensor
    uint64_t offset           # of PULL_RANGE, in the slot
    uint64_t nbytes           # of PULL_RANGE, in each tensor; of a push, of the bytes together
    uint64_t blocks           # in the table
    Seal seal
    uint64_t sum              # of the request, with 0 in here, and of its table

cdef struct StreamReply:
    uint64_t magic
    uint64_t outcome
    uint64_t tensors          # of the owner's cache, if it was found
    uint64_t slots
    uint64_t stride
    uint64_t sum              # of the words before

cdef struct StreamVerdict:
    uint64_t magic
    uint64_t outcome
    uint64_t checksum         # of the bytes, if they are summed
    uint64_t confirm          # from the owner: the initiator must say how it fares, and hears when the key is gone
    uint64_t sum              # of the words before


cdef inline uint64_t stream_magic() noexcept nogil:
    return 0x4C4C4D4453545231ULL  # "LLMDSTR1"

cdef inline uint64_t sum_of_request(const StreamRequest *request, const uint64_t *table, uint64_t words) noexcept nogil:
    cdef StreamRequest copy = request[0]
    copy.sum = 0
    return sum_bytes(sum_bytes(0, &copy, sizeof(StreamRequest)), table, words * sizeof(uint64_t))

cdef inline void sign_reply(StreamReply *reply) noexcept nogil:
    reply.magic = stream_magic()
    reply.sum = sum_bytes(0, reply, sizeof(StreamReply) - sizeof(uint64_t))

cdef inline bint is_reply(const StreamReply *reply) noexcept nogil:
    return reply.magic == stream_magic() and reply.sum == sum_bytes(0, reply, sizeof(StreamReply) - sizeof(uint64_t))

cdef inline void sign_verdict(StreamVerdict *verdict) noexcept nogil:
    verdict.magic = stream_magic()
    verdict.sum = sum_bytes(0, verdict, sizeof(StreamVerdict) - sizeof(uint64_t))

cdef inline bint is_verdict(const StreamVerdict *verdict) noexcept nogil:
    return verdict.magic == stream_magic() and (
        verdict.sum == sum_bytes(0, verdict, sizeof(StreamVerdict) - sizeof(uint64_t))
    )
