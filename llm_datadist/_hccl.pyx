"""HCCL, the communication between Ascend devices: its functions, and communicators of two ranks.

The libraries are looked for when the first link over HCCL is made. They come in two files that are versioned apart;
older releases have everything in one of them.
"""

import os
import threading

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

from llm_datadist._acl cimport (
    ACL_SUCCESS, AclFailure, Device, Scope, aclError, acl_functions, failure_error, in_forked_child, note_failure,
)
from llm_datadist._atomics cimport monotonic_ns
from llm_datadist._shared_library cimport SharedLibrary

from llm_datadist._shared_library import CallFailed, LibraryMissing

cdef extern from "unistd.h" nogil:
    int usleep(unsigned microseconds)

COMMUNICATOR_VARIABLE = "LLM_DATADIST_HCOMM_LIBRARY"
OPERATOR_VARIABLE = "LLM_DATADIST_HCCL_LIBRARY"
ROOT_INFO_BYTES = sizeof(HcclRootInfo)

# A peer that is gone is known after 7 tries of 4.096 us * 2^15, about 0.9 s, where the vendor's default takes 30 s.
_RDMA_TIMEOUT = "HCCL_RDMA_TIMEOUT"
_RDMA_TRIES = "HCCL_RDMA_RETRY_CNT"
_CONNECT_TIMEOUT = "HCCL_CONNECT_TIMEOUT"  # seconds
_DEFAULTS = {_RDMA_TIMEOUT: "15", _CONNECT_TIMEOUT: "120"}

cdef uint64_t LAST_TRY_NS = 2000000000  # of a destructor, which has no deadline of its caller


class HcclError(CallFailed):
    """A function of HCCL failed; the text is that of HCCL and of the ACL runtime."""


cdef void note_hccl_failure(AclFailure *out, const char *function, HcclResult code) noexcept nogil:
    cdef const char *meaning = NULL
    cdef const char *between = ""
    cdef AclFailure runtime
    if code <= 0 or in_forked_child():
        out.function = function
        out.code = code
        out.text[0] = 0
        return
    note_failure(&runtime, function, code)  # first: HCCL may call the runtime
    if _functions.HcclGetErrorString != NULL:
        meaning = _functions.HcclGetErrorString(code)
    if meaning == NULL:
        meaning = ""
    elif runtime.text[0] != 0:
        between = ": "
    out.function = function
    out.code = code
    snprintf(out.text, sizeof(out.text), "%.100s%s%.400s", meaning, between, <const char *>runtime.text)


cdef object hccl_failure_error(AclFailure *failure):
    text = failure.text.decode("utf-8", "replace").strip()
    if failure.code == HCCL_CLOSED:
        text = "the communicator was destroyed"
    return HcclError(failure.function.decode(), failure.code, text)


# ---- the libraries

cdef HcclFunctions _functions
cdef bint _loaded = False
cdef SharedLibrary _communicators = SharedLibrary(("libhcomm.so", "libhccl.so"), COMMUNICATOR_VARIABLE)
cdef SharedLibrary _operators = SharedLibrary(("libhccl.so",), OPERATOR_VARIABLE)
_lock = threading.Lock()
_load_failure = None


cdef HcclFunctions *hccl_functions() except NULL:
    global _loaded, _load_failure
    if _loaded:
        return &_functions
    acl_functions()  # what HCCL is built on, from the same installation
    with _lock:
        if not _loaded:
            if _load_failure is None:
                try:
                    _communicators.open()
                    _operators.open()
                    _find_two_sided_functions(&_functions)
                    _find_one_sided_functions(&_functions)
                except LibraryMissing as error:
                    _load_failure = (error.names, error.attempts, error.symbol)
            if _load_failure is not None:
                raise LibraryMissing(*_load_failure)
            _loaded = True
    return &_functions


