"""Errors on order: every action at the places of ACL."""

from __future__ import annotations

import ctypes
import signal
import threading
import time

import pytest

from tests.ascend_simulator.acl import DEVICE_TO_HOST, HOST_TO_DEVICE, Acl

MIB = 1 << 20


def malloc_often(acl: Acl, times: int):
    acl.start()
    codes = [acl.aclrtMalloc(ctypes.byref(ctypes.c_void_p()), 64, 0) for _ in range(times)]
    return codes, acl.count("fault.aclrtMalloc"), acl.count("calls.aclrtMalloc"), acl.count("live.allocations")


@pytest.mark.parametrize(
    ("faults", "failing"),
    [
        ("aclrtMalloc#3=code(207001)", [3]),
        ("aclrtMalloc#3+=code(207001)", [3, 4, 5]),
        ("aclrtMalloc=code(207001)", [1, 2, 3, 4, 5]),
        ("aclrtMalloc@0#2=code(207001)", [2]),
        ("aclrtMalloc@1=code(207001)", []),
        ("aclrtMalloc#1=code(207001); aclrtMalloc#4=code(207001);", [1, 4]),
    ],
)
def test_which_occurrence(program, faults, failing):
    codes, struck, called, alive = program(FAULTS=faults).call(malloc_often, 5)
    assert codes == [207001 if n in failing else 0 for n in range(1, 6)]
    assert (struck, called, alive) == (len(failing), 5, 5 - len(failing))


def init_twice(acl: Acl):
    return [acl.aclInit(None), acl.aclrtSetDevice(0), acl.aclInit(None), acl.aclrtSetDevice(0)]


def test_failing_initialisation_initialises_nothing(program):
    assert program(FAULTS="aclInit=code(500000)").call(init_twice) == [500000, 100001, 500000, 100001]


def set_two_devices(acl: Acl):
    acl.ok("aclInit", None)
    return [acl.aclrtSetDevice(device) for device in (0, 1, 0)]


def test_fault_of_set_device_means_the_device_that_is_set(program):
    assert program(FAULTS="aclrtSetDevice@1=code(507033)").call(set_two_devices) == [0, 507033, 0]


def test_probability_comes_from_the_seed(program):
    runs = [program(FAULTS="aclrtMalloc%0.5=code(207001)", SEED=seed).call(malloc_often, 64)[0] for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert 10 < runs[0].count(0) < 54


def copy_under_fault(acl: Acl, asynchronous: bool):
    acl.start()
    memory, host, stream = acl.malloc(4096), acl.host(4096), acl.stream()
    ctypes.memset(host, 1, 4096)
    if asynchronous:
        acl.ok("aclrtMemcpyAsync", memory, 4096, host, 4096, HOST_TO_DEVICE, stream)
        code = acl.aclrtSynchronizeStreamWithTimeout(stream, 10000)
    else:
        code = acl.aclrtMemcpy(memory, 4096, host, 4096, HOST_TO_DEVICE)
    got = acl.peek(memory, 4096)
    return code, got.count(b"\x01"), got[:2048].count(b"\x01"), acl.count("fault.exec.copy")


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("action", "code", "right", "right_in_front"),
    [
        ("code(507053)", 507053, 0, 0),
        ("drop", 0, 0, 0),
        ("half", 507057, 2048, 2048),
        ("delay(20)", 0, 4096, 2048),
    ],
)
def test_faults_of_a_copy(program, asynchronous, action, code, right, right_in_front):
    assert program(FAULTS=f"exec.copy={action}").call(copy_under_fault, asynchronous) == (
        code,
        right,
        right_in_front,
        1,
    )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_corrupt_copy(program, asynchronous):
    code, right, _, struck = program(FAULTS="exec.copy=corrupt").call(copy_under_fault, asynchronous)
    assert (code, right, struck) == (0, 4095, 1)


