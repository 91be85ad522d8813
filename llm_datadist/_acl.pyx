"""The ACL runtime of Ascend devices: its functions, and owners of devices, memory, streams and events.

The vendor's library is looked for when an Ascend device is first asked for. Every handle is given back exactly once, with
its device current, from whatever thread drops it; the device itself goes when its last handle is gone.

Whose device is current belongs to the thread, and other libraries of the process depend on it. So everything here leaves
it as it was, and a device is opened and given back on a thread of its own, since the vendor ties both to the calling one.
"""

import os
import threading

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset, strncpy

from llm_datadist._atomics cimport compare_exchange, monotonic_ns, relax, store_release
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._segment cimport Memory
from llm_datadist._shared_library cimport SharedLibrary

from llm_datadist._segment import HUGE_PAGE
from llm_datadist._shared_library import LibraryMissing, VendorError

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *thread, const void *attributes, void *(*body)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)() noexcept nogil)

ctypedef const char *(*VersionFunction)() noexcept nogil

LIBRARIES = ("libacl_rt.so", "libascendcl.so")  # the second one is what older releases have
VARIABLE = "LLM_DATADIST_ACL_LIBRARY"
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"

cdef uint64_t PAGE = HUGE_PAGE

_OUR_TEXTS = {
    ACL_FORKED_CHILD: "this process was forked from one that uses an Ascend device; start it by spawn instead",
    ACL_CLOSED: "it was closed before",
    ACL_EVENT_UNRECORDED: "the event was never recorded",
}


class AclError(VendorError):
    """A function of the ACL runtime failed.

    Attributes
    ----------
    function : str
        Its name.
    code : int
        What it returned; negative for refusals of this library.
    text : str
        What the runtime says about it; may be empty.
    """

    def __init__(self, function, code, text=""):
        super().__init__(function, code, text)
        self.function = function
        self.code = code
        self.text = text

    def __str__(self):
        return f"{self.function} failed with {self.code}" + (f": {self.text}" if self.text else "")


# ---- failures

cdef void note_failure(AclFailure *out, const char *function, aclError code) noexcept nogil:
    cdef const char *text = NULL
    out.function = function
    out.code = code
    if code > 0 and _loaded and not _forked:
        text = _functions.aclGetRecentErrMsg()
    if text == NULL:
        text = ""
    strncpy(out.text, text, sizeof(out.text) - 1)
    out.text[sizeof(out.text) - 1] = 0


cdef object failure_error(AclFailure *failure):
    text = failure.text.decode("utf-8", "replace").strip() or _OUR_TEXTS.get(failure.code, "")
    return AclError(failure.function.decode(), failure.code, text)


cdef object acl_error(str function, aclError code):
    cdef AclFailure failure
    cdef bytes name = function.encode()
    note_failure(&failure, name, code)
    return failure_error(&failure)


cdef void _forget_text() noexcept nogil:
    """Take the text of an expected failure away, so that it is not taken for that of a later one."""
    _functions.aclGetRecentErrMsg()


# ---- the library

cdef AclFunctions _functions
cdef bint _loaded = False
cdef bint _initialised = False
cdef bint _forked = False
cdef SharedLibrary _library = SharedLibrary(LIBRARIES, VARIABLE)
_lock = threading.Lock()  # guards the two steps below
_load_failure = None
_initialise_failure = None


cdef AclFunctions *acl_functions() except NULL:
    global _loaded, _load_failure
    if _loaded:
        return &_functions
    with _lock:
        if not _loaded:
            if _load_failure is None:
                try:
                    _library.open()
                    _find_process_functions(_library, &_functions)
                    _find_task_functions(_library, &_functions)
                    _find_memory_functions(_library, &_functions)
                except LibraryMissing as error:
                    _load_failure = (error.names, error.attempts, error.symbol)
            if _load_failure is not None:
                raise LibraryMissing(*_load_failure)
            _loaded = True
    return &_functions