cdef int _find_two_sided_functions(HcclFunctions *f) except -1:
    _communicators.require("HcclGetRootInfo", <void **>&f.HcclGetRootInfo)
    _communicators.require("HcclCommInitRootInfoConfig", <void **>&f.HcclCommInitRootInfoConfig)
    _communicators.require("HcclCommDestroy", <void **>&f.HcclCommDestroy)
    _communicators.require("HcclGetCommAsyncError", <void **>&f.HcclGetCommAsyncError)
    _communicators.accept("HcclGetRankSize", <void **>&f.HcclGetRankSize)
    _communicators.accept("HcclGetRankId", <void **>&f.HcclGetRankId)
    _communicators.accept("HcclGetCommName", <void **>&f.HcclGetCommName)
    _communicators.accept("HcclConfigGetInfo", <void **>&f.HcclConfigGetInfo)
    _communicators.accept("HcclGetErrorString", <void **>&f.HcclGetErrorString)
    _operators.require("HcclSend", <void **>&f.HcclSend)
    _operators.require("HcclRecv", <void **>&f.HcclRecv)
    _operators.accept("HcclBatchSendRecv", <void **>&f.HcclBatchSendRecv)
    return 0


cdef int _find_one_sided_functions(HcclFunctions *f) except -1:
    _communicators.accept("HcclCommInitClusterInfoMemConfig", <void **>&f.HcclCommInitClusterInfoMemConfig)
    _communicators.accept("HcclRegisterGlobalMem", <void **>&f.HcclRegisterGlobalMem)
    _communicators.accept("HcclDeregisterGlobalMem", <void **>&f.HcclDeregisterGlobalMem)
    _communicators.accept("HcclCommBindMem", <void **>&f.HcclCommBindMem)
    _communicators.accept("HcclCommUnbindMem", <void **>&f.HcclCommUnbindMem)
    _communicators.accept("HcclCommPrepare", <void **>&f.HcclCommPrepare)
    _communicators.accept("HcclBatchGet", <void **>&f.HcclBatchGet)
    return 0


cdef bint has_one_sided() except -1:
    cdef HcclFunctions *f = hccl_functions()
    return (
        f.HcclCommInitClusterInfoMemConfig != NULL and f.HcclRegisterGlobalMem != NULL
        and f.HcclDeregisterGlobalMem != NULL and f.HcclCommBindMem != NULL and f.HcclCommUnbindMem != NULL
        and f.HcclCommPrepare != NULL and f.HcclBatchGet != NULL
    )


def load():
    """Find the libraries; gives the paths of their files and the names of optional functions that they lack.

    Raises
    ------
    LibraryMissing
        There is none, or it lacks a function that is needed.
    """
    hccl_functions()
    return tuple(_communicators.paths + _operators.paths), tuple(_communicators.missing + _operators.missing)


def batched():
    """Whether the installed release takes several sends and receives in one call; raises `LibraryMissing`."""
    return hccl_functions().HcclBatchSendRecv != NULL


def one_sided():
    """Tell whether the installed release has all functions of one-sided transfers."""
    return has_one_sided()


def sets_defaults(double deadline_s):
    """Set the waits of HCCL in the environment, where the user has not; before its first use, since it looks only once.

    Parameters
    ----------
    deadline_s : float
        How long a transfer may take, in seconds.

    Returns
    -------
    list of str
        What is to be warned of: waits that the user has chosen longer than that.
    """
    warnings = []
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    exponent = _number(_RDMA_TIMEOUT, 20)
    tries = _number(_RDMA_TRIES, 7)
    seconds = 4.096e-6 * 2 ** min(exponent, 63) * tries
    if os.environ[_RDMA_TIMEOUT] != _DEFAULTS[_RDMA_TIMEOUT] and seconds > deadline_s:
        warnings.append(
            f"{_RDMA_TIMEOUT}={exponent} with {tries} tries lets HCCL wait {seconds:.1f} s for a peer that is gone,"
            f" longer than a transfer may take ({deadline_s:g} s)"
        )
    connect = _number(_CONNECT_TIMEOUT, 120)
    if connect > max(deadline_s, 120):
        warnings.append(
            f"{_CONNECT_TIMEOUT}={connect} lets HCCL wait {connect} s for a peer that does not come; until then no"
            " other link can be made on the device"
        )
    return warnings


