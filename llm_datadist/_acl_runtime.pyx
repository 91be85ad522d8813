"""The library of the ACL runtime: found when an Ascend device is first asked for, its functions, and its failures."""

import os
import threading

from libc.stdint cimport uint32_t
from libc.string cimport memset, strncpy

from llm_datadist._shared_library cimport SharedLibrary

from llm_datadist._shared_library import CallFailed, LibraryMissing

cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)() noexcept nogil)

ctypedef const char *(*VersionFunction)() noexcept nogil

LIBRARIES = ("libacl_rt.so", "libascendcl.so")  # the second one is what older releases have
VARIABLE = "LLM_DATADIST_ACL_LIBRARY"
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"

_OUR_TEXTS = {
    ACL_FORKED_CHILD: "this process was forked from one that uses an Ascend device; start it by spawn instead",
    ACL_CLOSED: "it was closed before",
    ACL_EVENT_UNRECORDED: "the event was never recorded",
}


class AclError(CallFailed):
    """A function of the ACL runtime failed."""


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


cdef void forget_text() noexcept nogil:
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


cdef AclFunctions *functions_in_use() noexcept nogil:
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
    library.require("aclrtMemcpy", <void **>&f.aclrtMemcpy)
    library.require("aclrtMemcpyAsync", <void **>&f.aclrtMemcpyAsync)
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
            forget_text()
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
        raise visible_devices_error(&failure)
    return count


cdef object visible_devices_error(AclFailure *failure):
    error = failure_error(failure)
    visible = os.environ.get(VISIBLE_DEVICES)
    sees = "is not set" if visible is None else f"is {visible!r}"
    return AclError(error.function, error.code, f"{error.text} ({VISIBLE_DEVICES} {sees})".strip())