cdef int _find_process_functions(SharedLibrary library, AclFunctions *f) except -1:
    library.require("aclInit", <void **>&f.aclInit)
    library.require("aclGetRecentErrMsg", <void **>&f.aclGetRecentErrMsg)
    library.require("aclrtGetSocName", <void **>&f.aclrtGetSocName)
    library.accept("aclsysGetVersionStr", <void **>&f.aclsysGetVersionStr)
    library.require("aclrtGetDeviceCount", <void **>&f.aclrtGetDeviceCount)
    library.require("aclrtSetDevice", <void **>&f.aclrtSetDevice)
    library.require("aclrtResetDevice", <void **>&f.aclrtResetDevice)
    library.require("aclrtGetCurrentContext", <void **>&f.aclrtGetCurrentContext)
    library.require("aclrtSetCurrentContext", <void **>&f.aclrtSetCurrentContext)
    library.accept("aclrtGetPhyDevIdByUserDevId", <void **>&f.aclrtGetPhyDevIdByUserDevId)
    if f.aclrtGetPhyDevIdByUserDevId == NULL:  # the older name, for the same number
        library.require("aclrtGetPhyDevIdByLogicDevId", <void **>&f.aclrtGetPhyDevIdByLogicDevId)
    library.accept("aclrtGetDeviceInfo", <void **>&f.aclrtGetDeviceInfo)
    library.accept("aclrtDeviceCanAccessPeer", <void **>&f.aclrtDeviceCanAccessPeer)
    library.accept("aclrtDeviceGetBareTgid", <void **>&f.aclrtDeviceGetBareTgid)
    return 0


cdef int _find_task_functions(SharedLibrary library, AclFunctions *f) except -1:
    library.require("aclrtCreateStream", <void **>&f.aclrtCreateStream)
    library.accept("aclrtCreateStreamWithConfig", <void **>&f.aclrtCreateStreamWithConfig)
    library.require("aclrtDestroyStream", <void **>&f.aclrtDestroyStream)
    library.require("aclrtDestroyStreamForce", <void **>&f.aclrtDestroyStreamForce)
    library.require("aclrtSynchronizeStreamWithTimeout", <void **>&f.aclrtSynchronizeStreamWithTimeout)
    library.require("aclrtStreamAbort", <void **>&f.aclrtStreamAbort)
    library.require("aclrtStreamWaitEvent", <void **>&f.aclrtStreamWaitEvent)
    library.accept("aclrtCreateEventExWithFlag", <void **>&f.aclrtCreateEventExWithFlag)
    library.require("aclrtCreateEventWithFlag", <void **>&f.aclrtCreateEventWithFlag)
    library.require("aclrtDestroyEvent", <void **>&f.aclrtDestroyEvent)
    library.require("aclrtRecordEvent", <void **>&f.aclrtRecordEvent)
    library.accept("aclrtResetEvent", <void **>&f.aclrtResetEvent)
    library.require("aclrtQueryEventStatus", <void **>&f.aclrtQueryEventStatus)
    library.require("aclrtSynchronizeEventWithTimeout", <void **>&f.aclrtSynchronizeEventWithTimeout)
    return 0


cdef int _find_memory_functions(SharedLibrary library, AclFunctions *f) except -1:
    library.require("aclrtMalloc", <void **>&f.aclrtMalloc)
    library.accept("aclrtMallocAlign32", <void **>&f.aclrtMallocAlign32)
    library.require("aclrtFree", <void **>&f.aclrtFree)
    library.require("aclrtMallocHost", <void **>&f.aclrtMallocHost)
    library.require("aclrtFreeHost", <void **>&f.aclrtFreeHost)
    library.require("aclrtGetMemInfo", <void **>&f.aclrtGetMemInfo)
    library.accept("aclrtPointerGetAttributes", <void **>&f.aclrtPointerGetAttributes)
    library.accept("aclrtMemGetAddressRange", <void **>&f.aclrtMemGetAddressRange)
    library.require("aclrtMemcpy", <void **>&f.aclrtMemcpy)
    library.require("aclrtMemcpyAsync", <void **>&f.aclrtMemcpyAsync)
    library.accept("aclrtIpcMemGetExportKey", <void **>&f.aclrtIpcMemGetExportKey)
    library.accept("aclrtIpcMemSetImportPid", <void **>&f.aclrtIpcMemSetImportPid)
    library.accept("aclrtIpcMemImportByKey", <void **>&f.aclrtIpcMemImportByKey)
    library.accept("aclrtIpcMemClose", <void **>&f.aclrtIpcMemClose)
    return 0


cdef void *acl_symbol(const char *name) except? NULL:
    acl_functions()
    with _lock:
        return _library.find(name)


cdef bint in_forked_child() noexcept nogil:
    return _forked


