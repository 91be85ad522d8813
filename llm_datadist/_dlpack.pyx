"""DLPack capsules of tensors in host memory.

A capsule holds the buffer it was made of, and an owner, until the consumer calls the deleter or, if nobody took the
capsule, until the capsule dies. Both structures of the protocol are offered: the one without a version, which older
consumers know, and that of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef extern from "Python.h":
    bint Py_IsInitialized() nogil

# dlpack.h, laid out as the protocol prescribes.

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t *shape
    int64_t *strides        # in elements
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor dl_tensor
    void *manager_ctx
    void (*deleter)(DLManagedTensor *) noexcept nogil

cdef struct DLPackVersion:
    uint32_t major
    uint32_t minor

cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void *manager_ctx
    void (*deleter)(DLManagedTensorVersioned *) noexcept nogil
    uint64_t flags
    DLTensor dl_tensor

cdef enum:
    DEVICE_CPU = 1
    FLAG_READ_ONLY = 1
    FLAG_IS_COPIED = 2

INT = 0
UINT = 1
FLOAT = 2
BFLOAT = 4
BOOL = 6
CPU_DEVICE = (<int>DEVICE_CPU, 0)

cdef char *NAME = "dltensor"
cdef char *NAME_VERSIONED = "dltensor_versioned"

cdef struct Export:         # one allocation; shape and strides stand behind it
    DLManagedTensor plain
    DLManagedTensorVersioned versioned
    Py_buffer view
    PyObject *owner


def make_capsule(
    memory,
    owner,
    uint8_t type_code,
    uint8_t type_bits,
    tuple shape not None,
    *,
    bint versioned,
    bint copied,
):
    """Wrap a whole buffer as a row-major tensor on the CPU.

    Parameters
    ----------
    memory : buffer
        Contiguous bytes; exactly those of the tensor.
    owner : object
        Kept alive as long as the tensor.
    type_code, type_bits : int
        Element type: one of INT, UINT, FLOAT, BFLOAT, BOOL, and its width, a multiple of 8.
    shape : tuple of int
        Elements in each dimension.
    versioned : bool
        Make the structure of DLPack 1.x instead of the older one.
    copied : bool
        Say that the memory is a copy that belongs to the consumer alone; DLPack 1.x only.

    Raises
    ------
    BufferError
        The buffer is read-only and the older structure, which cannot say so, was asked for.
    ValueError
        Shape and type do not make up the size of the buffer.
    """
    cdef Export *export = <Export *>calloc(1, sizeof(Export) + 2 * len(shape) * sizeof(int64_t))
    if export == NULL:
        raise MemoryError()
    try:
        PyObject_GetBuffer(memory, &export.view, PyBUF_SIMPLE if versioned else PyBUF_WRITABLE)
    except BaseException:
        free(export)
        raise
    export.owner = <PyObject *>owner
    Py_INCREF(owner)
    try:
        fill_tensor(export, type_code, type_bits, shape, versioned)
        if not versioned:
            return PyCapsule_New(&export.plain, NAME, drop_plain)
        if export.view.readonly:
            export.versioned.flags |= FLAG_READ_ONLY
        if copied:
            export.versioned.flags |= FLAG_IS_COPIED
        return PyCapsule_New(&export.versioned, NAME_VERSIONED, drop_versioned)
    except BaseException:
        release(export)
        raise


cdef int fill_tensor(Export *export, uint8_t type_code, uint8_t type_bits, tuple shape, bint versioned) except -1:
    cdef DLTensor *tensor = &export.versioned.dl_tensor if versioned else &export.plain.dl_tensor
    cdef int dimension
    cdef int64_t step = 1
    tensor.data = export.view.buf
    tensor.device = DLDevice(DEVICE_CPU, 0)
    tensor.ndim = <int32_t>len(shape)
    tensor.dtype = DLDataType(type_code, type_bits, 1)
    tensor.shape = <int64_t *>(export + 1)
    tensor.strides = tensor.shape + tensor.ndim
    for dimension in range(tensor.ndim - 1, -1, -1):
        tensor.shape[dimension] = shape[dimension]
        tensor.strides[dimension] = step
        step *= tensor.shape[dimension]
    if step * (type_bits // 8) != export.view.len:
        raise ValueError(
            f"shape {shape} with {type_bits} bits an element does not make up a buffer of {export.view.len} bytes"
        )
    export.plain.manager_ctx = export
    export.plain.deleter = delete_plain
    export.versioned.version = DLPackVersion(1, 0)
    export.versioned.manager_ctx = export
    export.versioned.deleter = delete_versioned
    return 0


cdef void release(Export *export) noexcept:
    PyBuffer_Release(&export.view)
    Py_DECREF(<object>export.owner)
    free(export)


# Deleters: called by the consumer, from any thread, with or without the interpreter lock. After the interpreter has
# gone there is nothing to give the memory back to.

cdef void delete_plain(DLManagedTensor *tensor) noexcept nogil:
    if Py_IsInitialized():
        with gil:
            release(<Export *>tensor.manager_ctx)


cdef void delete_versioned(DLManagedTensorVersioned *tensor) noexcept nogil:
    if Py_IsInitialized():
        with gil:
            release(<Export *>tensor.manager_ctx)


# Destructors of capsules: a consumer that took the tensor has renamed the capsule.

cdef void drop_plain(object capsule) noexcept:
    if PyCapsule_IsValid(capsule, NAME):
        release(<Export *>(<DLManagedTensor *>PyCapsule_GetPointer(capsule, NAME)).manager_ctx)


cdef void drop_versioned(object capsule) noexcept:
    if PyCapsule_IsValid(capsule, NAME_VERSIONED):
        release(<Export *>(<DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, NAME_VERSIONED)).manager_ctx)
