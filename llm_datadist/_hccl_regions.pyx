"""Memory that peers reach over HCCL by themselves, and communicators that it is bound to.

The order of release is fixed: unbind, destroy the communicator, take the registration back, free the memory. HCCL
refuses to destroy a communicator that memory is bound to, and to take back memory that is bound.
"""

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memset

from llm_datadist._acl cimport (
    ACL_SUCCESS, AclFailure, Device, Scope, aclError, failure_error, in_forked_child, note_failure,
)
from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._hccl cimport (
    HCCL_E_AGAIN, HCCL_SUCCESS, CommMem, Communicator, HcclComm, HcclCommConfig, HcclPrepareConfig, has_one_sided,
    hccl_failure_error, hccl_functions, note_hccl_failure,
)
from llm_datadist._segment cimport Memory

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

cdef enum:
    ON_DEVICE = 0                         # kind of memory, in CommMem
    FULL_MESH = 0                         # topology, in HcclPrepareConfig
    MOST_TABLE_BYTES = 1 << 16            # of a rank table; HCCL states no limit, and two devices need 2 KiB at most

_regions = set()  # what is registered: device, first address, address behind the last one

cdef uint64_t LAST_TRY_NS = 2000000000    # of a destructor, which has no deadline of its caller


@cython.final
@cython.no_gc_clear
cdef class RegisteredMemory:
    """Memory of a device that communicators can be bound to.

    Parameters
    ----------
    device : Device
        That it is on.
    memory : Memory
        Must stay as it is until `close` has succeeded.

    Raises
    ------
    HcclError
        HCCL refuses.
    ValueError
        Part of the memory is registered already, or the installed release has no one-sided transfers.
    """

    def __init__(self, Device device not None, Memory memory not None):
        cdef AclFailure failure
        cdef CommMem region
        cdef Scope scope
        cdef aclError entered
        _require_one_sided()
        self.hccl = hccl_functions()
        memset(&region, 0, sizeof(region))
        region.type, region.address, region.size = ON_DEVICE, <void *>memory.base, memory.size
        place = (device.device_id, memory.base, memory.base + memory.size)
        _require_apart(place)
        device._hold()
        _regions.add(place)
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            entered = failure.code
            if entered == ACL_SUCCESS:
                note_hccl_failure(
                    &failure, "HcclRegisterGlobalMem", self.hccl.HcclRegisterGlobalMem(&region, &self.handle)
                )
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.handle = NULL
            _regions.discard(place)
            device._drop()
            raise failure_error(&failure) if entered != ACL_SUCCESS else hccl_failure_error(&failure)
        self.device, self._memory = device, memory
        self.address, self.size = memory.base, memory.size

    def close(self):
        """Take the registration back, when no communicator is bound to the memory any more. May be called twice.

        Raises
        ------
        HcclError
            HCCL refuses: the memory must not be freed.
        """
        cdef AclFailure failure
        if not self._take_back(&failure):
            raise hccl_failure_error(&failure)

    cdef bint _take_back(self, AclFailure *failure) noexcept:
        cdef Scope scope
        cdef void *handle = self.handle
        if handle == NULL or in_forked_child():
            return True
        self.handle = NULL  # so that nobody else takes it back
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_hccl_failure(failure, "HcclDeregisterGlobalMem", self.hccl.HcclDeregisterGlobalMem(handle))
                self.device.leave(&scope)
        if failure.code != HCCL_SUCCESS:
            self.handle = handle
            return False
        self._memory = None
        _regions.discard((self.device.device_id, self.address, self.address + self.size))
        self.device._drop()
        return True

    def __dealloc__(self):
        cdef AclFailure failure
        if not self._take_back(&failure):
            self.device.lost = True  # memory that HCCL may still use is never given back


