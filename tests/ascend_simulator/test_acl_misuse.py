"""Misuse that hardware would punish, sooner or later: each kind, told in words, counted, and refused."""

from __future__ import annotations

import ctypes

import pytest

from tests.ascend_simulator.acl import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, NORMAL_ONLY, Acl
from tests.ascend_simulator.programs import in_thread

MIB = 1 << 20
OUT = ctypes.c_void_p


def no_context(acl: Acl):
    return in_thread(acl.aclrtMalloc, ctypes.byref(OUT()), 64, 0)


def wrong_device_of_memory(acl: Acl):
    memory, host = acl.malloc(64), acl.host(64)
    acl.ok("aclrtSetDevice", 1)
    return acl.aclrtMemcpy(memory, 64, host, 64, HOST_TO_DEVICE)


def wrong_device_of_stream(acl: Acl):
    stream = acl.stream()
    acl.ok("aclrtSetDevice", 1)
    return acl.aclrtSynchronizeStreamWithTimeout(stream, 100)


def wrong_device_of_event(acl: Acl):
    event = acl.event()
    acl.ok("aclrtSetDevice", 1)
    return acl.aclrtRecordEvent(event, acl.stream())


def wrong_device_of_free(acl: Acl):
    memory = acl.malloc(64)
    acl.ok("aclrtSetDevice", 1)
    return acl.aclrtFree(memory)


def no_handle(acl: Acl):
    return acl.aclrtSynchronizeStreamWithTimeout(acl.event(), 100)


def use_after_free(acl: Acl):
    memory = acl.malloc(64)
    acl.ok("aclrtFree", memory)
    return acl.aclrtMemcpy(acl.host(64), 64, memory, 64, DEVICE_TO_HOST)


def use_after_free_of_stream(acl: Acl):
    stream = acl.stream()
    acl.ok("aclrtDestroyStream", stream)
    return acl.aclrtSynchronizeStreamWithTimeout(stream, 100)


def use_after_free_of_event(acl: Acl):
    event = acl.event()
    acl.ok("aclrtDestroyEvent", event)
    return acl.aclrtQueryEventStatus(event, ctypes.byref(ctypes.c_int32()))


def free_with_queued_copy(acl: Acl):
    memory = acl.malloc(64)
    acl.ok("aclrtMemcpyAsync", memory, 64, acl.host(64), 64, HOST_TO_DEVICE, acl.stream())
    return acl.aclrtFree(memory)


def free_host_with_queued_copy(acl: Acl):
    host = acl.host(64)
    acl.ok("aclrtMemcpyAsync", acl.malloc(64), 64, host, 64, HOST_TO_DEVICE, acl.stream())
    return acl.aclrtFreeHost(host)


def double_free(acl: Acl):
    memory = acl.malloc(64)
    acl.ok("aclrtFree", memory)
    return acl.aclrtFree(memory)


def double_free_of_host(acl: Acl):
    host = acl.host(64)
    acl.ok("aclrtFreeHost", host)
    return acl.aclrtFreeHost(host)


def foreign_free(acl: Acl):
    return acl.aclrtFree(acl.malloc(256) + 64)


def foreign_free_of_host(acl: Acl):
    return acl.aclrtFree(acl.host(64))


def foreign_free_host(acl: Acl):
    return acl.aclrtFreeHost(ctypes.addressof(ctypes.create_string_buffer(64)))


def out_of_bounds(acl: Acl):
    return acl.aclrtMemcpy(acl.malloc(100) + 64, 100, acl.host(64), 37, HOST_TO_DEVICE)


def out_of_bounds_of_host(acl: Acl):
    return acl.aclrtMemcpyAsync(acl.malloc(128), 128, acl.host(64), 65, HOST_TO_DEVICE, acl.stream())


def out_of_bounds_of_fill(acl: Acl):
    return acl.aclrtMemset(acl.malloc(64), 65, 0, 65)


def no_allocation(acl: Acl):
    return acl.aclrtMemcpy(acl.malloc(64) + 512 * MIB, 64, acl.host(64), 64, HOST_TO_DEVICE)


def busy_buffer_read(acl: Acl):
    memory = acl.malloc(64)
    acl.ok("aclrtMemcpyAsync", memory, 64, acl.host(64), 64, HOST_TO_DEVICE, acl.stream())
    return acl.aclrtMemcpy(acl.host(64), 64, memory, 64, DEVICE_TO_HOST)


def busy_host_buffer(acl: Acl):
    host = acl.host(64)
    acl.ok("aclrtMemcpyAsync", host, 64, acl.malloc(64), 64, DEVICE_TO_HOST, acl.stream())
    return acl.aclrtMemcpy(acl.malloc(64), 64, host, 64, HOST_TO_DEVICE)


def overlap_copy(acl: Acl):
    memory = acl.malloc(256)
    return acl.aclrtMemcpyAsync(memory + 64, 128, memory, 128, DEVICE_TO_DEVICE, acl.stream())


def unaligned(acl: Acl):
    return acl.aclrtMemcpyAsync(acl.malloc(64), 64, acl.malloc(128) + 32, 64, DEVICE_TO_DEVICE, acl.stream())