def hang_and_release(acl: Acl, how: str):
    acl.start()
    memory, host, stream = acl.malloc(64), acl.host(64), acl.stream()
    acl.ok("aclrtMemcpyAsync", memory, 64, host, 64, HOST_TO_DEVICE, stream)
    codes = [acl.aclrtSynchronizeStreamWithTimeout(stream, 100)]
    acl.ok(how, stream)
    return [*codes, acl.llmdd_sim_idle(1000), acl.peek(memory, 1)]


@pytest.mark.parametrize("how", ["aclrtStreamAbort", "aclrtDestroyStream", "aclrtDestroyStreamForce"])
def test_hanging_task_ends_with_its_stream(program, how):
    assert program(FAULTS="exec.copy=hang").call(hang_and_release, how) == [507046, 0, b"\xa5"]


def finalize_under_hang(acl: Acl):
    acl.start()
    acl.ok("aclrtMemcpyAsync", acl.malloc(64), 64, acl.host(64), 64, HOST_TO_DEVICE, acl.stream())
    return acl.aclFinalize()


def test_hanging_task_ends_with_finalize(program):
    assert program(FAULTS="exec.copy=hang", MISUSE="error").call(finalize_under_hang) == 107000


def hang_in_call(acl: Acl):
    acl.start()
    stream = acl.stream()
    codes = []

    def wait():
        acl.ok("aclrtSetDevice", 0)
        codes.append(acl.aclrtSynchronizeStreamWithTimeout(stream, 1000))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not acl.count("fault.aclrtSynchronizeStreamWithTimeout"):
        time.sleep(0.001)
    acl.ok("aclrtStreamAbort", stream)
    waiting.join()
    return codes


def test_hanging_call_ends_with_the_abort_of_its_stream(program):
    assert program(FAULTS="aclrtSynchronizeStreamWithTimeout=hang").call(hang_in_call) == [107023]


@pytest.mark.parametrize("place", ["exec.copy", "aclrtMemcpyAsync", "exec.event#1"])
def test_kill(program, place):
    program(FAULTS=f"{place}=kill").aborts(copy_and_record, by=signal.SIGKILL)


def copy_and_record(acl: Acl):
    acl.start()
    stream, event = acl.stream(), acl.event()
    acl.ok("aclrtMemcpyAsync", acl.malloc(64), 64, acl.host(64), 64, HOST_TO_DEVICE, stream)
    acl.ok("aclrtRecordEvent", event, stream)
    acl.sync(stream)


def drop_record(acl: Acl):
    acl.start()
    stream, event = acl.stream(), acl.event()
    acl.ok("aclrtRecordEvent", event, stream)
    acl.sync(stream)
    early = acl.aclrtSynchronizeEventWithTimeout(event, 0)
    acl.ok("aclrtRecordEvent", event, stream)
    return early, acl.aclrtSynchronizeEventWithTimeout(event, 5000)


def test_dropped_record(program):
    assert program(FAULTS="exec.event#1=drop").call(drop_record) == (507047, 0)


def delayed_call(acl: Acl):
    acl.ok("aclInit", None)
    begin = time.monotonic()
    acl.ok("aclrtSetDevice", 0)
    return time.monotonic() - begin


def test_delayed_call(program):
    assert program(FAULTS="aclrtSetDevice=delay(50)").call(delayed_call) >= 0.05


def read_under_faults(acl: Acl, rounds: int):
    acl.start()
    size = 65536
    memory, host, stream = acl.malloc(size), acl.host(size), acl.stream()
    acl.poke(memory, b"k" * size)
    wrong = 0
    for _ in range(rounds):
        ctypes.memset(host, 0, size)
        acl.ok("aclrtMemcpyAsync", host, size, memory, size, DEVICE_TO_HOST, stream)
        acl.sync(stream)
        wrong += ctypes.string_at(host, size) != b"k" * size
    return wrong, acl.count("fault.exec.copy")


def test_each_wrong_copy_shows_in_the_bytes(program):
    """Tests of the package rely on it: comparing bytes finds what a fault did."""
    for action in ("drop", "corrupt"):
        wrong, struck = program(FAULTS=f"exec.copy%0.2={action}").call(read_under_faults, 60)
        assert wrong == struck > 0
