"""Processes that take part in HCCL: `Rank` is the test's end, the functions with a state run in the process.

Calls that are begun run on threads of their own, so that a process can be asked for the next thing while it waits in
the last. Every function takes the context of the process's device before anything else.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import threading
from collections.abc import Callable, Iterable
from ctypes import c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from tests.ascend_simulator.acl import Acl
from tests.ascend_simulator.programs import Program

ROOT_INFO_BYTES = 4108
CONFIG_BYTES = 300  # version 5
UINT8 = 7
MIB = 1 << 20
HUGE_FIRST = 0
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2

SUCCESS, E_PARA, E_PTR, E_MEMORY, E_INTERNAL, E_NOT_SUPPORT = 0, 1, 2, 3, 4, 5
E_TIMEOUT, E_OPEN_FILE, E_TCP_TRANSFER, E_RUNTIME, E_REMOTE = 9, 10, 13, 15, 21
WAIT_TIMEOUT, STREAM_ABORT, STREAM_SYNC_TIMEOUT = 107019, 107023, 507046
INTERNAL_ERROR, SUSPECT_REMOTE = 507000, 507057

ARGUMENTS: dict[str, list[Any]] = {
    "aclInit": [c_char_p],
    "aclFinalize": [],
    "aclrtSetDevice": [c_int32],
    "aclrtResetDevice": [c_int32],
    "aclrtGetCurrentContext": [c_void_p],
    "aclrtSetCurrentContext": [c_void_p],
    "aclrtMallocAlign32": [c_void_p, c_size_t, c_int32],
    "aclrtFree": [c_void_p],
    "aclrtMallocHost": [c_void_p, c_size_t],
    "aclrtFreeHost": [c_void_p],
    "aclrtGetMemInfo": [c_int32, c_void_p, c_void_p],
    "aclrtMemcpy": [c_void_p, c_size_t, c_void_p, c_size_t, c_int32],
    "aclrtCreateStream": [c_void_p],
    "aclrtDestroyStream": [c_void_p],
    "aclrtDestroyStreamForce": [c_void_p],
    "aclrtStreamAbort": [c_void_p],
    "aclrtSynchronizeStreamWithTimeout": [c_void_p, c_int32],
    "llmdd_sim_set": [c_char_p, c_char_p],
    "llmdd_sim_counter": [c_char_p],
    "llmdd_sim_read": [c_void_p, c_void_p, c_size_t],
    "HcclGetRootInfo": [c_void_p],
    "HcclCommInitRootInfo": [c_uint32, c_void_p, c_uint32, c_void_p],
    "HcclCommInitRootInfoConfig": [c_uint32, c_void_p, c_uint32, c_void_p, c_void_p],
    "HcclCommInitClusterInfoMemConfig": [c_char_p, c_uint32, c_void_p, c_void_p],
    "HcclCommInitClusterInfoConfig": [c_char_p, c_uint32, c_void_p, c_void_p],
    "HcclCommDestroy": [c_void_p],
    "HcclGetRankSize": [c_void_p, c_void_p],
    "HcclGetRankId": [c_void_p, c_void_p],
    "HcclGetCommName": [c_void_p, c_void_p],
    "HcclGetCommAsyncError": [c_void_p, c_void_p],
    "HcclSend": [c_void_p, c_uint64, c_int32, c_uint32, c_void_p, c_void_p],
    "HcclRecv": [c_void_p, c_uint64, c_int32, c_uint32, c_void_p, c_void_p],
    "HcclBatchSendRecv": [c_void_p, c_uint32, c_void_p, c_void_p],
    "HcclBarrier": [c_void_p, c_void_p],
    "HcclRegisterGlobalMem": [c_void_p, c_void_p],
    "HcclDeregisterGlobalMem": [c_void_p],
    "HcclCommBindMem": [c_void_p, c_void_p],
    "HcclCommUnbindMem": [c_void_p, c_void_p],
    "HcclCommPrepare": [c_void_p, c_void_p, c_int32],
    "HcclBatchPut": [c_void_p, c_uint32, c_void_p, c_uint32, c_void_p],
    "HcclBatchGet": [c_void_p, c_uint32, c_void_p, c_uint32, c_void_p],
}


class SimulatorError(Exception):
    """A call that must succeed gave a code."""


class Device:
    """A device of this process: calls by name, codes as they come."""

    def __init__(self, library: str, device: int) -> None:
        self.library = ctypes.CDLL(library)
        for name, arguments in ARGUMENTS.items():
            getattr(self.library, name).argtypes = arguments
        self.library.aclGetRecentErrMsg.restype = c_char_p
        self.library.llmdd_sim_counter.restype = c_uint64
        self.device = device
        self.must("aclInit", None)
        self.must("aclrtSetDevice", device)
        context = c_void_p()
        self.must("aclrtGetCurrentContext", ctypes.byref(context))
        self.context = context.value
        self.stream = self.new_stream()

    def call(self, name: str, *arguments: Any) -> int:
        """Call and give the code."""
        return int(getattr(self.library, name)(*arguments))

    def must(self, name: str, *arguments: Any) -> None:
        """Call, and raise `SimulatorError` with the text if the code is not 0."""
        code = self.call(name, *arguments)
        if code != 0:
            raise SimulatorError(f"{name}: {code}: {self.text()}")

    def text(self) -> str:
        """Text of this thread's last failure."""
        return (self.library.aclGetRecentErrMsg() or b"").decode()

    def enter(self) -> None:
        """Make the device the calling thread's."""
        self.must("aclrtSetCurrentContext", self.context)

    def new_stream(self) -> int:
        """Create a stream."""
        stream = c_void_p()
        self.must("aclrtCreateStream", ctypes.byref(stream))
        return int(stream.value or 0)

    def allocate(self, size: int) -> int:
        """Give the address of device memory."""
        address = c_void_p()
        self.must("aclrtMallocAlign32", ctypes.byref(address), size, HUGE_FIRST)
        return int(address.value or 0)

    def write(self, address: int, data: bytes) -> None:
        """Copy into device memory."""
        self.must("aclrtMemcpy", address, len(data), data, len(data), HOST_TO_DEVICE)

    def read(self, address: int, size: int) -> bytes:
        """Copy out of device memory."""
        data = ctypes.create_string_buffer(size)
        self.must("aclrtMemcpy", data, size, address, size, DEVICE_TO_HOST)
        return data.raw

    def peek(self, address: int, size: int) -> bytes:
        """Look at device memory that tasks may be writing."""
        data = ctypes.create_string_buffer(size)
        self.must("llmdd_sim_read", address, data, size)
        return data.raw

    def counter(self, name: str) -> int:
        """A counter of the simulator."""
        return int(self.library.llmdd_sim_counter(name.encode()))

    def synchronise(self, timeout_ms: int = 20_000) -> int:
        """Wait for the stream; give the code."""
        return self.call("aclrtSynchronizeStreamWithTimeout", self.stream, timeout_ms)


