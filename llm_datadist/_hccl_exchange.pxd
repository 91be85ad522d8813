# Scattered bytes between two devices, over a communicator of two ranks.
#
# Both ends see a transfer as the same row of bytes, tensor by tensor, and cut it in the same way, without a word about
# it: into steps of STEP_BYTES, and a step into items. What an end does with an item is its own business: if its bytes
# lie in one piece of device memory, they are sent or received right there, else they go through a staging buffer.
#
#   unit < DIRECT_FROM     an item is a step: small pieces are gathered, a pair of operations for each would cost more
#   unit >= DIRECT_FROM    an item never reaches over the end of a unit: large blocks need no copy, wherever they lie
#
# The unit is a block, or what is moved of each tensor: both ends know it. A pair of operations costs some 20 us (two
# notifications on either side, whatever the size), a copy task some 5 us, and its bytes pass at the speed of the
# device's memory, more than ten times that of a link. Gathered into steps of 4 MiB a block costs 5 us and its share of
# one pair, so a pair of its own pays from about a MiB on. These are estimates: nothing of it was measured on hardware.

from libc.stdint cimport uint64_t

from llm_datadist._acl cimport AclFailure, Device, DeviceMemory, Event, Stream
from llm_datadist._copy cimport Gate
from llm_datadist._hccl cimport Communicator, HcclFunctions
from llm_datadist._outcome cimport Outcome
from llm_datadist._stream cimport Range

cdef enum:
    STEP_BYTES = 4 << 20
    DIRECT_FROM = 1 << 20
    MAX_ITEMS = 6             # of a step: units of DIRECT_FROM, and a part of one at either end


# Where the bytes of a transfer lie at this end, and how far it has come.
cdef struct Row:
    const uint64_t *tensors   # addresses
    uint64_t num_tensors
    const Range *ranges       # the same of each tensor
    uint64_t num_ranges
    uint64_t unit
    uint64_t left             # bytes
    uint64_t to_unit          # bytes until the unit ends
    uint64_t tensor           # where the next byte lies
    uint64_t range
    uint64_t range_done

# Bytes that one operation moves.
cdef struct Item:
    uint64_t offset           # in the step
    uint64_t nbytes
    uint64_t address          # where they lie, if that is one piece of device memory; else 0

cdef struct Step:
    Item items[MAX_ITEMS]
    uint64_t num_items
    uint64_t nbytes
    bint staged               # whether an item goes through the staging buffer


cdef void start_row(
    Row *row, const uint64_t *tensors, uint64_t num_tensors, const Range *ranges, uint64_t num_ranges, uint64_t unit
) noexcept nogil
# Goes on by the bytes, `most` at most, that follow each other in memory; says where they begin, gives how many.
cdef uint64_t next_piece(Row *row, uint64_t most, uint64_t *address) noexcept nogil


cdef class Half:
    cdef Event filled             # it has what is to be sent, or what has come
    cdef Event emptied            # nobody needs what is in it any more
    cdef uint64_t offset          # in the buffer
    cdef bint used                # by the running transfer


cdef class Exchange:
    cdef readonly Device device
    cdef uint64_t _pool_base      # of memory that is known to be on the device
    cdef uint64_t _pool_size
    cdef Communicator _communicator
    cdef Stream _stream           # of the communicator
    cdef Stream _copies           # between tensors and the staging buffer
    cdef Half _even
    cdef Half _odd
    cdef DeviceMemory _staging
    cdef bint _batched
    cdef readonly int rank
    cdef uint64_t _ready
    cdef uint64_t _turn           # a transfer is under way, or the communicator is being exchanged
    cdef HcclFunctions *_hccl
    cdef AclFailure _failure
    cdef bint _of_hccl            # whether HCCL reported the failure

    cdef bint is_ready(self) noexcept nogil
    cdef bint take_turn(self, const Gate *gate) noexcept nogil
    cdef void give_turn(self) noexcept nogil
    cdef void lose(self) noexcept nogil
    cdef Outcome move(self, Row *row, bint sending, int fd, const Gate *gate) noexcept nogil
    cdef void _abort(self) noexcept nogil
    cdef Outcome _post_all(self, Row *row, bint sending, const Gate *gate) noexcept nogil
    cdef Outcome _staged_step(
        self, Row *row, const Step *step, Half half, bint sending, const Gate *gate
    ) noexcept nogil
    cdef Outcome _send_step(self, Row *row, const Step *step, Half half, const Gate *gate) noexcept nogil
    cdef Outcome _receive_step(self, Row *row, const Step *step, Half half, const Gate *gate) noexcept nogil
    cdef Outcome _hand_over(self, Event event, Stream done, Stream goes_on) noexcept nogil
    cdef Outcome _post(self, const Step *step, uint64_t offset, bint sending) noexcept nogil
    cdef Outcome _copy_step(
        self, Row *row, const Step *step, Half half, Event event, bint sending, const Gate *gate
    ) noexcept nogil
    cdef Outcome _copy_piece(
        self, uint64_t address, uint64_t staged, uint64_t nbytes, bint sending, Event event, bint *must_wait,
        const Gate *gate,
    ) noexcept nogil
    cdef Outcome _wait(self, int fd, const Gate *gate) noexcept nogil
    cdef Outcome _wait_for(self, Stream stream, int fd, const Gate *gate) noexcept nogil
    cdef Outcome _failed(self, const char *function, int code) noexcept nogil
    cdef Outcome _hccl_failed(self, const char *function, int code) noexcept nogil
    cdef void _plan_step(self, Row *row, Step *step) noexcept nogil
    cdef void _plan_item(self, Row *row, Item *item) noexcept nogil
    cdef bint _is_on_device(self, uint64_t address) noexcept nogil
