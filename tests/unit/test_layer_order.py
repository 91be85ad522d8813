"""What a layer-wise transfer on a device waits for. A fake stands in for torch_npu, as its streams are documented."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator

import pytest

from llm_datadist.devices.ascend.layer_order import LayerOrder


class FakeDevice:
    """A device that notes in which threads it is current."""

    device_id = 3

    def __init__(self) -> None:
        self.current_in: list[threading.Thread] = []

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.current_in.append(threading.current_thread())
        yield
        self.current_in.pop()


class FakeEvent:
    """An event that the model has recorded, and that happens when the test says so."""

    def __init__(self) -> None:
        self.happened = threading.Event()

    def query(self) -> bool:
        return self.happened.is_set()

    def wait(self) -> None:
        """Let the current stream of the calling thread wait; does not block, as in torch_npu."""
        FakeStream.current().waits_for.append(self)


class FakeStream:
    _in_thread = threading.local()

    def __init__(self, device: int) -> None:
        self.device = device
        self.waits_for: list[FakeEvent] = []

    @classmethod
    def current(cls) -> FakeStream:
        return cls._in_thread.stream


class FakeRecorded:
    """An event that is recorded on a stream: it happens when everything has that the stream was told to wait for."""

    def record(self, stream: FakeStream) -> None:
        self.waits_for = list(stream.waits_for)

    def query(self) -> bool:
        return all(event.query() for event in self.waits_for)


@contextlib.contextmanager
def _stream(stream: FakeStream) -> Iterator[None]:
    FakeStream._in_thread.stream = stream
    yield
    del FakeStream._in_thread.stream


@pytest.fixture
def devices_set(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put the fake in the place of torch_npu; gives the devices that were made current in it."""
    made_current: list[int] = []
    npu = types.SimpleNamespace(set_device=made_current.append, Stream=FakeStream, Event=FakeRecorded, stream=_stream)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(npu=npu))
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace())
    return made_current


def run_in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_without_torch_npu_the_device_is_current_in_the_synchronizer() -> None:
    device, seen = FakeDevice(), []
    synchronize = LayerOrder(device, 1.0).wrap(lambda layer, _: seen.append((layer, list(device.current_in))) or True)
    assert synchronize(5, None)
    assert seen == [(5, [threading.current_thread()])]
    assert device.current_in == []


def test_an_event_that_only_a_stream_waits_for_holds_the_transfer_up(devices_set: list[int]) -> None:
    of_model = FakeEvent()

    def synchronize_layer(layer: int, _: None) -> bool:
        of_model.wait()
        return True

    synchronize = LayerOrder(FakeDevice(), 10.0).wrap(synchronize_layer)
    thread, results = run_in_thread(lambda: synchronize(0, None))
    thread.join(0.1)
    assert thread.is_alive()
    of_model.happened.set()
    thread.join(5)
    assert results == [True]
    assert devices_set == [FakeDevice.device_id]


def test_a_layer_that_failed_is_not_waited_for(devices_set: list[int]) -> None:
    def synchronize_layer(layer: int, _: None) -> bool:
        FakeEvent().wait()
        return False

    assert not LayerOrder(FakeDevice(), 10.0).wrap(synchronize_layer)(0, None)


def test_a_layer_that_never_comes_ends_in_a_timeout(devices_set: list[int]) -> None:
    def synchronize_layer(layer: int, _: None) -> bool:
        FakeEvent().wait()
        return True

    with pytest.raises(TimeoutError, match=r"layer 7 was not computed 0\.05 s after"):
        LayerOrder(FakeDevice(), 0.05).wrap(synchronize_layer)(7, None)


def test_what_a_synchronizer_raises_comes_through(devices_set: list[int]) -> None:
    def synchronize_layer(layer: int, _: None) -> bool:
        raise KeyError(layer)

    with pytest.raises(KeyError):
        LayerOrder(FakeDevice(), 1.0).wrap(synchronize_layer)(1, None)