def open_device(state: dict[str, Any], device: int) -> None:
    """Bring the device up; once per process."""
    state["device"] = Device(state["path"], device)


def close_device(state: dict[str, Any]) -> list[str]:
    """Give the device back in order; the threads that are still there when ACL has ended."""
    device = taken(state)
    device.must("aclrtDestroyStream", device.stream)
    device.must("aclrtResetDevice", device.device)
    return finalize(state)


def finalize(state: dict[str, Any]) -> list[str]:
    """End ACL with whatever there is; the threads that are still there."""
    state["device"].must("aclFinalize")
    return sorted(
        name
        for task in Path("/proc/self/task").iterdir()
        if (name := (task / "comm").read_text().strip()).startswith(("hccl", "sim-"))
    )


def taken(state: dict[str, Any]) -> Device:
    """The member's device, taken by the calling thread."""
    device: Device = state["device"]
    device.enter()
    return device


def config(name: str = "", buffer_mib: int = 1, **changes: Any) -> ctypes.Array[ctypes.c_char]:
    """A configuration block of version 5; `changes` are fields by name."""
    values = {"size": CONFIG_BYTES, "magic": 0xF0F0F0F0, "version": 5, **changes}
    block = ctypes.create_string_buffer(2248)
    head = struct.pack("<QIIQII", values["size"], values["magic"], values["version"], 0, buffer_mib, 0xFFFFFFFF)
    block[: len(head)] = head
    text = name.encode()
    block[32 : 32 + len(text)] = text
    block[292:300] = b"\xff" * 8
    block[316:320] = struct.pack("<i", values.get("execution_timeout", -1))
    return block


def root_info(state: dict[str, Any]) -> bytes:
    """Information for a new communicator."""
    info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
    taken(state).must("HcclGetRootInfo", info)
    return info.raw


def create(state: dict[str, Any], info: bytes, rank: int, ranks: int = 2, key: str = "comm", **fields: Any) -> int:
    """Make a communicator by root information; it becomes ``state[key]``. Gives the code."""
    comm = c_void_p()
    device = taken(state)
    code = device.call("HcclCommInitRootInfoConfig", ranks, info, rank, config(**fields), ctypes.byref(comm))
    state[key], state["text"] = comm.value, device.text() if code else ""
    return code


def create_from_table(state: dict[str, Any], table: str, rank: int, key: str = "comm", **fields: Any) -> int:
    """The same by a rank table."""
    comm = c_void_p()
    device = taken(state)
    arguments = (table.encode(), rank, config(**fields), ctypes.byref(comm))
    code = device.call("HcclCommInitClusterInfoMemConfig", *arguments)
    state[key], state["text"] = comm.value, device.text() if code else ""
    return code


