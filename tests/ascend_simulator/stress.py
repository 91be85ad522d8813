"""Everything at once, for the sanitizers: ``python -m tests.ascend_simulator.stress <library> [key]``.

Threads copy, wait for each other's events, abort, and free on two devices, while a second process reads and writes
through an import. Ends with status 0 if all bytes were right and nothing was left.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import threading

from tests.ascend_simulator.acl import (
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    SYNC,
    TIME_LINE,
    Acl,
)

ROUNDS = 10
SIZE = 300_000
POOL = 4 << 20


def copy_and_wait(acl: Acl, device: int, number: int, wrong: list[str]) -> None:
    """Out and back over two streams that an event connects."""
    chance = random.Random(number)
    acl.ok("aclrtSetDevice", device)
    there, back, event = acl.stream(), acl.stream(), acl.event(SYNC | TIME_LINE)
    source, target, memory = acl.host(SIZE), acl.host(SIZE), acl.malloc(SIZE)
    for turn in range(ROUNDS):
        size = chance.randrange(1, SIZE)
        fill = (number * 37 + turn) % 256
        ctypes.memset(source, fill, size)
        acl.ok("aclrtMemcpyAsync", memory, SIZE, source, size, HOST_TO_DEVICE, there)
        acl.ok("aclrtRecordEvent", event, there)
        acl.ok("aclrtStreamWaitEvent", back, event)
        acl.ok("aclrtMemcpyAsync", target, SIZE, memory, size, DEVICE_TO_HOST, back)
        acl.sync(back)
        if ctypes.string_at(target, size) != bytes([fill]) * size:
            wrong.append(f"thread {number}, turn {turn}")
        acl.ok("aclrtSynchronizeEventWithTimeout", event, 1000)
    for name, each in [("Event", event), ("Stream", there), ("Stream", back)]:
        acl.ok(f"aclrtDestroy{name}", each)
    acl.ok("aclrtFree", memory)
    acl.ok("aclrtFreeHost", source)
    acl.ok("aclrtFreeHost", target)
    acl.ok("aclrtResetDevice", device)


def abort_and_begin_again(acl: Acl, device: int, number: int, wrong: list[str]) -> None:
    """Abort streams in the middle, while another thread waits for them."""
    acl.ok("aclrtSetDevice", device)
    first, second = acl.malloc(SIZE), acl.malloc(SIZE)
    for turn in range(ROUNDS):
        stream = acl.stream()
        waiting = threading.Thread(target=wait, args=(acl, device, stream, wrong))
        for _ in range(4):
            acl.ok("aclrtMemcpyAsync", first, SIZE, second, SIZE, DEVICE_TO_DEVICE, stream)
        waiting.start()
        acl.ok("aclrtStreamAbort", stream)
        before = acl.peek(first, 64)
        waiting.join()
        acl.ok("aclrtMemset", second, SIZE, turn, SIZE)
        if acl.peek(first, 64) != before:
            wrong.append(f"thread {number}: written after the abort")
        acl.ok("aclrtDestroyStreamForce", stream)
    acl.ok("aclrtFree", first)
    acl.ok("aclrtFree", second)
    acl.ok("aclrtResetDevice", device)


def wait(acl: Acl, device: int, stream: int, wrong: list[str]) -> None:
    acl.ok("aclrtSetDevice", device)
    code = acl.aclrtSynchronizeStreamWithTimeout(stream, 20000)
    if code not in (0, 107023):
        wrong.append(f"a wait gave {code}")
    acl.ok("aclrtResetDevice", device)


def allocate(acl: Acl, device: int, number: int, wrong: list[str]) -> None:
    chance = random.Random(number)
    acl.ok("aclrtSetDevice", device)
    for _ in range(ROUNDS):
        held = [acl.malloc(chance.randrange(1, 100_000)) for _ in range(8)]
        chance.shuffle(held)
        for address in held:
            acl.ok("aclrtFree", address)
    acl.ok("aclrtResetDevice", device)


def work_through_import(acl: Acl, key: bytes) -> None:
    """The second process."""
    acl.start(1)
    imported, own, stream = acl.out("aclrtIpcMemImportByKey", ctypes.c_void_p, key, 1), acl.malloc(POOL), acl.stream()
    for turn in range(ROUNDS):
        acl.ok("aclrtMemset", own, POOL, turn, POOL)
        acl.ok("aclrtMemcpyAsync", imported, POOL, own, POOL, DEVICE_TO_DEVICE, stream)
        acl.ok("aclrtMemsetAsync", own, POOL, 255, POOL, stream)
        acl.ok("aclrtMemcpyAsync", own, POOL, imported, POOL, DEVICE_TO_DEVICE, stream)
        acl.sync(stream)
        assert acl.peek(own, POOL) == bytes([turn]) * POOL
    acl.ok("aclrtDestroyStream", stream)
    acl.ok("aclrtFree", own)
    acl.ok("aclrtIpcMemClose", key)


def work(acl: Acl) -> None:
    acl.start()
    pool, key = acl.malloc(POOL), ctypes.create_string_buffer(65)
    acl.ok("aclrtIpcMemGetExportKey", pool, POOL, key, 65, 1)
    command = [sys.executable, "-m", "tests.ascend_simulator.stress", acl.path, key.value.decode()]
    wrong: list[str] = []
    bodies = [copy_and_wait, copy_and_wait, abort_and_begin_again, allocate]
    with subprocess.Popen(command) as other:
        threads = [
            threading.Thread(target=body, args=(acl, number % 2, number, wrong))
            for number, body in enumerate(bodies * 2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.wait() == 0, "the second process failed"
    assert acl.peek(pool, 64) == bytes([ROUNDS - 1]) * 64
    assert not wrong, wrong
    acl.ok("aclrtIpcMemClose", key.value)
    acl.ok("aclrtFree", pool)


if __name__ == "__main__":
    library = Acl(sys.argv[1])
    if len(sys.argv) > 2:
        work_through_import(library, sys.argv[2].encode())
    else:
        work(library)
    library.ok("aclrtResetDevice", len(sys.argv) - 2)
    library.ok("aclFinalize")
