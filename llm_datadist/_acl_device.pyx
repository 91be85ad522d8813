"""Devices: opened once and given back once, and made current around the calls of a thread.

Whose device is current belongs to the thread, and other libraries of the process depend on it. So everything here
leaves it as it was, and a device is opened and given back on a thread of its own, since the vendor ties both to the
calling one.
"""

import os

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from llm_datadist._acl_addresses cimport is_device_memory
from llm_datadist._acl_runtime cimport (
    ACL_CLOSED, ACL_FORKED_CHILD, ACL_HBM_MEM, ACL_SUCCESS, AclFailure, AclFunctions, acl_error, acl_functions,
    aclError, aclrtContext, failure_error, forget_text, in_forked_child, note_failure, visible_devices_error,
)

from llm_datadist._acl_runtime import initialise, simulator

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *thread, const void *attributes, void *(*body)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)


# What the thread that opens a device, or gives it back, is told and what it finds out.
cdef struct Errand:
    AclFunctions *acl
    int32_t device_id
    aclrtContext context
    AclFailure failure


cdef void *_open_device(void *argument) noexcept nogil:
    cdef Errand *errand = <Errand *>argument
    note_failure(&errand.failure, "aclrtSetDevice", errand.acl.aclrtSetDevice(errand.device_id))
    if errand.failure.code != ACL_SUCCESS:
        return NULL
    note_failure(&errand.failure, "aclrtGetCurrentContext", errand.acl.aclrtGetCurrentContext(&errand.context))
    if errand.failure.code != ACL_SUCCESS:
        errand.acl.aclrtResetDevice(errand.device_id)
    return NULL


cdef void *_reset_device(void *argument) noexcept nogil:
    cdef Errand *errand = <Errand *>argument
    note_failure(&errand.failure, "aclrtResetDevice", errand.acl.aclrtResetDevice(errand.device_id))
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
        errand.acl = self.acl
        errand.device_id = device_id
        failed = _run_errand(_open_device, &errand)
        if failed:
            raise OSError(failed, f"{os.strerror(failed)}: cannot start a thread that opens the device")
        if errand.failure.code != ACL_SUCCESS:
            raise visible_devices_error(&errand.failure)
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
        if in_forked_child():
            return ACL_FORKED_CHILD
        if not self._open:
            return ACL_CLOSED
        if self.acl.aclrtGetCurrentContext(&scope.previous) != ACL_SUCCESS:
            scope.previous = NULL
            forget_text()
        if scope.previous == self._context:
            return ACL_SUCCESS
        code = self.acl.aclrtSetCurrentContext(self._context)
        scope.changed = code == ACL_SUCCESS
        return code

    cdef void leave(self, Scope *scope) noexcept nogil:
        # The runtime has no way to make nothing current.
        if scope.changed and scope.previous != NULL:
            if self.acl.aclrtSetCurrentContext(scope.previous) != ACL_SUCCESS:
                forget_text()  # its owner closed it

    cdef int _hold(self) except -1:
        """Let a new handle keep the device open."""
        if self._closing:
            raise acl_error("aclrtSetCurrentContext", ACL_CLOSED)
        return self._keep()

    cdef int _keep(self) except -1:
        """Keep the device open during a call."""
        if in_forked_child():
            raise acl_error("aclrtSetCurrentContext", ACL_FORKED_CHILD)
        if not self._open:
            raise acl_error("aclrtSetCurrentContext", ACL_CLOSED)
        self._users += 1
        return 0

    cdef void _drop(self) noexcept:
        self._users -= 1
        if self._closing and self._users == 0:
            self._give_back()

    cdef void _give_back(self) noexcept:
        cdef Errand errand
        if not self._open or in_forked_child():
            return
        self._open = False
        errand.acl = self.acl
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
        self._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self.enter(&scope))
            if failure.code == ACL_SUCCESS:
                note_failure(&failure, "aclrtGetMemInfo", self.acl.aclrtGetMemInfo(ACL_HBM_MEM, &free, &total))
                self.leave(&scope)
        self._drop()
        if failure.code != ACL_SUCCESS:
            raise failure_error(&failure)
        return free, total

    def attribute(self, int number):
        """Value of an attribute of the device; None if its kind does not have it, or the release does not tell.

        Parameters
        ----------
        number : int
            As the runtime counts attributes.
        """
        cdef Scope scope
        cdef int64_t value = 0
        cdef aclError code
        if self.acl.aclrtGetDeviceInfo == NULL:
            return None
        self._keep()
        with nogil:
            code = self.enter(&scope)
            if code == ACL_SUCCESS:
                code = self.acl.aclrtGetDeviceInfo(<uint32_t>self.device_id, number, &value)
                if code != ACL_SUCCESS:
                    forget_text()
                self.leave(&scope)
        self._drop()
        return value if code == ACL_SUCCESS else None

    def holds(self, uint64_t address):
        """Tell whether an address is one of a device, this one or another."""
        cdef Scope scope
        cdef bint found = False
        with nogil:
            if self.enter(&scope) == ACL_SUCCESS:
                found = is_device_memory(address)
                self.leave(&scope)
        return found

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

    def __init__(self, Device device not None):
        self._device = device

    def __enter__(self):
        cdef AclFailure failure
        self._device._keep()
        with nogil:
            note_failure(&failure, "aclrtSetCurrentContext", self._device.enter(&self._scope))
        if failure.code != ACL_SUCCESS:
            self._device._drop()
            raise failure_error(&failure)
        return self._device

    def __exit__(self, *_):
        with nogil:
            self._device.leave(&self._scope)
        self._device._drop()