def text(state: dict[str, Any]) -> str:
    """Text of the last failure that was kept."""
    return str(state["text"])


def destroy(state: dict[str, Any], key: str = "comm") -> int:
    """Destroy the communicator; gives the code."""
    return keeping_text(state, "HcclCommDestroy", state[key])


def keeping_text(state: dict[str, Any], name: str, *arguments: Any) -> int:
    """Call, keep the text, give the code."""
    device = taken(state)
    code = device.call(name, *arguments)
    state["text"] = device.text() if code else ""
    return code


def buffer(state: dict[str, Any], key: str, data: bytes | int) -> int:
    """Device memory of this many bytes, or with these bytes, as ``state[key]``; gives its address."""
    device = taken(state)
    address = device.allocate(data if isinstance(data, int) else len(data))
    if isinstance(data, bytes):
        device.write(address, data)
    state[key] = address
    return address


def free(state: dict[str, Any], *keys: str) -> None:
    """Free buffers."""
    for key in keys:
        taken(state).must("aclrtFree", state.pop(key))


def contents(state: dict[str, Any], key: str, size: int, offset: int = 0) -> bytes:
    """Bytes of a buffer."""
    return taken(state).read(state[key] + offset, size)


def peek(state: dict[str, Any], key: str, size: int) -> bytes:
    """Bytes of a buffer that may be changing."""
    return taken(state).peek(state[key], size)


def post(state: dict[str, Any], kind: str, key: str, count: int, peer: int, **where: Any) -> int:
    """Queue HcclSend or HcclRecv ("Send", "Recv"); gives the code."""
    address = state[key] + where.get("offset", 0)
    arguments = (address, count, where.get("type", UINT8), peer, state[where.get("comm", "comm")])
    return keeping_text(state, "Hccl" + kind, *arguments, state.get("stream") or state["device"].stream)


def post_batch(state: dict[str, Any], items: list[tuple[int, str, int, int]]) -> int:
    """Queue HcclBatchSendRecv; items are (0 send or 1 receive, buffer, count, peer)."""
    packed = b"".join(struct.pack("<i4xQQiI", kind, state[key], n, UINT8, peer) for kind, key, n, peer in items)
    return keeping_text(state, "HcclBatchSendRecv", packed, len(items), state["comm"], state["device"].stream)


def barrier(state: dict[str, Any]) -> int:
    """Queue a barrier; gives the code."""
    return keeping_text(state, "HcclBarrier", state["comm"], state["device"].stream)


def synchronise(state: dict[str, Any], timeout_ms: int = 20_000) -> int:
    """Wait for the stream; gives the code."""
    device = taken(state)
    code = device.synchronise(timeout_ms)
    state["text"] = device.text() if code else ""
    return code


def abort(state: dict[str, Any]) -> None:
    """Abort the stream, and go on with a new one."""
    device = taken(state)
    device.must("aclrtStreamAbort", device.stream)
    device.must("aclrtDestroyStream", device.stream)
    device.stream = device.new_stream()


def asynchronous_error(state: dict[str, Any]) -> int:
    """What HcclGetCommAsyncError tells."""
    error = c_int32(-1)
    taken(state).must("HcclGetCommAsyncError", state["comm"], ctypes.byref(error))
    return error.value


def identity(state: dict[str, Any]) -> tuple[int, int, str]:
    """Size, rank and name as the communicator tells them."""
    device, size, rank, name = taken(state), c_uint32(), c_uint32(), ctypes.create_string_buffer(128)
    device.must("HcclGetRankSize", state["comm"], ctypes.byref(size))
    device.must("HcclGetRankId", state["comm"], ctypes.byref(rank))
    device.must("HcclGetCommName", state["comm"], name)
    return size.value, rank.value, name.value.decode()


def counter(state: dict[str, Any], name: str) -> int:
    """A counter of the simulator."""
    return taken(state).counter(name)


def free_memory(state: dict[str, Any]) -> int:
    """Free bytes of the device."""
    free_bytes, total = c_size_t(), c_size_t()
    taken(state).must("aclrtGetMemInfo", 1, ctypes.byref(free_bytes), ctypes.byref(total))
    return free_bytes.value


def set_knob(state: dict[str, Any], knob: str, value: str) -> None:
    """Change a knob."""
    assert taken(state).call("llmdd_sim_set", knob.encode(), value.encode()) == 0


def on_thread_without_device(state: dict[str, Any], name: str, *arguments: Any) -> int:
    """Call on a fresh thread."""
    return int(getattr(state["device"].library, name)(*arguments))


