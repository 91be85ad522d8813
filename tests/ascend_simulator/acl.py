"""The simulator's ACL functions, called through ctypes as a program in C would call them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_LETTERS = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "z": ctypes.c_size_t,
    "i": ctypes.c_int32,
    "u": ctypes.c_uint32,
    "U": ctypes.c_uint64,
}

# Arguments of each function that tests call: p pointer, s text, z size_t, i int32, u uint32, U uint64.
_ARGUMENTS = {
    "aclFinalize": "",
    "aclFinalizeReference": "p",
    "aclInit": "s",
    "aclrtCreateContext": "pi",
    "aclrtCreateEvent": "p",
    "aclrtCreateEventExWithFlag": "pu",
    "aclrtCreateEventWithFlag": "pu",
    "aclrtCreateStream": "p",
    "aclrtCreateStreamWithConfig": "puu",
    "aclrtCtxGetCurrentDefaultStream": "p",
    "aclrtDestroyContext": "p",
    "aclrtDestroyEvent": "p",
    "aclrtDestroyStream": "p",
    "aclrtDestroyStreamForce": "p",
    "aclrtDeviceCanAccessPeer": "pii",
    "aclrtDeviceDisablePeerAccess": "i",
    "aclrtDeviceEnablePeerAccess": "iu",
    "aclrtDeviceGetBareTgid": "p",
    "aclrtDevicePeerAccessStatus": "iip",
    "aclrtEventElapsedTime": "ppp",
    "aclrtFree": "p",
    "aclrtFreeHost": "p",
    "aclrtFreePhysical": "p",
    "aclrtFreeWithDevSync": "p",
    "aclrtGetCurrentContext": "p",
    "aclrtGetDevice": "p",
    "aclrtGetDeviceCount": "p",
    "aclrtGetDeviceInfo": "uip",
    "aclrtGetDevicesTopo": "uup",
    "aclrtGetLastError": "i",
    "aclrtGetMemInfo": "ipp",
    "aclrtGetPhyDevIdByLogicDevId": "ip",
    "aclrtGetPhyDevIdByUserDevId": "ip",
    "aclrtGetUserDevIdByLogicDevId": "ip",
    "aclrtHostRegister": "pUip",
    "aclrtHostRegisterV2": "pUu",
    "aclrtHostUnregister": "p",
    "aclrtIpcMemClose": "s",
    "aclrtIpcMemGetExportKey": "pzpzU",
    "aclrtIpcMemImportByKey": "psU",
    "aclrtIpcMemSetAttr": "siU",
    "aclrtIpcMemSetImportPid": "spz",
    "aclrtMalloc": "pzi",
    "aclrtMallocAlign32": "pzi",
    "aclrtMallocHost": "pz",
    "aclrtMemGetAddressRange": "ppp",
    "aclrtMemcpy": "pzpzi",
    "aclrtMemcpyAsync": "pzpzip",
    "aclrtMemset": "pziz",
    "aclrtMemsetAsync": "pzizp",
    "aclrtPeekAtLastError": "i",
    "aclrtPointerGetAttributes": "pp",
    "aclrtQueryEventStatus": "pp",
    "aclrtRecordEvent": "pp",
    "aclrtResetDevice": "i",
    "aclrtResetEvent": "pp",
    "aclrtSetCurrentContext": "p",
    "aclrtSetDevice": "i",
    "aclrtStreamAbort": "p",
    "aclrtStreamGetId": "pp",
    "aclrtStreamQuery": "pp",
    "aclrtStreamStop": "p",
    "aclrtStreamWaitEvent": "pp",
    "aclrtStreamWaitEventWithTimeout": "ppi",
    "aclrtSynchronizeDevice": "",
    "aclrtSynchronizeDeviceWithTimeout": "i",
    "aclrtSynchronizeEvent": "p",
    "aclrtSynchronizeEventWithTimeout": "pi",
    "aclrtSynchronizeStream": "p",
    "aclrtSynchronizeStreamWithTimeout": "pi",
    "aclsysGetVersionStr": "sp",
    "llmdd_sim_idle": "i",
    "llmdd_sim_read": "ppz",
    "llmdd_sim_set": "ss",
    "llmdd_sim_write": "ppz",
}

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)
HUGE_FIRST, HUGE_ONLY, NORMAL_ONLY = range(3)
SYNC, TIME_LINE = 0x1, 0x8


class AclError(Exception):
    """A call that should have succeeded did not; `code` says how."""

    def __init__(self, name: str, code: int, text: str) -> None:
        super().__init__(name, code, text)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]} gave {self.code}: {self.args[2]}"


class Acl:
    """
    The library in this process.

    Any function of it is an attribute that gives the code. The methods below want success and give what the call makes.

    Parameters
    ----------
    path
        The shared object.
    hold_interpreter
        Call with the interpreter lock held, as no program should.
    """

    def __init__(self, path: str | Path, hold_interpreter: bool = False) -> None:
        self.path = str(path)
        self._library = (ctypes.PyDLL if hold_interpreter else ctypes.CDLL)(self.path)
        self._library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self._library.aclrtGetSocName.restype = ctypes.c_char_p
        self._library.llmdd_sim_version.restype = ctypes.c_char_p
        self._library.llmdd_sim_counter.restype = ctypes.c_uint64

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name in _ARGUMENTS:
            function.argtypes = [_LETTERS[letter] for letter in _ARGUMENTS[name]]
        return function

    def message(self) -> str:
        """Text of this thread's last failure; empty if there is none, or it was read."""
        return (self._library.aclGetRecentErrMsg() or b"").decode()

    def ok(self, name: str, *args: Any) -> None:
        """Call the function and raise AclError unless it succeeds."""
        code = getattr(self, name)(*args)
        if code:
            raise AclError(name, code, self.message())

    def out(self, name: str, kind: Any, *args: Any) -> Any:
        """Call a function whose first argument is a pointer to its result of a ctypes kind."""
        result = kind()
        self.ok(name, ctypes.byref(result), *args)
        return result.value

    def start(self, device: int = 0) -> None:
        """Initialise, and set the device for this thread."""
        self.ok("aclInit", None)
        self.ok("aclrtSetDevice", device)

    def malloc(self, size: int, policy: int = HUGE_FIRST) -> int:
        return self.out("aclrtMallocAlign32", ctypes.c_void_p, size, policy)

    def host(self, size: int) -> int:
        return self.out("aclrtMallocHost", ctypes.c_void_p, size)

    def stream(self) -> int:
        return self.out("aclrtCreateStream", ctypes.c_void_p)

    def event(self, flags: int = SYNC) -> int:
        return self.out("aclrtCreateEventExWithFlag", ctypes.c_void_p, flags)

    def sync(self, stream: int, timeout_ms: int = 20000) -> None:
        self.ok("aclrtSynchronizeStreamWithTimeout", stream, timeout_ms)

    def peek(self, address: int, size: int) -> bytes:
        """Bytes of device memory, without regard to streams."""
        bytes_ = ctypes.create_string_buffer(size)
        self.ok("llmdd_sim_read", address, bytes_, size)
        return bytes_.raw

    def poke(self, address: int, bytes_: bytes) -> None:
        self.ok("llmdd_sim_write", address, bytes_, len(bytes_))

    def free_memory(self) -> int:
        """Bytes that the current device has left."""
        left, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.ok("aclrtGetMemInfo", 1, ctypes.byref(left), ctypes.byref(total))
        return left.value

    def count(self, name: str) -> int:
        return self._library.llmdd_sim_counter(name.encode())

    def set(self, knob: str, value: object) -> None:
        self.ok("llmdd_sim_set", knob.encode(), str(value).encode())
