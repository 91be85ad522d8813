# A row of bytes, described to the end that copies it: the head, the address of each tensor, and where in a tensor each
# range begins and how long it is.

from libc.stdint cimport uint64_t

from llm_datadist._stream cimport Range

cdef struct RowHead:
    uint64_t magic
    uint64_t tensors
    uint64_t ranges           # the same of each tensor
    uint64_t sum              # of the words before, and of those that follow

cdef struct RowLetter:
    RowHead head
    uint64_t *words           # that follow the head; to be freed
    uint64_t *tensors
    Range *ranges

cdef inline uint64_t row_magic() noexcept nogil:
    return 0x4C4C4D44524F5731ULL  # "LLMDROW1"