def register(state: dict[str, Any], key: str, address: int, size: int, kind: int = 0) -> int:
    """HcclRegisterGlobalMem; the handle becomes ``state[key]``. Gives the code."""
    handle = c_void_p()
    memory = struct.pack("<i4xQQ", kind, address, size)
    code = keeping_text(state, "HcclRegisterGlobalMem", memory, ctypes.byref(handle))
    state[key] = handle.value
    return code


def with_handle(state: dict[str, Any], name: str, key: str) -> int:
    """HcclDeregisterGlobalMem of a registration; gives the code."""
    return keeping_text(state, name, state[key])


def with_comm(state: dict[str, Any], name: str, key: str) -> int:
    """HcclCommBindMem or HcclCommUnbindMem of a registration; gives the code."""
    return keeping_text(state, name, state["comm"], state[key])


def prepare(state: dict[str, Any], seconds: int = 10) -> int:
    """HcclCommPrepare; gives the code."""
    return keeping_text(state, "HcclCommPrepare", state["comm"], bytes(32), seconds)


def one_sided(state: dict[str, Any], kind: str, peer: int, descriptors: list[tuple[int, int, int]]) -> int:
    """Queue HcclBatchPut or HcclBatchGet ("Put", "Get") of (local, remote, bytes); gives the code."""
    packed = b"".join(struct.pack("<QQQi4x", local, remote, size, UINT8) for local, remote, size in descriptors)
    arguments = (state["comm"], peer, packed, len(descriptors), state["device"].stream)
    return keeping_text(state, "HcclBatch" + kind, *arguments)


class Rank:
    """
    A process with a device.

    Parameters
    ----------
    program
        A fresh process.
    device
        User id of the device that it opens.
    """

    def __init__(self, program: Program, device: int) -> None:
        self.program = program
        self.pid = program.pid
        self._begun = 0
        self.call(open_device, device)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Result of the function in the process."""
        return self.begin(function, *args, **kwargs).result()

    def begin(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Begun:
        """Begin a call on a thread of its own."""
        self._begun += 1
        self.program.call(_begin, self._begun, function, args, kwargs)
        return Begun(self.program, self._begun)

    def aborts(self, function: Callable[..., Any], /, *args: Any, by: int = signal.SIGABRT, **kwargs: Any) -> str:
        """What the process writes while a call ends it by a signal."""
        return self.program.aborts(_run, function, args, kwargs, by=by)

    def finish(self) -> None:
        """Give the device back: ACL must have no thread and no socket left."""
        assert self.call(close_device) == []


class Begun:
    """A call that was begun."""

    def __init__(self, program: Program, ticket: int) -> None:
        self._program = program
        self._ticket = ticket

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self._program.call(_ended, self._ticket))

    def result(self, timeout: float = 30.0) -> Any:
        """Its result, or what it raised."""
        return self._program.call(_outcome, self._ticket, timeout)


# What lives in the process: the state of its functions, and the calls that were begun.
_STATE: dict[str, Any] = {}
_CALLS: dict[int, tuple[threading.Thread, list[tuple[bool, Any]]]] = {}


def _run(acl: Acl, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _STATE["path"] = acl.path
    return function(_STATE, *args, **kwargs)


def _begin(acl: Acl, ticket: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outcome: list[tuple[bool, Any]] = []

    def body() -> None:
        try:
            outcome.append((True, _run(acl, function, args, kwargs)))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=body, daemon=True)
    _CALLS[ticket] = (thread, outcome)
    thread.start()


def _ended(acl: Acl, ticket: int) -> bool:
    return bool(_CALLS[ticket][1])


def _outcome(acl: Acl, ticket: int, timeout: float) -> Any:
    thread, outcome = _CALLS[ticket]
    thread.join(timeout)
    if not outcome:
        raise TimeoutError(f"a call did not end within {timeout} s")
    del _CALLS[ticket]
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value


def together(calls: Iterable[tuple[Rank, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Results of calls in several processes that need one another."""
    begun = [rank.begin(function, *args, **kwargs) for rank, function, args, kwargs in calls]
    return [each.result() for each in begun]


def on(rank: Rank, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """One of the calls of `together`."""
    return rank, function, args, kwargs


def connect(*ranks: Rank, **fields: Any) -> None:
    """Make a communicator of all of them, in their order."""
    info = ranks[0].call(root_info)
    calls = [on(rank, create, info, number, len(ranks), **fields) for number, rank in enumerate(ranks)]
    assert together(calls) == [SUCCESS] * len(ranks), [rank.call(text) for rank in ranks]


def disconnect(*ranks: Rank, key: str = "comm") -> None:
    """Destroy it and give the devices back."""
    assert [rank.call(destroy, key) for rank in ranks] == [SUCCESS] * len(ranks), [rank.call(text) for rank in ranks]
    for rank in ranks:
        rank.finish()
