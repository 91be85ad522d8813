"""Memory of an Ascend device as a pool."""

from __future__ import annotations

import ctypes
import os
import time
import weakref

from llm_datadist._acl import VARIABLE as ACL_LIBRARY
from llm_datadist._acl import AclError, Device, DeviceMemory, PinnedMemory, simulator
from llm_datadist._ascend_copies import AscendCopier
from llm_datadist._local_copies import LocalOutcome
from llm_datadist._shared_library import VendorError
from llm_datadist.devices.ascend.detection import require_device
from llm_datadist.devices.ascend.errors import llm_exception
from llm_datadist.devices.ascend.layer_order import LayerOrder
from llm_datadist.devices.ascend.memory_figures import memory_figures
from llm_datadist.devices.base import SynchronizeLayer
from llm_datadist.status import LLMException, LLMStatusCode

_COPY_SECONDS = 10.0  # for one copy to or from the host, unless its caller says otherwise
_CLOSE_SECONDS = 5.0  # a running copy sees within milliseconds that it must end
_HOST_VISIBLE = "LLMDD_SIM_HOST_VISIBLE"  # of the simulator: whether programs may view its memory


def open_pool(device_id: int, capacity: int, host_capacity: int = 0, *, simulated: bool) -> AscendPool:
    """Open a device, and reserve a pool on it.

    Parameters
    ----------
    device_id : int
        Index among the devices that this process sees.
    capacity, host_capacity : int
        Bytes on the device, and of pinned host memory beside it.
    simulated : bool
        Whether the device must be one of the simulator.

    Raises
    ------
    LLMException
        LLM_FEATURE_NOT_ENABLED: the vendor's library is missing or too old, or it is not the simulator.
        LLM_PARAM_INVALID: there are fewer devices. LLM_DEVICE_OUT_OF_MEMORY: no room. LLM_FAILED: there is no driver or
        no device.
    """
    require_device(device_id)
    if simulated and simulator() is None:
        raise LLMException(
            f"the simulator is asked for, but {ACL_LIBRARY} does not name it",
            status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
        )
    try:
        device = Device(device_id)
    except VendorError as error:
        raise llm_exception(f"opening device {device_id}", error) from error
    try:
        return AscendPool(device, capacity, host_capacity)
    except BaseException:
        device.close()
        raise