@cython.final
@cython.no_gc_clear
cdef class OneSidedCommunicator(Communicator):
    """A communicator of two ranks, one of which is this process, that one rank moves bytes over without the other.

    Making it does not wait for the other rank; `prepare` does.

    Parameters
    ----------
    device : Device
        Of this rank.
    rank_table : str
        JSON; the same at both ranks, byte by byte.
    rank : int
        0 or 1, as the table says.
    name, buffer_mib, exec_timeout_s
        As of `llm_datadist._hccl.Communicator`.
    memory : RegisteredMemory
        What the other rank may reach, and what bytes are copied into.

    Raises
    ------
    ValueError
        An argument cannot be used, or the installed release has no one-sided transfers.
    HcclError
        HCCL refuses. 20: another communicator is being made on the device.
    """

    def __init__(
        self, Device device not None, str rank_table not None, int rank, str name not None, int buffer_mib,
        int exec_timeout_s, RegisteredMemory memory not None,
    ):
        cdef bytes encoded = rank_table.encode()
        cdef const char *text = encoded
        if b"\0" in encoded or not 0 < len(encoded) < MOST_TABLE_BYTES:
            most = MOST_TABLE_BYTES - 1
            raise ValueError(f"rank table of {len(encoded)} bytes, should have 1 to {most}, none of them 0")
        if memory.device is not device or memory.handle == NULL:
            raise ValueError("the memory is not registered on the device of the communicator")
        _require_one_sided()
        self._make(device, text, rank, name, buffer_mib, exec_timeout_s)
        try:
            self._bind(memory)
        except BaseException:
            self._destroy(monotonic_ns() + LAST_TRY_NS)
            raise

    cdef void _init(
        self, const void *description, HcclCommConfig *config, HcclComm *handle, AclFailure *failure
    ) noexcept nogil:
        note_hccl_failure(
            failure, "HcclCommInitClusterInfoMemConfig",
            self.hccl.HcclCommInitClusterInfoMemConfig(<const char *>description, self.rank, config, handle),
        )

    cdef int _bind(self, RegisteredMemory memory) except -1:
        cdef AclFailure failure
        cdef Scope scope
        cdef aclError entered
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            entered = failure.code
            if entered == ACL_SUCCESS:
                note_hccl_failure(
                    &failure, "HcclCommBindMem", self.hccl.HcclCommBindMem(self.handle, memory.handle)
                )
                self.device.leave(&scope)
        if failure.code != HCCL_SUCCESS:
            raise failure_error(&failure) if entered != ACL_SUCCESS else hccl_failure_error(&failure)
        self._bound = memory
        return 0

    def prepare(self, int timeout_s):
        """Connect with the other rank, which does the same at the same time, and learn what it has bound.

        Parameters
        ----------
        timeout_s : int
            Seconds, >= 1.

        Raises
        ------
        HcclError
            9: the other rank did not come in time; the call may be repeated. Else it cannot be reached.
        ValueError
            `timeout_s` is less than 1, or the communicator was destroyed.
        """
        cdef AclFailure failure
        cdef HcclPrepareConfig config
        cdef Scope scope
        cdef aclError entered
        cdef HcclComm handle = self.handle
        if timeout_s < 1:
            raise ValueError(f"timeout is {timeout_s} s, should be >= 1")
        if handle == NULL:
            raise ValueError("the communicator was destroyed")
        memset(&config, 0, sizeof(config))
        config.topology = FULL_MESH
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            entered = failure.code
            if entered == ACL_SUCCESS:
                note_hccl_failure(&failure, "HcclCommPrepare", self.hccl.HcclCommPrepare(handle, &config, timeout_s))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != HCCL_SUCCESS:
            raise failure_error(&failure) if entered != ACL_SUCCESS else hccl_failure_error(&failure)

    def destroy(self, uint64_t deadline_ns):
        """Unbind the memory and destroy the communicator; as of `llm_datadist._hccl.Communicator` otherwise."""
        _memory = self._bound  # stays registered until the communicator is gone
        return self._unbind(deadline_ns) and self._destroy(deadline_ns)

    cdef bint _unbind(self, uint64_t deadline_ns) noexcept:
        cdef AclFailure failure
        cdef Scope scope
        cdef RegisteredMemory memory = self._bound
        if memory is None or self.handle == NULL or in_forked_child():
            return True
        self._bound = None  # so that nobody else unbinds it
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                while True:
                    note_hccl_failure(
                        &failure, "HcclCommUnbindMem", self.hccl.HcclCommUnbindMem(self.handle, memory.handle)
                    )
                    if failure.code != HCCL_E_AGAIN or monotonic_ns() >= deadline_ns:
                        break
                    usleep(1000)
                self.device.leave(&scope)
        if failure.code != HCCL_SUCCESS:
            self._bound = memory
            self.failure = hccl_failure_error(&failure)
            return False
        return True

    def __dealloc__(self):
        cdef RegisteredMemory _memory = self._bound  # stays registered until the communicator is gone
        cdef uint64_t deadline_ns = monotonic_ns() + LAST_TRY_NS
        if self._unbind(deadline_ns):
            self._destroy(deadline_ns)


cdef int _require_apart(tuple place) except -1:
    # HCCL gives the same handle for the same memory, which the first one to take it back would take from the others.
    device, begin, end = place
    for other, other_begin, other_end in _regions:
        if other == device and begin < other_end and other_begin < end:
            raise ValueError(
                f"[{begin:#x}, {end:#x}) of device {device} overlaps [{other_begin:#x}, {other_end:#x}), which is"
                " registered"
            )
    return 0


cdef int _require_one_sided() except -1:
    if not has_one_sided():
        raise ValueError("the installed release of HCCL has no one-sided transfers")
    return 0
