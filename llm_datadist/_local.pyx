"""What a transfer touches on this side: a local cache, and the block table that says which block goes where."""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.list cimport PyList_Check
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_AsUnsignedLongLong, PyLong_Check
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.sequence cimport PySequence_Fast_GET_ITEM
from cpython.tuple cimport PyTuple_Check
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from llm_datadist._atomics cimport exchange, fetch_add, fetch_sub, load_acquire


cdef class LocalCache:
    """Where a cache of this process lies, and how many transfers use it right now.

    Parameters
    ----------
    cache_id : int
        Id of the cache, never used again by the owner.
    address, step : int
        Address of the first tensor; bytes from one tensor to the next, 0 if they do not follow each other.
    tensor_nbytes, stride : int
        Bytes of one tensor and of one slot of it.
    tensors, slots : int
        Number of tensors, number of slots of each.
    addresses : list of int, optional
        Address of each tensor, when they do not follow each other.
    """

    def __init__(
        self, uint64_t cache_id, uint64_t address, uint64_t step, uint64_t tensor_nbytes, uint64_t stride,
        uint64_t tensors, uint64_t slots, list addresses=None,
    ):
        cdef uint64_t i
        self.cache_id = cache_id
        self.address = address
        self.step = step
        self.tensor_nbytes = tensor_nbytes
        self.stride = stride
        self.tensors = tensors
        self.slots = slots
        if addresses is None:
            return
        if <uint64_t>len(addresses) != tensors:
            raise ValueError(f"{len(addresses)} addresses for {tensors} tensors")
        self._addresses = <uint64_t *>PyMem_Malloc((tensors + 1) * sizeof(uint64_t))
        if self._addresses == NULL:
            raise MemoryError()
        for i in range(tensors):
            self._addresses[i] = addresses[i]

    def __dealloc__(self):
        PyMem_Free(self._addresses)

    def tensor_address(self, uint64_t index):
        """Address of one tensor, which must exist."""
        if index >= self.tensors:
            raise IndexError(f"tensor {index} of {self.tensors}")
        return self.tensor_at(index)

    cdef bint pin(self) noexcept nogil:
        fetch_add(&self._pins, 1)
        if load_acquire(&self._released) != 0:
            fetch_sub(&self._pins, 1)
            return False
        return True

    cdef void unpin(self) noexcept nogil:
        fetch_sub(&self._pins, 1)

    def release(self):
        """Let no new transfer start on this memory."""
        exchange(&self._released, 1)

    @property
    def pinned(self) -> bool:
        """Whether a transfer runs on this memory."""
        return load_acquire(&self._pins) != 0


cdef class BlockPairs:
    """Block table of one transfer: source block i goes into target block i. Made by `block_pairs`."""

    def __dealloc__(self):
        PyMem_Free(self._sources)

    @property
    def is_empty(self) -> bool:
        return self.count == 0


def block_pairs(sources not None, targets not None):
    """Unpack two block lists of equal length: lists, tuples, or one-dimensional arrays of integers (buffers).

    Raises
    ------
    TypeError
        An element is no int, or an argument is nothing of these.
    ValueError
        A block number is negative or beyond uint64; the lists differ in length.
    """
    cdef Py_ssize_t count = len(sources)
    if len(targets) != count:
        raise ValueError(f"{count} source blocks but {len(targets)} target blocks, size should be same")
    cdef BlockPairs pairs = BlockPairs.__new__(BlockPairs)
    pairs._sources = <uint64_t *>PyMem_Malloc((2 * count + 1) * sizeof(uint64_t))
    if pairs._sources == NULL:
        raise MemoryError()
    pairs._targets = pairs._sources + count
    pairs.count = count
    pairs.max_source = _unpack(sources, pairs._sources, count)
    pairs.max_target = _unpack(targets, pairs._targets, count)
    return pairs


def flatten_copies(dict copies not None):
    """List the pairs of a table from each source to its targets, in order: all sources, all targets.

    None if the table holds anything but lists of plain ints in [0, 2**63): then it has to be looked at one by one.
    """
    cdef list sources = []
    cdef list targets = []
    for source, of_source in copies.items():
        if type(of_source) is not list or not _is_small_number(source):
            return None
        for target in <list>of_source:
            if not _is_small_number(target):
                return None
            sources.append(source)
            targets.append(target)
    return sources, targets


cdef bint _is_small_number(object number) except -1:
    cdef int overflow = 0
    return type(number) is int and PyLong_AsLongLongAndOverflow(number, &overflow) >= 0 and overflow == 0


cdef uint64_t _unpack(object blocks, uint64_t *out, Py_ssize_t count) except? 0:
    if not (PyList_Check(blocks) or PyTuple_Check(blocks)):
        return _unpack_buffer(blocks, out, count)
    cdef Py_ssize_t i
    cdef uint64_t value
    cdef uint64_t largest = 0
    for i in range(count):
        item = <object>PySequence_Fast_GET_ITEM(blocks, i)
        if not PyLong_Check(item):
            raise TypeError(f"block number {item!r} is a {type(item).__name__}, only support int")
        try:
            value = PyLong_AsUnsignedLongLong(item)
        except OverflowError:
            raise ValueError(f"block number {item} is out of range, should be in [0, 2**64)") from None
        out[i] = value
        if value > largest:
            largest = value
    return largest


cdef uint64_t _unpack_buffer(object blocks, uint64_t *out, Py_ssize_t count) except? 0:
    cdef Py_buffer buffer
    cdef char kind
    cdef bint is_signed
    cdef uint64_t value
    cdef uint64_t largest = 0
    cdef Py_ssize_t i
    try:
        PyObject_GetBuffer(blocks, &buffer, PyBUF_STRIDES | PyBUF_FORMAT)
    except BufferError as error:
        raise TypeError(f"block numbers in a {type(blocks).__name__} cannot be read: {error}") from None
    try:
        kind = buffer.format[0] if buffer.format != NULL and buffer.format[1] == 0 else 0
        is_signed = kind in b"bhilq"
        if buffer.ndim != 1 or buffer.shape[0] != count or not (is_signed or kind in b"BHILQ"):
            raise TypeError(f"a {type(blocks).__name__} of block numbers should have one dimension, of integers")
        for i in range(count):
            value = _number_at(<const char *>buffer.buf + i * buffer.strides[0], buffer.itemsize, is_signed)
            if is_signed and value >> 63:
                raise ValueError(f"block number {<int64_t>value} is out of range, should be in [0, 2**64)")
            out[i] = value
            if value > largest:
                largest = value
    finally:
        PyBuffer_Release(&buffer)
    return largest


cdef uint64_t _number_at(const char *at, Py_ssize_t nbytes, bint is_signed) noexcept nogil:
    if nbytes == 8:
        return (<const uint64_t *>at)[0]
    if nbytes == 4:
        return <uint64_t><int64_t>(<const int32_t *>at)[0] if is_signed else (<const uint32_t *>at)[0]
    if nbytes == 2:
        return <uint64_t><int64_t>(<const int16_t *>at)[0] if is_signed else (<const uint16_t *>at)[0]
    return <uint64_t><int64_t>(<const int8_t *>at)[0] if is_signed else (<const uint8_t *>at)[0]