class AscendPool:
    """A pool in the memory of a device, where programs of the host cannot look.

    Parameters
    ----------
    device : Device
        The pool closes it.
    capacity : int
        Bytes on the device; all are taken at once.
    host_capacity : int
        Bytes of pinned host memory, for caches that the program wants there; their offsets follow those of the device.

    Attributes
    ----------
    segment : DeviceMemory
        The memory, of `capacity` bytes rounded up to whole pages of 2 MiB; at least one.

    Raises
    ------
    LLMException
        LLM_DEVICE_OUT_OF_MEMORY: the device has no room for `capacity` bytes.
    """

    def __init__(self, device: Device, capacity: int, host_capacity: int = 0) -> None:
        self._host: PinnedMemory | None = None
        try:
            if host_capacity:
                self._host = PinnedMemory(device, host_capacity)
            self.segment = DeviceMemory(device, max(capacity, 1))
        except AclError as error:
            if self._host is not None:
                self._host.close()
            free, total = memory_figures(device)
            call = f"reserving a pool of {capacity} bytes on device {device.device_id} ({free} of {total} bytes free)"
            code = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
            raise llm_exception(call, error, out_of_memory=code) from error
        self.device = device
        self.address = self.segment.address
        self.capacity = max(capacity, 1)
        self._on_device = capacity
        self._copier = AscendCopier(device)
        self._views = 0
        self._closed = False

    def address_of(self, offset: int) -> int:
        if offset < self._on_device or self._host is None:
            return self.address + offset
        return self._host.address + offset - self._on_device

    def offset_of(self, address: int) -> int:
        host = self._host
        if host is not None and 0 <= address - host.address < host.size:
            return address - host.address + self._on_device
        return address - self.address

    def prepare(self, offset: int, nbytes: int) -> None:
        """Do nothing: all memory is there from the beginning."""

    def view(self, address: int, nbytes: int) -> memoryview:
        """Give host memory; refuse that of the device, except of a simulated one that allows it.

        Raises
        ------
        LLMException
            LLM_FEATURE_NOT_ENABLED: it is memory of the device.
        """
        host = self._host
        if host is not None and 0 <= address - host.address <= host.size - nbytes:
            offset = address - host.address
            return memoryview(host)[offset : offset + nbytes]
        if not self.device.holds(address):
            return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
        if self.device.simulator is None or os.environ.get(_HOST_VISIBLE) != "1":
            raise LLMException(
                "the memory of an Ascend device cannot be viewed from the host: get_cache_tensors copies it, and"
                " torch_npu or torchair make tensors of the device from tensor_addrs",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )
        array = (ctypes.c_ubyte * nbytes).from_address(address)
        self._views += 1
        weakref.finalize(array, self._view_ended).atexit = False
        return memoryview(array).cast("B")

    def read(self, address: int, nbytes: int, timeout_s: float = _COPY_SECONDS) -> bytearray:
        """Copy a range of the device's memory to the host.

        Parameters
        ----------
        address : int
            Of the first byte, on the device; the caller vouches for the range.
        nbytes : int
            Bytes.
        timeout_s : float
            How long it may take, in seconds.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: it takes longer. LLM_FAILED: the pool is closed, or the device reports an error.
        """
        data = bytearray(nbytes)
        try:
            outcome = self._copier.read(address, data, _deadline_ns(timeout_s))
        except VendorError as error:
            raise llm_exception(f"reading {nbytes} bytes of device {self.device.device_id}", error) from error
        _raise_unless_done("reading", outcome, nbytes, timeout_s)
        return data

    def write(self, address: int, data: bytes | bytearray | memoryview, timeout_s: float = _COPY_SECONDS) -> None:
        """Copy contiguous bytes of the host to an address of the device; as `read` otherwise."""
        nbytes = memoryview(data).nbytes
        try:
            outcome = self._copier.write(address, data, _deadline_ns(timeout_s))
        except VendorError as error:
            raise llm_exception(f"writing {nbytes} bytes of device {self.device.device_id}", error) from error
        _raise_unless_done("writing", outcome, nbytes, timeout_s)

    def contents(self, address: int, nbytes: int, deadline_ns: int) -> memoryview | None:
        if not self.device.holds(address):
            return None
        return memoryview(self.read(address, nbytes, max(0.001, (deadline_ns - time.monotonic_ns()) / 1e9)))

    def copier(self, threads: int) -> AscendCopier:
        return AscendCopier(self.device, threads)

    def in_order(self, synchronize_layer: SynchronizeLayer, timeout_s: float) -> SynchronizeLayer:
        return LayerOrder(self.device, timeout_s).wrap(synchronize_layer)

    def close(self) -> None:
        """Give the memory back to the device, once nothing copies or views it; may be called twice."""
        self._closed = True
        if not self._copier.close(_deadline_ns(_CLOSE_SECONDS)):
            return  # a copy hangs in the driver: memory that it may touch stays taken
        self._give_back_if_unseen()

    def _view_ended(self) -> None:
        self._views -= 1
        self._give_back_if_unseen()

    def _give_back_if_unseen(self) -> None:
        if not self._closed or self._views:
            return
        try:
            self.segment.close()
            if self._host is not None:
                self._host.close()
            self.device.close()
        except AclError as error:
            raise llm_exception("close", error) from error


def _deadline_ns(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def _raise_unless_done(what: str, outcome: LocalOutcome, nbytes: int, timeout_s: float) -> None:
    if outcome == LocalOutcome.TIMED_OUT:
        reason = f"{what} {nbytes} bytes of device memory took longer than {timeout_s:g} s"
        raise LLMException(reason, status_code=LLMStatusCode.LLM_TIMEOUT)
    if outcome != LocalOutcome.DONE:
        raise LLMException(f"{what} device memory: the pool is closed", status_code=LLMStatusCode.LLM_FAILED)
