"""Streams and events of a device: bounded waits, aborts, and errors that appear later."""

from __future__ import annotations

import ctypes
import time

import pytest

from llm_datadist._acl import AclError, Device, DeviceMemory, Event, PinnedMemory, Stream
from tests.on_simulator import counter, on_simulator, raw, set_knob, soon

MIB = 1 << 20
TO_DEVICE = 1
SYNC_TIMEOUT = 507046
EVENT_TIMEOUT = 507047


class Rig:
    """A device with one buffer on each side."""

    def __init__(self, nbytes: int = 1 * MIB) -> None:
        self.nbytes = nbytes
        self.device = Device(0)
        self.memory = DeviceMemory(self.device, nbytes)
        self.pinned = PinnedMemory(self.device, nbytes)
        self.stream = Stream(self.device)

    def enqueue(self, stream: Stream | None = None) -> None:
        target, source, size = ctypes.c_void_p(self.memory.address), ctypes.c_void_p(self.pinned.address), self.nbytes
        handle = ctypes.c_void_p((stream or self.stream).pointer)
        with self.device.current():
            code = raw().aclrtMemcpyAsync(
                target, ctypes.c_size_t(size), source, ctypes.c_size_t(size), TO_DEVICE, handle
            )
        assert code == 0

    def close(self) -> None:
        for thing in (self.stream, self.memory, self.pinned, self.device):
            thing.close()


@on_simulator()
def test_a_wait_ends_at_its_deadline_and_a_later_one_succeeds() -> None:
    rig = Rig()
    set_knob("MIN_DELAY_US", 1_000_000)
    rig.enqueue()
    begin = time.monotonic()
    with pytest.raises(AclError) as late:
        rig.stream.synchronise(soon(0.05))
    assert late.value.code == SYNC_TIMEOUT
    assert 0.04 < time.monotonic() - begin < 0.9
    with pytest.raises(AclError) as at_once:
        rig.stream.synchronise(0)
    assert at_once.value.code == SYNC_TIMEOUT
    rig.stream.synchronise(soon())
    assert counter("misuse.unbounded_wait") == 0
    rig.close()


@on_simulator()
def test_the_error_of_a_task_comes_with_the_next_wait() -> None:
    rig = Rig()
    set_knob("FAULTS", "exec.copy#1=code(507013)")
    rig.enqueue()
    with pytest.raises(AclError) as error:
        rig.stream.synchronise(soon())
    assert error.value.code == 507013
    assert "507013" in str(error.value)
    rig.close()


@on_simulator()
def test_after_an_abort_nothing_moves_and_a_new_stream_works() -> None:
    rig = Rig(8 * MIB)
    set_knob("FAULTS", "exec.copy#2=hang")
    for _ in range(3):
        rig.enqueue()
    with pytest.raises(AclError):
        rig.stream.synchronise(soon(0.02))
    rig.stream.cancel()
    set_knob("FAULTS", "")
    rig.stream.close()
    assert counter("calls.aclrtDestroyStreamForce") == 1
    rig.stream = Stream(rig.device)
    rig.enqueue()
    rig.stream.synchronise(soon())
    rig.close()


@on_simulator()
def test_closing_a_busy_stream_does_not_wait_for_it() -> None:
    rig = Rig()
    set_knob("FAULTS", "exec.copy=hang")
    rig.enqueue()
    begin = time.monotonic()
    rig.stream.close()
    assert time.monotonic() - begin < 5.0
    rig.close()


@pytest.mark.parametrize("variant", ["", "old"])
def test_a_stream_waits_for_an_event_of_another(variant: str) -> None:
    on_simulator(variant)(stream_after_stream)(newer=variant == "")


def stream_after_stream(newer: bool) -> None:
    rig = Rig()
    second = Stream(rig.device)
    event = Event(rig.device)
    assert event.reusable == newer
    for step in (lambda: event.hold_up(second), lambda: event.synchronise(soon()), lambda: event.complete):
        with pytest.raises(AclError, match="never recorded"):
            step()
    for delay_us in (300_000, 0):  # an event serves again and again
        set_knob("MIN_DELAY_US", delay_us)
        rig.enqueue()
        event.mark(rig.stream)
        event.hold_up(second)
        rig.enqueue(second)
        if delay_us:
            with pytest.raises(AclError) as late:
                event.synchronise(0)
            assert late.value.code == EVENT_TIMEOUT
            assert not event.complete
        event.synchronise(soon())
        assert event.complete
        second.synchronise(soon())
    second.close()
    event.close()
    event.close()
    rig.close()


@pytest.mark.parametrize("variant", ["", "old"])
def test_an_event_can_be_recorded_very_often(variant: str) -> None:
    on_simulator(variant, EVENTS=4, MIN_DELAY_US=0)(many_records)()


def many_records() -> None:
    device = Device(0)
    stream, event = Stream(device), Event(device)
    for _ in range(2000):
        event.mark(stream)
        event.synchronise(soon())
    stream.close()
    event.close()
    device.close()


@on_simulator(STREAMS=520)
def test_as_many_streams_as_links() -> None:
    device = Device(0)
    streams = [Stream(device) for _ in range(512)]
    assert len({stream.pointer for stream in streams}) == 512
    for stream in streams:
        stream.close()
    assert streams[0].pointer == 0
    set_knob("STREAMS", 0)
    with pytest.raises(AclError) as refused:
        Stream(device)
    assert refused.value.code == 207008
    device.close()