cdef void _after_fork() noexcept nogil:
    global _forked
    _forked = _initialised


pthread_atfork(NULL, NULL, _after_fork)


def load():
    """Find the library; gives the paths of its files and the names of optional functions that they lack.

    Raises
    ------
    LibraryMissing
        There is none, or it lacks a function that is needed.
    """
    acl_functions()
    return tuple(_library.paths), tuple(_library.missing)


def simulator():
    """Version of the simulator that stands in for the vendor's library; None where it is the vendor's."""
    cdef VersionFunction version = <VersionFunction>acl_symbol("llmdd_sim_version")
    return version().decode() if version != NULL else None


def version_of(str package not None):
    """Version of an installed package of the vendor, such as ``driver``; None if it is not known."""
    cdef AclFunctions *acl = acl_functions()
    cdef bytes name = package.encode()
    cdef char *wanted = name
    cdef char version[128]
    cdef aclError code
    memset(version, 0, sizeof(version))
    if acl.aclsysGetVersionStr == NULL or _forked:
        return None
    with nogil:
        code = acl.aclsysGetVersionStr(wanted, version)
        if code != ACL_SUCCESS:
            _forget_text()
    return version[:].decode("utf-8", "replace").rstrip("\0") if code == ACL_SUCCESS else None


def initialise():
    """Start the runtime in this process, once; somebody else may have done so before. It is never ended.

    Raises
    ------
    LibraryMissing
        There is no library.
    AclError
        It cannot start; for instance, there is no driver.
    """
    global _initialised, _initialise_failure
    cdef AclFunctions *acl = acl_functions()
    cdef AclFailure failure
    cdef aclError code
    if _forked:
        raise acl_error("aclInit", ACL_FORKED_CHILD)
    if _initialised:
        return
    with _lock:
        if not _initialised and _initialise_failure is None:
            with nogil:
                code = acl.aclInit(NULL)
                note_failure(&failure, "aclInit", code)
            if code != ACL_SUCCESS and code != ACL_ERROR_REPEAT_INITIALIZE:
                _initialise_failure = failure_error(&failure).args
            else:
                _initialised = True
    if not _initialised:
        raise AclError(*_initialise_failure)


def device_count():
    """Count the devices that this process sees; starts the runtime."""
    initialise()
    cdef AclFunctions *acl = acl_functions()
    cdef AclFailure failure
    cdef uint32_t count = 0
    with nogil:
        note_failure(&failure, "aclrtGetDeviceCount", acl.aclrtGetDeviceCount(&count))
    if failure.code != ACL_SUCCESS:
        raise _with_visible_devices(&failure)
    return count


cdef object _with_visible_devices(AclFailure *failure):
    error = failure_error(failure)
    visible = os.environ.get(VISIBLE_DEVICES)
    sees = "is not set" if visible is None else f"is {visible!r}"
    return AclError(error.function, error.code, f"{error.text} ({VISIBLE_DEVICES} {sees})".strip())


# ---- a device

# What the thread that opens a device, or gives it back, is told and what it finds out.
cdef struct Errand:
    int32_t device_id
    aclrtContext context
    AclFailure failure


cdef void *_open_device(void *argument) noexcept nogil:
    cdef Errand *errand = <Errand *>argument
    note_failure(&errand.failure, "aclrtSetDevice", _functions.aclrtSetDevice(errand.device_id))
    if errand.failure.code != ACL_SUCCESS:
        return NULL
    note_failure(&errand.failure, "aclrtGetCurrentContext", _functions.aclrtGetCurrentContext(&errand.context))
    if errand.failure.code != ACL_SUCCESS:
        _functions.aclrtResetDevice(errand.device_id)
    return NULL


cdef void *_reset_device(void *argument) noexcept nogil:
    cdef Errand *errand = <Errand *>argument
    note_failure(&errand.failure, "aclrtResetDevice", _functions.aclrtResetDevice(errand.device_id))
    return NULL


cdef int _run_errand(void *(*body)(void *) noexcept nogil, Errand *errand) noexcept:
    """Run it on a thread of its own; gives 0, or the errno of a thread that cannot be made."""
    cdef pthread_t thread
    cdef int failed
    with nogil:
        failed = pthread_create(&thread, NULL, body, errand)
        if not failed:
            pthread_join(thread, NULL)
    return failed


