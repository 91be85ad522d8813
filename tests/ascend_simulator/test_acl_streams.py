"""Streams and events: order, waiting, aborting, and errors that surface later."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from tests.ascend_simulator.acl import (
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    HOST_TO_HOST,
    SYNC,
    TIME_LINE,
    Acl,
    AclError,
)

MIB = 1 << 20


def copy_is_late(acl: Acl):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64), acl.stream()
    ctypes.memset(host, 1, 64)
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    status = ctypes.c_int32()
    acl.ok("aclrtStreamQuery", stream, ctypes.byref(status))
    early = acl.peek(memory, 1), status.value
    acl.sync(stream)
    acl.ok("aclrtStreamQuery", stream, ctypes.byref(status))
    return early, (acl.peek(memory, 1), status.value)


def test_asynchronous_is_visible(program):
    assert program(MIN_DELAY_US=300_000).call(copy_is_late) == ((b"\xa5", 1), (b"\x01", 0))


def copy_in_order(acl: Acl):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64 * 1000), acl.stream()
    for i in range(1000):
        ctypes.memset(host + 64 * i, i % 256, 64)
        acl.ok("aclrtMemcpyAsync", memory, 64, host + 64 * i, 64, HOST_TO_DEVICE, stream)
    acl.sync(stream)
    return acl.peek(memory, 64)


@pytest.mark.parametrize("jitter", [0, 30])
def test_tasks_of_a_stream_keep_their_order(program, jitter):
    assert program(JITTER_US=jitter).call(copy_in_order) == bytes([999 % 256]) * 64


def synchronise_too_short(acl: Acl):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64), acl.stream()
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    begin = time.monotonic()
    code = acl.aclrtSynchronizeStreamWithTimeout(stream, 50)
    took = time.monotonic() - begin
    acl.sync(stream)
    return code, took, acl.aclrtSynchronizeStreamWithTimeout(stream, -2)


def test_synchronise_ends_in_time(program):
    code, took, negative = program(FAULTS="exec.copy=delay(300)").call(synchronise_too_short)
    assert (code, negative) == (507046, 107000)
    assert 0.05 <= took < 0.25


def abort_a_copy(acl: Acl):
    acl.start()
    size = 64 * MIB
    memory, host, stream = acl.malloc(size), acl.host(size), acl.stream()
    ctypes.memset(host, 1, size)
    acl.set("PIECE_KIB", 1)
    acl.ok("aclrtMemcpyAsync", memory, size, host, size, HOST_TO_DEVICE, stream)
    acl.ok("aclrtMemcpyAsync", memory, size, host, size, HOST_TO_DEVICE, stream)
    codes = []
    waiting = threading.Thread(target=lambda: codes.append(_set_and_sync(acl, stream)))
    waiting.start()
    while acl.peek(memory, 1) != b"\x01":
        pass
    acl.ok("aclrtStreamAbort", stream)
    waiting.join()
    first = acl.peek(memory, size)
    codes += [
        acl.aclrtMemcpyAsync(memory, 64, host, 64, HOST_TO_DEVICE, stream),
        acl.aclrtSynchronizeStreamWithTimeout(stream, 1000),
        acl.llmdd_sim_idle(1000),
    ]
    unchanged = first == acl.peek(memory, size)
    acl.ok("aclrtDestroyStream", stream)
    fresh = acl.stream()
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, fresh)
    acl.sync(fresh)
    return codes, 0 < first.count(b"\x01") < size, unchanged


def _set_and_sync(acl: Acl, stream: int) -> int:
    acl.ok("aclrtSetDevice", 0)
    return acl.aclrtSynchronizeStreamWithTimeout(stream, 20000)


def test_abort_leaves_a_half_written_buffer_that_changes_no_more(program):
    assert program().call(abort_a_copy) == ([107023, 107023, 107023, 0], True, True)


def stop_a_task(acl: Acl):
    acl.start()
    memory, host, stream, event = acl.malloc(64), acl.host(64), acl.stream(), acl.event()
    ctypes.memset(host, 1, 64)
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    while not acl.count("fault.exec.copy"):
        pass
    acl.ok("aclrtRecordEvent", event, stream)
    acl.ok("aclrtStreamStop", stream)
    acl.ok("aclrtSynchronizeEventWithTimeout", event, 5000)
    return acl.peek(memory, 1)


def test_stop_ends_the_running_task_only(program):
    assert program(FAULTS="exec.copy=hang").call(stop_a_task) == b"\xa5"


def destroy_with_work(acl: Acl, by_force: bool):
    acl.start()
    size = 8 * MIB
    memory, host, stream = acl.malloc(size), acl.host(size), acl.stream()
    ctypes.memset(host, 1, size)
    for _ in range(4):
        acl.ok("aclrtMemcpyAsync", memory, size, host, size, HOST_TO_DEVICE, stream)
    acl.ok("aclrtDestroyStreamForce" if by_force else "aclrtDestroyStream", stream)
    return acl.peek(memory, size) == b"\x01" * size, acl.llmdd_sim_idle(0)


def test_destroy_waits_and_force_does_not(program):
    assert program(MIN_DELAY_US=50_000).call(destroy_with_work, False) == (True, 0)
    assert program(MIN_DELAY_US=10_000_000).call(destroy_with_work, True) == (False, 0)


def default_stream(acl: Acl):
    acl.start()
    memory, host = acl.malloc(64), acl.host(64)
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, None)
    handle = acl.out("aclrtCtxGetCurrentDefaultStream", ctypes.c_void_p)
    acl.sync(handle)
    return acl.aclrtDestroyStream(handle), acl.aclrtStreamStop(handle)


def test_default_stream(program):
    assert program().call(default_stream) == (107000, 107000)


def many_streams(acl: Acl):
    acl.start()
    streams = [acl.out("aclrtCreateStreamWithConfig", ctypes.c_void_p, 0, 3) for _ in range(512)]
    code = acl.aclrtCreateStream(ctypes.byref(ctypes.c_void_p()))
    event = acl.event()
    for stream in streams:
        acl.ok("aclrtRecordEvent", event, stream)
    for stream in streams:
        acl.ok("aclrtDestroyStream", stream)
    return code, acl.count("live.streams")


def test_512_streams(program):
    assert program(STREAMS=512).call(many_streams) == (207008, 0)


def wait_on_another_stream(acl: Acl, old: bool):
    acl.start()
    memory, other, host = acl.malloc(MIB), acl.malloc(MIB), acl.host(MIB)
    first, second = acl.stream(), acl.stream()
    event = acl.out("aclrtCreateEvent", ctypes.c_void_p) if old else acl.event()
    wrong = 0
    for i in range(20):
        ctypes.memset(host, i + 1, MIB)
        acl.ok("aclrtMemcpyAsync", memory, MIB, host, MIB, HOST_TO_DEVICE, first)
        acl.ok("aclrtRecordEvent", event, first)
        acl.ok("aclrtStreamWaitEvent", second, event)
        acl.ok("aclrtMemcpyAsync", other, MIB, memory, MIB, DEVICE_TO_DEVICE, second)
        if old:
            acl.ok("aclrtResetEvent", event, second)
        acl.sync(second)
        wrong += acl.peek(other, MIB) != bytes([i + 1]) * MIB
    return wrong, acl.aclrtResetEvent(event, second)


@pytest.mark.parametrize("old", [False, True])
def test_a_stream_waits_for_an_event(program, old):
    assert program(JITTER_US=2000).call(wait_on_another_stream, old) == (0, 0 if old else 107000)


def record_often(acl: Acl):
    acl.start()
    first, second, event = acl.stream(), acl.stream(), acl.event()
    for _ in range(10_000):
        acl.ok("aclrtRecordEvent", event, first)
        acl.ok("aclrtStreamWaitEvent", second, event)
    acl.sync(first)
    acl.sync(second)
    acl.ok("aclrtDestroyEvent", event)
    return acl.count("live.events")


def test_an_event_is_recorded_and_waited_for_10000_times(program):
    assert program(MIN_DELAY_US=0).call(record_often) == 0


def look_at_events(acl: Acl):
    acl.start()
    stream, event = acl.stream(), acl.event()
    status, seen = ctypes.c_int32(), []
    acl.ok("aclrtQueryEventStatus", event, ctypes.byref(status))
    seen.append(status.value)
    acl.ok("aclrtRecordEvent", event, stream)
    acl.ok("aclrtQueryEventStatus", event, ctypes.byref(status))
    seen += [
        status.value,
        acl.aclrtSynchronizeEventWithTimeout(event, 0),
        acl.aclrtSynchronizeEventWithTimeout(event, -2),
    ]
    acl.sync(stream)
    acl.ok("aclrtQueryEventStatus", event, ctypes.byref(status))
    return [*seen, status.value, acl.aclrtSynchronizeEventWithTimeout(event, 0)]


def test_events_say_complete_with_one_and_look_once(program):
    assert program(MIN_DELAY_US=200_000).call(look_at_events) == [1, 0, 507047, 107000, 1, 0]


def wait_for_dropped_record(acl: Acl):
    acl.start()
    first, second, event = acl.stream(), acl.stream(), acl.event()
    acl.ok("aclrtRecordEvent", event, first)
    acl.ok("aclrtStreamWaitEvent", second, event)
    acl.ok("aclrtStreamAbort", first)
    codes = [acl.aclrtSynchronizeStreamWithTimeout(second, 50), acl.aclrtSynchronizeEventWithTimeout(event, 20)]
    acl.ok("aclrtStreamAbort", second)
    return [*codes, acl.llmdd_sim_idle(1000)]


def test_who_waits_behind_dropped_tasks_hangs_until_aborted(program):
    assert program(MIN_DELAY_US=200_000).call(wait_for_dropped_record) == [507046, 507047, 0]


def record_on_aborted_stream(acl: Acl):
    acl.start()
    stream, event = acl.stream(), acl.event()
    acl.ok("aclrtRecordEvent", event, stream)
    acl.sync(stream)
    acl.ok("aclrtStreamAbort", stream)
    return acl.aclrtRecordEvent(event, stream), acl.aclrtSynchronizeEventWithTimeout(event, 0)


def test_refused_record_leaves_the_event_as_it_was(program):
    assert program().call(record_on_aborted_stream) == (107023, 0)


def wait_with_limit(acl: Acl):
    acl.start()
    first, second, event = acl.stream(), acl.stream(), acl.event()
    acl.ok("aclrtRecordEvent", event, first)
    acl.ok("aclrtStreamWaitEventWithTimeout", second, event, 1)
    return acl.aclrtSynchronizeStreamWithTimeout(second, 5000), acl.aclrtStreamWaitEventWithTimeout(second, event, -1)


def test_wait_on_the_device_counts_seconds(program):
    assert program(FAULTS="exec.event=hang").call(wait_with_limit) == (107019, 107000)


def use_up_old_events(acl: Acl):
    acl.start()
    events = [acl.out("aclrtCreateEvent", ctypes.c_void_p) for _ in range(3)]
    code = acl.aclrtCreateEvent(ctypes.byref(ctypes.c_void_p()))
    acl.event()
    acl.ok("aclrtDestroyEvent", events[0])
    return code, acl.aclrtCreateEvent(ctypes.byref(ctypes.c_void_p()))


def test_old_events_are_few(program):
    assert program(EVENTS=3).call(use_up_old_events) == (207007, 0)


def measure(acl: Acl):
    acl.start()
    stream, begin, end = acl.stream(), acl.event(TIME_LINE), acl.event(TIME_LINE)
    milliseconds = ctypes.c_float()
    early = acl.aclrtEventElapsedTime(ctypes.byref(milliseconds), begin, end)
    acl.ok("aclrtRecordEvent", begin, stream)
    acl.ok("aclrtMemcpyAsync", acl.malloc(64), 64, acl.host(64), 64, HOST_TO_DEVICE, stream)
    acl.ok("aclrtRecordEvent", end, stream)
    acl.sync(stream)
    acl.ok("aclrtEventElapsedTime", ctypes.byref(milliseconds), begin, end)
    without = acl.aclrtEventElapsedTime(ctypes.byref(milliseconds), acl.event(SYNC), end)
    return early, milliseconds.value, without, acl.aclrtStreamWaitEvent(stream, begin)


def test_time_between_events(program):
    early, milliseconds, without_flag, wait_without_flag = program(FAULTS="exec.copy=delay(40)").call(measure)
    assert (early, without_flag, wait_without_flag) == (507006, 107000, 107000)
    assert 40 <= milliseconds < 1000


def fail_a_task(acl: Acl):
    acl.start()
    memory, host, stream, event = acl.malloc(64), acl.host(64), acl.stream(), acl.event()
    ctypes.memset(host, 1, 64)
    for i in range(3):
        acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
        if i == 1:
            acl.ok("aclrtRecordEvent", event, stream)
    codes = []
    for _ in range(2):
        try:
            acl.sync(stream)
        except AclError as error:
            codes.append((error.code, str(error)))
    status = ctypes.c_int32()
    return codes, acl.aclrtStreamQuery(stream, ctypes.byref(status)), acl.peek(memory, 1)


def test_an_error_surfaces_at_the_synchronise_and_stays(program):
    codes, query, byte = program(FAULTS="exec.copy#2=code(507053)").call(fail_a_task)
    assert [code for code, _ in codes] == [507053, 507053]
    assert "aclrtMemcpyAsync failed" in codes[0][1]
    assert (query, byte) == (507053, b"\x01")


def copy_pageable(acl: Acl):
    acl.start()
    memory, pinned, stream = acl.malloc(MIB), acl.host(MIB), acl.stream()
    ctypes.memset(pinned, 1, MIB)
    plain = ctypes.create_string_buffer(MIB)
    acl.ok("aclrtMemcpyAsync", memory, MIB, pinned, MIB, HOST_TO_DEVICE, stream)
    acl.ok("aclrtMemcpyAsync", plain, MIB, memory, MIB, DEVICE_TO_HOST, stream)
    return plain.raw == b"\x01" * MIB, acl.aclrtMemcpyAsync(pinned, 64, pinned + 64, 64, HOST_TO_HOST, stream)


def test_pageable_memory_makes_a_copy_synchronous(program):
    assert program(MIN_DELAY_US=20_000).call(copy_pageable) == (True, 207000)


def idle(acl: Acl):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64), acl.stream()
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    return acl.llmdd_sim_idle(10), acl.llmdd_sim_idle(5000), acl.aclrtSynchronizeDeviceWithTimeout(100)


def test_idle(program):
    assert program(MIN_DELAY_US=300_000).call(idle) == (507046, 0, 0)