cdef object _number(str variable, object default):
    """Value of a variable as HCCL would read it: a number that is none is replaced by the default."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdecimal() else default


# ---- communicators

_creating = set()  # ids of the devices on which a communicator is being made


@cython.no_gc_clear
cdef class Communicator:
    """A communicator of two ranks, one of which is this process.

    It is made while the other rank makes its own: the call returns when both have come, or when HCCL gives up, after
    `HCCL_CONNECT_TIMEOUT`. Nothing can end it earlier, so whoever has a deadline lets a thread of its own wait here.

    Parameters
    ----------
    device : Device
        Of this rank.
    root_info : bytes
        What `root_info` gave to rank 0; the same at both ranks.
    rank : int
        0, which called `root_info`, or 1.
    name : str
        The same at both ranks, and not in use on the device; 1 to 127 characters of ASCII.
    buffer_mib : int
        MiB of each of the two staging buffers in device memory, >= 1; the same at both ranks.
    exec_timeout_s : int
        Seconds that a task may wait for the other rank, >= 1. Older releases have one limit for the process instead.

    Raises
    ------
    ValueError
        An argument cannot be used.
    HcclError
        HCCL refuses, or the other rank did not come. 20: another communicator is being made on the device.
    """

    def __init__(
        self, Device device not None, bytes root_info not None, int rank, str name not None, int buffer_mib,
        int exec_timeout_s,
    ):
        cdef HcclRootInfo info
        cdef const char *given = root_info
        if len(root_info) != ROOT_INFO_BYTES:
            raise ValueError(f"root information has {len(root_info)} bytes, should be {ROOT_INFO_BYTES}")
        memcpy(&info, given, sizeof(info))
        self._make(device, &info, rank, name, buffer_mib, exec_timeout_s)

    cdef int _make(
        self, Device device, const void *description, int rank, str name, int buffer_mib, int exec_timeout_s
    ) except -1:
        cdef HcclCommConfig config
        if self.device is not None:
            raise ValueError("the communicator is made already")
        if rank not in (0, 1):
            raise ValueError(f"rank {rank}, should be 0 or 1")
        self.hccl = hccl_functions()
        _fill_config(&config, name, buffer_mib, exec_timeout_s, self.hccl.HcclConfigGetInfo != NULL)
        device._hold()
        self.device = device
        self.rank = rank
        self.name = name
        try:
            self._create(description, &config)
        except BaseException:
            device._drop()
            raise
        return 0

    cdef int _create(self, const void *description, HcclCommConfig *config) except -1:
        cdef AclFailure failure
        cdef Scope scope
        cdef HcclComm handle = NULL
        cdef aclError entered
        if self.device.device_id in _creating:
            raise HcclError(
                "HcclCommInitRootInfoConfig", HCCL_E_AGAIN,
                f"another communicator is being made on device {self.device.device_id}, and only one may be at a time",
            )
        _creating.add(self.device.device_id)
        try:
            with nogil:
                note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
                entered = failure.code
                if entered == ACL_SUCCESS:
                    self._init(description, config, &handle, &failure)
                    self.device.leave(&scope)
        finally:
            _creating.discard(self.device.device_id)
        if entered != ACL_SUCCESS:
            raise failure_error(&failure)
        if failure.code != HCCL_SUCCESS:
            raise hccl_failure_error(&failure)
        self.handle = handle
        return 0

    cdef void _init(
        self, const void *description, HcclCommConfig *config, HcclComm *handle, AclFailure *failure
    ) noexcept nogil:
        note_hccl_failure(
            failure, "HcclCommInitRootInfoConfig",
            self.hccl.HcclCommInitRootInfoConfig(2, <const HcclRootInfo *>description, self.rank, config, handle),
        )

    @staticmethod
    def root_info(Device device not None):
        """Make what both ranks need, at rank 0, which must then make one communicator with it.

        Raises
        ------
        HcclError
            HCCL cannot listen.
        """
        cdef HcclFunctions *hccl = hccl_functions()
        cdef HcclRootInfo info
        cdef AclFailure failure
        cdef Scope scope
        cdef aclError entered
        memset(&info, 0, sizeof(info))
        device._hold()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", device.enter(&scope))
            entered = failure.code
            if entered == ACL_SUCCESS:
                note_hccl_failure(&failure, "HcclGetRootInfo", hccl.HcclGetRootInfo(&info))
                device.leave(&scope)
        device._drop()
        if entered != ACL_SUCCESS:
            raise failure_error(&failure)
        if failure.code != HCCL_SUCCESS:
            raise hccl_failure_error(&failure)
        return (<char *>info.internal)[:sizeof(info)]

    def async_error(self):
        """Tell what went wrong on the way since the communicator was made: 0, or 21 after RoCE has given a peer up.

        Raises
        ------
        HcclError
            The communicator was destroyed, or does not tell.
        """
        cdef AclFailure failure
        cdef Scope scope
        cdef HcclComm handle = self.handle
        cdef HcclResult error = HCCL_SUCCESS
        if handle == NULL:
            note_hccl_failure(&failure, "HcclGetCommAsyncError", HCCL_CLOSED)
            raise hccl_failure_error(&failure)
        self.device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_hccl_failure(
                    &failure, "HcclGetCommAsyncError", self.hccl.HcclGetCommAsyncError(handle, &error)
                )
                self.device.leave(&scope)
        self.device._drop()
        if failure.code != HCCL_SUCCESS:
            raise hccl_failure_error(&failure)
        return error

    def destroy(self, uint64_t deadline_ns):
        """Destroy the communicator, also while another thread waits for the peer's first operation, which ends it.

        Its streams must have been waited for or aborted. May be called again, and twice.

        Parameters
        ----------
        deadline_ns : int
            How long to try again while it is busy, on the clock of ``time.monotonic_ns``.

        Returns
        -------
        bool
            Whether it is gone; `failure` says why not.
        """
        return self._destroy(deadline_ns)

    cdef bint _destroy(self, uint64_t deadline_ns) noexcept:
        cdef AclFailure failure
        cdef Scope scope
        cdef HcclComm handle = self.handle
        if handle == NULL or in_forked_child():
            return True
        self.handle = NULL  # so that nobody else destroys it
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.device.enter(&scope))
            if failure.code == ACL_SUCCESS:
                while True:
                    note_hccl_failure(&failure, "HcclCommDestroy", self.hccl.HcclCommDestroy(handle))
                    if failure.code != HCCL_E_AGAIN or monotonic_ns() >= deadline_ns:
                        break
                    usleep(1000)
                self.device.leave(&scope)
        if failure.code != HCCL_SUCCESS:
            self.handle = handle
            self.failure = hccl_failure_error(&failure)
            return False
        self.failure = None
        self.device._drop()
        return True

    def __dealloc__(self):
        self._destroy(monotonic_ns() + LAST_TRY_NS)


cdef int _fill_config(HcclCommConfig *config, str name, int buffer_mib, int exec_timeout_s, bint newer) except -1:
    # What is left at zero is neutral. Every library takes the older form; the newer one limits waits for a dead peer.
    cdef bytes encoded = name.encode()
    cdef const char *text = encoded
    if not 0 < len(encoded) <= HCCL_NAME_MAX_LENGTH or not name.isascii() or "\0" in name:
        raise ValueError(f"name {name!r} of a communicator, should have 1 to {HCCL_NAME_MAX_LENGTH} ASCII characters")
    if buffer_mib < 1:
        raise ValueError(f"staging buffers of {buffer_mib} MiB, should be >= 1")
    if exec_timeout_s < 1:
        raise ValueError(f"time limit of a task is {exec_timeout_s} s, should be >= 1")
    memset(config, 0, sizeof(HcclCommConfig))
    config.size = HCCL_CONFIG_SIZE_8 if newer else HCCL_CONFIG_SIZE_5
    config.magic = HCCL_CONFIG_MAGIC
    config.version = 8 if newer else 5
    config.buffer_mib = <uint32_t>buffer_mib
    config.deterministic = config.rdma_traffic_class = config.rdma_service_level = <uint32_t>0xffffffff
    memcpy(config.name, text, len(encoded))
    config.execution_limit_s = exec_timeout_s if newer else -1
    return 0