@cython.final
cdef class Device:
    """A device that is open in this process; everything that is made on it refers to it.

    Parameters
    ----------
    device_id : int
        Index among the devices that this process sees.

    Attributes
    ----------
    physical_id : int
        Number of the device on its server.
    soc_name : str
        Product, such as ``Ascend910B3``.

    Raises
    ------
    LibraryMissing
        The vendor's library is not there.
    AclError
        There is no such device, or it does not open.
    """

    def __init__(self, int device_id):
        cdef Errand errand
        cdef int failed
        cdef const char *name
        if self._open:
            raise ValueError("the device is open already")
        initialise()
        self.acl = acl_functions()
        self.device_id = device_id
        errand.device_id = device_id
        failed = _run_errand(_open_device, &errand)
        if failed:
            raise OSError(failed, f"{os.strerror(failed)}: cannot start a thread that opens the device")
        if errand.failure.code != ACL_SUCCESS:
            raise _with_visible_devices(&errand.failure)
        self._context = errand.context
        self._open = True
        with nogil:
            name = self.acl.aclrtGetSocName()
        self.soc_name = name.decode("utf-8", "replace") if name != NULL else ""
        self.physical_id = self._find_physical_id()

    cdef int _find_physical_id(self) except? -1:
        cdef AclFailure failure
        cdef int32_t number = 0
        with nogil:
            if self.acl.aclrtGetPhyDevIdByUserDevId != NULL:
                note_failure(
                    &failure, "aclrtGetPhyDevIdByUserDevId",
                    self.acl.aclrtGetPhyDevIdByUserDevId(self.device_id, &number),
                )
            else:
                note_failure(
                    &failure, "aclrtGetPhyDevIdByLogicDevId",
                    self.acl.aclrtGetPhyDevIdByLogicDevId(self.device_id, &number),
                )
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return number

    cdef aclError enter(self, Scope *scope) noexcept nogil:
        cdef aclError code
        scope.previous = NULL
        scope.changed = False
        if _forked:
            return ACL_FORKED_CHILD
        if not self._open:
            return ACL_CLOSED
        if self.acl.aclrtGetCurrentContext(&scope.previous) != ACL_SUCCESS:
            scope.previous = NULL
            _forget_text()
        if scope.previous == self._context:
            return ACL_SUCCESS
        code = self.acl.aclrtSetCurrentContext(self._context)
        scope.changed = code == ACL_SUCCESS
        return code

    cdef void leave(self, Scope *scope) noexcept nogil:
        # The runtime has no way to make nothing current.
        if scope.changed and scope.previous != NULL:
            if self.acl.aclrtSetCurrentContext(scope.previous) != ACL_SUCCESS:
                _forget_text()  # its owner closed it

    cdef int _hold(self) except -1:
        if _forked:
            raise acl_error("aclrtSetCurrentContext", ACL_FORKED_CHILD)
        if not self._open or self._closing:
            raise acl_error("aclrtSetCurrentContext", ACL_CLOSED)
        self._users += 1
        return 0

    cdef void _drop(self) noexcept:
        self._users -= 1
        if self._closing and self._users == 0:
            self._give_back()

    cdef void _give_back(self) noexcept:
        cdef Errand errand
        if not self._open or _forked:
            return
        self._open = False
        errand.device_id = self.device_id
        _run_errand(_reset_device, &errand)

    def current(self):
        """Make the device current on the calling thread in a ``with`` statement."""
        return _Current(self)

    def memory_info(self):
        """Free and total memory of the device, in bytes.

        Raises
        ------
        AclError
            The device does not tell, or is closed.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef size_t free = 0
        cdef size_t total = 0
        self._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtGetMemInfo", self.acl.aclrtGetMemInfo(ACL_HBM_MEM, &free, &total))
                self.leave(&scope)
        self._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return free, total

    @property
    def simulator(self):
        """Version of the simulator that stands in for the device; None for a real one."""
        return simulator()

    def close(self):
        """Give the device back: now, or when the last thing that was made on it is gone. May be called twice."""
        self._closing = True
        if self._users == 0:
            self._give_back()

    def __dealloc__(self):
        self._give_back()


cdef class _Current:
    cdef Device _device
    cdef Scope _scope
    cdef bint _entered

    def __init__(self, Device device not None):
        self._device = device

    def __enter__(self):
        self._device._hold()
        cdef aclError code = self._device.enter(&self._scope)
        if code != ACL_SUCCESS:
            error = acl_error("aclrtSetCurrentContext", code)
            self._device._drop()
            raise error
        return self._device

    def __exit__(self, *_):
        self._device.leave(&self._scope)
        self._device._drop()


# ---- memory

# The ranges that this library has taken on devices, for releases that cannot tell what an address belongs to.
cdef struct Range:
    uint64_t begin
    uint64_t end

cdef enum:
    MOST_RANGES = 1024

cdef Range _ranges[MOST_RANGES]
cdef int _num_ranges = 0  # behind it nothing was ever written
cdef uint64_t _ranges_lock = 0


cdef void _lock_ranges() noexcept nogil:
    while not compare_exchange(&_ranges_lock, 0, 1):
        relax()


cdef bint _remember_range(uint64_t begin, uint64_t end) noexcept nogil:
    """Replace nothing by a range; False if there are too many."""
    return _exchange_range(0, 0, begin, end)


cdef bint _exchange_range(uint64_t old, uint64_t old_end, uint64_t begin, uint64_t end) noexcept nogil:
    global _num_ranges
    cdef bint found = False
    cdef int i
    _lock_ranges()
    for i in range(MOST_RANGES):
        if _ranges[i].begin == old and _ranges[i].end == old_end:
            _ranges[i].begin = begin
            _ranges[i].end = end
            _num_ranges = max(_num_ranges, i + 1)
            found = True
            break
    store_release(&_ranges_lock, 0)
    return found


cdef bint _is_in_ranges(uint64_t address) noexcept nogil:
    cdef bint found = False
    cdef int i
    _lock_ranges()
    for i in range(_num_ranges):
        if _ranges[i].begin <= address < _ranges[i].end:
            found = True
            break
    store_release(&_ranges_lock, 0)
    return found


cdef int _location(uint64_t address) noexcept nogil:
    """Give the type of a location, or -1 if the runtime does not tell."""
    cdef aclrtPtrAttributes attributes
    memset(&attributes, 0, sizeof(attributes))
    if _functions.aclrtPointerGetAttributes(<const void *>address, &attributes) != ACL_SUCCESS:
        _forget_text()
        return -1
    return attributes.location.type


cdef bint is_device_memory(uint64_t address) noexcept nogil:
    if _is_in_ranges(address):
        return True  # most that is asked for, and sooner than the runtime tells
    if _functions.aclrtPointerGetAttributes == NULL:
        return False
    return _location(address) == ACL_MEM_LOCATION_TYPE_DEVICE


cdef bint is_pinned_memory(uint64_t address, uint64_t nbytes) noexcept nogil:
    if _functions.aclrtPointerGetAttributes == NULL or nbytes == 0:
        return False
    return (
        _location(address) == ACL_MEM_LOCATION_TYPE_HOST
        and _location(address + nbytes - 1) == ACL_MEM_LOCATION_TYPE_HOST
    )


@cython.final
@cython.no_gc_clear
cdef class DeviceMemory(Memory):
    """Memory of a device, large and meant to be reached by other devices: a pool.

    It begins at a boundary of 2 MiB and has whole pages of 2 MiB, since it is shared with other processes by pages. What
    it holds at first is not defined.

    Parameters
    ----------
    device : Device
    nbytes : int
        Bytes, > 0; rounded up to whole pages.

    Raises
    ------
    ValueError
        `nbytes` is 0.
    AclError
        The device has no room: 207001.
    """

    def __init__(self, Device device not None, uint64_t nbytes):
        cdef AclFailure failure
        cdef Scope scope
        if nbytes == 0:
            raise ValueError("size of device memory is 0 bytes, should be > 0")
        if nbytes > <uint64_t>1 << 62:
            raise ValueError(f"size of device memory is {nbytes} bytes, should be <= 2**62")
        device._hold()
        self.device = device
        cdef uint64_t size = (nbytes + PAGE - 1) // PAGE * PAGE
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self._block = _take_pages(device.acl, size, &failure)
                device.leave(&scope)
        if self._block == NULL:
            self.device = None
            device._drop()
            raise failure_error(&failure)
        self.base = (<uint64_t>self._block + PAGE - 1) // PAGE * PAGE
        self.size = size
        self.writable = True
        if not _remember_range(self.base, self.base + size) and device.acl.aclrtPointerGetAttributes == NULL:
            self._free(&failure)
            raise MemoryError(f"more than {MOST_RANGES} pieces of device memory in one process")

    cdef void _free(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef void *block = self._block
        failure.code = ACL_SUCCESS
        if block == NULL or _forked:
            return
        _exchange_range(self.base, self.base + self.size, 0, 0)
        self._block = NULL
        self.base = 0
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtFree", device.acl.aclrtFree(block))
                device.leave(&scope)
        device._drop()

    def close(self):
        """Give the memory back; nothing that was enqueued may still use it. May be called twice.

        Raises
        ------
        AclError
            The runtime refuses, for instance because the device was lost.
        """
        cdef AclFailure failure
        self._free(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._free(&failure)


cdef void *_take_pages(AclFunctions *acl, uint64_t size, AclFailure *failure) noexcept nogil:
    """Take memory that holds `size` bytes from a page boundary on."""
    cdef void *block = _take(acl, size, failure)
    if <uint64_t>block % PAGE == 0:  # also when there was none
        return block
    # More than 64 bytes of alignment is not promised. Give it back first: there may be no room for both.
    acl.aclrtFree(block)
    return _take(acl, size + PAGE, failure)


cdef void *_take(AclFunctions *acl, uint64_t size, AclFailure *failure) noexcept nogil:
    # Peers reach the memory through their own devices, for which the P2P kind is meant; where a product has none of it,
    # or not enough, ordinary memory serves the transfers that the process carries out itself.
    cdef void *block = NULL
    cdef int32_t policy = ACL_MEM_MALLOC_HUGE_FIRST_P2P
    while True:
        block = NULL
        if acl.aclrtMallocAlign32 != NULL:
            note_failure(failure, "aclrtMallocAlign32", acl.aclrtMallocAlign32(&block, size, policy))
        else:
            note_failure(failure, "aclrtMalloc", acl.aclrtMalloc(&block, size, policy))
        if failure.code == ACL_SUCCESS:
            return block
        if policy == ACL_MEM_MALLOC_HUGE_FIRST:
            return NULL
        policy = ACL_MEM_MALLOC_HUGE_FIRST


@cython.final
@cython.no_gc_clear
cdef class PinnedMemory(Memory):
    """Memory of the host that stays where it is, so that a device copies from and to it by itself.

    It supports the buffer protocol, writable. `close` gives it back once the last buffer is released.

    Parameters
    ----------
    device : Device
        The device that copies.
    nbytes : int
        Bytes, > 0.

    Raises
    ------
    ValueError
        `nbytes` is 0.
    AclError
        The host has no memory for it.
    """

    def __init__(self, Device device not None, uint64_t nbytes):
        cdef AclFailure failure
        cdef Scope scope
        cdef void *block = NULL
        if not 0 < nbytes < <uint64_t>1 << 62:
            raise ValueError(f"size of pinned memory is {nbytes} bytes, should be in [1, 2**62)")
        device._hold()
        self.device = device
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtMallocHost", device.acl.aclrtMallocHost(&block, nbytes))
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)
        self.base = <uint64_t>block
        self.size = nbytes
        self.writable = True

    cdef void _free(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef void *block = <void *>self.base
        failure.code = ACL_SUCCESS
        if block == NULL or _forked:
            return
        self.base = 0
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtFreeHost", device.acl.aclrtFreeHost(block))
                device.leave(&scope)
        device._drop()

    def close(self):
        """Give the memory back as soon as no buffer refers to it; may be called twice."""
        cdef AclFailure failure
        self._closed = True
        if self._exports != 0:
            return
        self._free(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self._closed or self.base == 0:
            raise BufferError("pinned memory is closed")
        PyBuffer_FillInfo(buffer, self, <void *>self.base, <Py_ssize_t>self.size, False, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        cdef AclFailure failure
        self._exports -= 1
        if self._exports == 0 and self._closed:
            self._free(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._free(&failure)


# ---- streams and events

cdef int32_t _slice_ms(const Gate *gate) noexcept nogil:
    """How long to wait at a stretch: never 0, whose meaning is not documented, and never without a limit."""
    cdef uint64_t now = monotonic_ns()
    cdef uint64_t left = (gate.deadline_ns - now + 999999) // 1000000 if gate.deadline_ns > now else 1
    return <int32_t>min(left, <uint64_t>ACL_SLICE_MS)


cdef Gate _until(uint64_t deadline_ns) noexcept nogil:
    cdef Gate gate
    gate.deadline_ns = deadline_ns
    gate.peer_dead = gate.revoked = gate.closing = NULL
    return gate


@cython.final
@cython.no_gc_clear
cdef class Stream:
    """A queue of tasks of a device, which run in order and beside those of other streams.

    Parameters
    ----------
    device : Device

    Raises
    ------
    AclError
        The device has no more streams: 207008.
    """

    def __init__(self, Device device not None):
        cdef AclFailure failure
        cdef Scope scope
        device._hold()
        self.device = device
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self.handle = _new_stream(device.acl, &failure)
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)

    cdef aclError wait(self, const Gate *gate) noexcept nogil:
        cdef aclError code
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        while True:
            code = self.device.acl.aclrtSynchronizeStreamWithTimeout(self.handle, _slice_ms(gate))
            if code != ACL_ERROR_RT_STREAM_SYNC_TIMEOUT or stopped(gate) or monotonic_ns() >= gate.deadline_ns:
                return code

    cdef aclError abort(self) noexcept nogil:
        cdef aclError code
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_SUCCESS
        code = self.device.acl.aclrtStreamAbort(self.handle)
        if code == ACL_SUCCESS:
            self.aborted = True
        return code

    cdef void _destroy(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef aclrtStream handle = self.handle
        failure.code = ACL_SUCCESS
        if handle == NULL or _forked:
            return
        self.handle = NULL
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                _destroy_stream(device.acl, handle, self.aborted, failure)
                device.leave(&scope)
        device._drop()

    def synchronise(self, uint64_t deadline_ns):
        """Wait until all tasks have taken effect.

        Parameters
        ----------
        deadline_ns : int
            On the clock of ``time.monotonic_ns``.

        Raises
        ------
        AclError
            507046: the deadline passed, tasks may still write. Any other code: the first error of a task.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef Gate gate = _until(deadline_ns)
        self.device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtSynchronizeStreamWithTimeout", self.wait(&gate))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def close(self):
        """Destroy the stream; tasks that are left are dropped. May be called twice.

        Raises
        ------
        AclError
            The runtime refuses, for instance because the device was lost.
        """
        cdef AclFailure failure
        self._destroy(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._destroy(&failure)


cdef void _destroy_stream(AclFunctions *acl, aclrtStream stream, bint aborted, AclFailure *failure) noexcept nogil:
    # The ordinary way waits without a limit, so it is for a stream that has nothing to do.
    if not aborted:
        if acl.aclrtSynchronizeStreamWithTimeout(stream, 1) == ACL_SUCCESS:
            note_failure(failure, "aclrtDestroyStream", acl.aclrtDestroyStream(stream))
            return
        acl.aclrtStreamAbort(stream)
        _forget_text()
    note_failure(failure, "aclrtDestroyStreamForce", acl.aclrtDestroyStreamForce(stream))


cdef aclrtStream _new_stream(AclFunctions *acl, AclFailure *failure) noexcept nogil:
    cdef aclrtStream stream = NULL
    if acl.aclrtCreateStreamWithConfig != NULL:
        # Resources are taken now and not at the first launch, and a wait polls: both shorten a transfer.
        if acl.aclrtCreateStreamWithConfig(&stream, 0, ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC) == ACL_SUCCESS:
            failure.code = ACL_SUCCESS
            return stream
        stream = NULL
        _forget_text()
    note_failure(failure, "aclrtCreateStream", acl.aclrtCreateStream(&stream))
    return stream


@cython.final
@cython.no_gc_clear
cdef class Event:
    """A mark in a stream, which others wait for. It may be recorded again and again.

    One thread records it, and nobody may wait for an earlier record then.

    Parameters
    ----------
    device : Device

    Raises
    ------
    AclError
        The device has no more events: 207007.
    """

    def __init__(self, Device device not None):
        cdef AclFailure failure
        cdef Scope scope
        device._hold()
        self.device = device
        self.reusable = device.acl.aclrtCreateEventExWithFlag != NULL
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                self.handle = _new_event(device.acl, &failure)
                device.leave(&scope)
        if failure.code != ACL_SUCCESS:
            self.device = None
            device._drop()
            raise failure_error(&failure)

    cdef aclError record(self, Stream stream) noexcept nogil:
        cdef aclError code
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL or stream.handle == NULL:
            return ACL_CLOSED
        if self._recorded and not self.reusable:
            code = self._reset(stream)
            if code != ACL_SUCCESS:
                return code
        code = self.device.acl.aclrtRecordEvent(self.handle, stream.handle)
        if code == ACL_SUCCESS:
            self._recorded = True
        return code

    cdef aclError _reset(self, Stream stream) noexcept nogil:
        """Make an event of the older kind as good as new: behind what is on the stream, or by another one."""
        cdef AclFailure failure
        cdef aclrtEvent old = self.handle
        if self.device.acl.aclrtResetEvent != NULL:
            return self.device.acl.aclrtResetEvent(self.handle, stream.handle)
        self.handle = _new_event(self.device.acl, &failure)
        if failure.code != ACL_SUCCESS:
            self.handle = old
            return failure.code
        return self.device.acl.aclrtDestroyEvent(old)  # it may be destroyed before it is complete

    cdef aclError make_wait(self, Stream stream) noexcept nogil:
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL or stream.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        return self.device.acl.aclrtStreamWaitEvent(stream.handle, self.handle)

    cdef aclError wait(self, const Gate *gate) noexcept nogil:
        cdef aclError code
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        while True:
            code = self.device.acl.aclrtSynchronizeEventWithTimeout(self.handle, _slice_ms(gate))
            if code != ACL_ERROR_RT_EVENT_SYNC_TIMEOUT or stopped(gate) or monotonic_ns() >= gate.deadline_ns:
                return code

    cdef aclError query(self, bint *complete) noexcept nogil:
        cdef int32_t status = ACL_EVENT_RECORDED_STATUS_NOT_READY
        cdef aclError code
        complete[0] = False
        if _forked:
            return ACL_FORKED_CHILD
        if self.handle == NULL:
            return ACL_CLOSED
        if not self._recorded:
            return ACL_EVENT_UNRECORDED
        code = self.device.acl.aclrtQueryEventStatus(self.handle, &status)
        complete[0] = code == ACL_SUCCESS and status == ACL_EVENT_RECORDED_STATUS_COMPLETE
        return code

    cdef void _destroy(self, AclFailure *failure) noexcept:
        cdef Device device = self.device
        cdef Scope scope
        cdef aclrtEvent handle = self.handle
        failure.code = ACL_SUCCESS
        if handle == NULL or _forked:
            return
        self.handle = NULL
        with nogil:
            note_failure(failure, "aclrtSetCurrentContext", device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(failure, "aclrtDestroyEvent", device.acl.aclrtDestroyEvent(handle))
                device.leave(&scope)
        device._drop()

    def mark(self, Stream stream not None):
        """Record the event behind what is on a stream now."""
        cdef AclFailure failure
        cdef Scope scope
        self.device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtRecordEvent", self.record(stream))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def hold_up(self, Stream stream not None):
        """Let what comes next on a stream wait for the event."""
        cdef AclFailure failure
        cdef Scope scope
        self.device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtStreamWaitEvent", self.make_wait(stream))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def synchronise(self, uint64_t deadline_ns):
        """Wait until the event is complete; the deadline is on the clock of ``time.monotonic_ns``.

        Raises
        ------
        AclError
            507047: the deadline passed. A negative code: the event was never recorded, or is closed.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef Gate gate = _until(deadline_ns)
        self.device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtSynchronizeEventWithTimeout", self.wait(&gate))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    @property
    def complete(self):
        """Whether everything before the latest record has taken effect."""
        cdef AclFailure failure
        cdef Scope scope
        cdef bint complete = False
        self.device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtQueryEventStatus", self.query(&complete))
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return complete

    def close(self):
        """Destroy the event, also before it is complete; may be called twice."""
        cdef AclFailure failure
        self._destroy(&failure)
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)

    def __dealloc__(self):
        cdef AclFailure failure
        self._destroy(&failure)


cdef aclrtEvent _new_event(AclFunctions *acl, AclFailure *failure) noexcept nogil:
    cdef aclrtEvent event = NULL
    if acl.aclrtCreateEventExWithFlag != NULL:
        note_failure(failure, "aclrtCreateEventExWithFlag", acl.aclrtCreateEventExWithFlag(&event, ACL_EVENT_SYNC))
    else:
        note_failure(failure, "aclrtCreateEventWithFlag", acl.aclrtCreateEventWithFlag(&event, ACL_EVENT_SYNC))
    return event