def unaligned_register(acl: Acl):
    buffer = ctypes.create_string_buffer(8192)
    return acl.aclrtHostRegisterV2(-(-ctypes.addressof(buffer) // 4096) * 4096 + 8, 64, 0x10000000)


def unaligned_export(acl: Acl):
    return acl.aclrtIpcMemGetExportKey(acl.malloc(8192, NORMAL_ONLY), 8192, ctypes.create_string_buffer(65), 65, 0)


def unaligned_export_size(acl: Acl):
    return acl.aclrtIpcMemGetExportKey(acl.malloc(4 * MIB), 3 * MIB, ctypes.create_string_buffer(65), 65, 0)


def wrong_kind(acl: Acl):
    return acl.aclrtMemcpy(acl.malloc(64), 64, acl.host(64), 64, DEVICE_TO_DEVICE)


def wrong_kind_of_plain_memory(acl: Acl):
    return acl.aclrtMemcpyAsync(ctypes.create_string_buffer(64), 64, acl.malloc(64), 64, HOST_TO_DEVICE, acl.stream())


def unbounded_wait(acl: Acl):
    return acl.aclrtSynchronizeStreamWithTimeout(acl.stream(), -1)


def undefined_wait(acl: Acl):
    return acl.aclrtSynchronizeStreamWithTimeout(acl.stream(), 0)


def unbounded_stream(acl: Acl):
    return acl.aclrtSynchronizeStream(acl.stream())


def unbounded_device(acl: Acl):
    return acl.aclrtSynchronizeDevice()


def unbounded_event(acl: Acl):
    event = acl.event()
    acl.ok("aclrtRecordEvent", event, acl.stream())
    return acl.aclrtSynchronizeEvent(event)


def event_unrecorded(acl: Acl):
    return acl.aclrtStreamWaitEvent(acl.stream(), acl.event())


def event_unrecorded_on_host(acl: Acl):
    return acl.aclrtSynchronizeEventWithTimeout(acl.event(), 100)


def export_closed_twice(acl: Acl):
    key = ctypes.create_string_buffer(65)
    acl.ok("aclrtIpcMemGetExportKey", acl.malloc(2 * MIB), 2 * MIB, key, 65, 0)
    acl.ok("aclrtIpcMemClose", key.value)
    return acl.aclrtIpcMemClose(key.value)


def ipc_free_exported(acl: Acl):
    memory = acl.malloc(2 * MIB)
    acl.ok("aclrtIpcMemGetExportKey", memory, 2 * MIB, ctypes.create_string_buffer(65), 65, 0)
    return acl.aclrtFree(memory)


def leak(acl: Acl):
    acl.malloc(64)
    return acl.aclrtResetDevice(0)


def leak_of_host_memory(acl: Acl):
    acl.host(64)
    return acl.aclFinalize()


CASES = [
    (no_context, "no_context", 107002, "no context"),
    (wrong_device_of_memory, "wrong_device", 107000, "current device is 1"),
    (wrong_device_of_stream, "wrong_device", 107003, "device 0"),
    (wrong_device_of_event, "wrong_device", 107003, "event is of device 0"),
    (wrong_device_of_free, "wrong_device", 107000, "thread's device is 1"),
    (no_handle, "wrong_device", 107003, "is no stream"),
    (use_after_free, "use_after_free", 107000, "which was freed"),
    (use_after_free_of_stream, "use_after_free", 107003, "it was destroyed"),
    (use_after_free_of_event, "use_after_free", 107000, "it was destroyed"),
    (free_with_queued_copy, "use_after_free", 107000, "used by a queued aclrtMemcpyAsync"),
    (free_host_with_queued_copy, "use_after_free", 107000, "used by a queued aclrtMemcpyAsync"),
    (double_free, "double_free", 107000, "freed before"),
    (double_free_of_host, "double_free", 107000, "freed before"),
    (foreign_free, "foreign_free", 107000, "not the begin"),
    (foreign_free_of_host, "foreign_free", 107000, "pinned host memory"),
    (foreign_free_host, "foreign_free", 107000, "not given out"),
    (out_of_bounds, "out_of_bounds", 107000, "37 bytes from byte 64 on"),
    (out_of_bounds_of_host, "out_of_bounds", 107000, "pinned host memory"),
    (out_of_bounds_of_fill, "out_of_bounds", 107000, "65 bytes from byte 0 on"),
    (no_allocation, "out_of_bounds", 107000, "in no allocation"),
    (busy_buffer_read, "busy_buffer_read", 107000, "written by a queued aclrtMemcpyAsync"),
    (busy_host_buffer, "busy_buffer_read", 107000, "written by a queued aclrtMemcpyAsync"),
    (overlap_copy, "overlap_copy", 107000, "overlap"),
    (unaligned, "unaligned", 107000, "multiples of 64"),
    (unaligned_register, "unaligned", 107000, "multiple of 4096"),
    (unaligned_export, "unaligned", 107000, "page, 4096"),
    (unaligned_export_size, "unaligned", 107000, "page, 2097152"),
    (wrong_kind, "wrong_kind", 107000, "from host to device"),
    (wrong_kind_of_plain_memory, "wrong_kind", 107000, "from device to host"),
    (unbounded_wait, "unbounded_wait", 107000, "-1 waits without limit"),
    (undefined_wait, "unbounded_wait", 107000, "timeout 0"),
    (unbounded_stream, "unbounded_wait", 107000, "without limit"),
    (unbounded_device, "unbounded_wait", 107000, "without limit"),
    (unbounded_event, "unbounded_wait", 107000, "without limit"),
    (event_unrecorded, "event_unrecorded", 107000, "never recorded"),
    (event_unrecorded_on_host, "event_unrecorded", 107000, "never recorded"),
    (export_closed_twice, "double_free", 107000, "neither imported nor exported"),
    (ipc_free_exported, "ipc_free_exported", 107000, "still exported"),
    (leak, "leak", 107000, "1 allocations"),
    (leak_of_host_memory, "leak", 107000, "1 pieces of pinned"),
]


def commit(acl: Acl, misuse):
    acl.start()
    code = misuse(acl)
    text = acl.message()
    return code, acl.count(f"misuse.{misuse_name(misuse)}"), text


def misuse_name(misuse) -> str:
    return next(name for case, name, *_ in CASES if case is misuse)


@pytest.mark.parametrize(("misuse", "name", "code", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_misuse_is_refused(program, misuse, name, code, words):
    offender = program(MISUSE="error", MIN_DELAY_US=100_000)
    got, counted, text = offender.call(commit, misuse)
    assert (got, counted) == (code, 1)
    if misuse is not no_context:  # its text is the other thread's
        assert words in text
    assert offender.errors() == ""


@pytest.mark.parametrize("misuse", [no_context, double_free, busy_buffer_read, wrong_kind, unbounded_stream, leak])
def test_misuse_ends_the_process(program, misuse):
    _, name, _, words = next(case for case in CASES if case[0] is misuse)
    offender = program(MIN_DELAY_US=100_000)
    errors = offender.aborts(commit, misuse)
    assert f"misuse {name} in process {offender.pid}" in errors
    assert words in errors


def log_and_go_on(acl: Acl):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64), acl.stream()
    ctypes.memset(host, 1, 64)
    codes = [acl.aclrtMemcpy(memory, 64, host, 64, DEVICE_TO_DEVICE), acl.peek(memory, 1)]
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    codes += [acl.aclrtFree(memory), acl.aclrtSynchronizeStreamWithTimeout(stream, 5000), acl.aclrtFree(memory)]
    return codes


def test_misuse_is_only_told(program):
    """What was freed under a task fails it, for nothing sensible is there to be written."""
    offender = program(MISUSE="log", MIN_DELAY_US=100_000)
    assert offender.call(log_and_go_on) == [0, b"\x01", 0, 507053, 107000]
    assert [word in offender.errors() for word in ("wrong_kind", "use_after_free", "double_free")] == [True] * 3


def hold_interpreter(acl: Acl, name: str):
    acl.ok("aclInit", None)
    acl.set("MISUSE", "log")
    acl.ok("aclrtSetDevice", 0)
    memory, host, stream, event = acl.malloc(64), acl.host(64), acl.stream(), acl.event()
    old = acl.out("aclrtCreateEvent", OUT)
    acl.ok("aclrtRecordEvent", event, stream)
    acl.set("MISUSE", "error")
    plain = ctypes.create_string_buffer(64)
    calls = {
        "aclrtSynchronizeStreamWithTimeout": (stream, 1000),
        "aclrtSynchronizeEventWithTimeout": (event, 1000),
        "aclrtSynchronizeDeviceWithTimeout": (1000,),
        "aclrtMemcpy": (memory, 64, host, 64, HOST_TO_DEVICE),
        "aclrtMemcpyAsync": (memory, 64, plain, 64, HOST_TO_DEVICE, stream),
        "aclrtRecordEvent": (old, stream),
        "aclrtDestroyStream": (stream,),
        "aclrtStreamAbort": (stream,),
        "aclFinalize": (),
    }
    asynchronous = acl.aclrtMemcpyAsync(memory, 64, host, 64, HOST_TO_DEVICE, stream)
    return asynchronous, getattr(acl, name)(*calls[name]), acl.message()


@pytest.mark.parametrize(
    "name",
    [
        "aclrtSynchronizeStreamWithTimeout",
        "aclrtSynchronizeEventWithTimeout",
        "aclrtSynchronizeDeviceWithTimeout",
        "aclrtMemcpy",
        "aclrtMemcpyAsync",
        "aclrtRecordEvent",
        "aclrtDestroyStream",
        "aclrtStreamAbort",
        "aclFinalize",
    ],
)
def test_calls_that_wait_must_not_hold_the_interpreter(program, name):
    asynchronous, code, text = program(hold_interpreter=True, MISUSE="error").call(hold_interpreter, name)
    assert (asynchronous, code) == (0, 107000)
    assert name in text
    assert "interpreter lock" in text
