"""Waiting for layers: what counts as computed, how long a wait is, and what ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from llm_datadist.engine.transfer_job import Destination, LayerTransfer, TransferJob
from llm_datadist.layer_events import LayerEvents
from llm_datadist.status import LLMStatusCode
from tests.fake_task_queue import FakeEvent, FakeStream

PATIENCE_S = 10.0
LAYERS = 4


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """Start calls in threads of their own."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def wait_for_waiter(layers: LayerEvents, count: int = 1) -> None:
    """Wait until calls wait for a layer to be recorded."""
    give_up = time.monotonic() + PATIENCE_S
    while len(layers._changed._waiters) < count:  # type: ignore[attr-defined]
        assert time.monotonic() < give_up
        time.sleep(0.001)


def on_stream(**kwargs: Any) -> tuple[FakeStream, LayerEvents]:
    stream = FakeStream()
    return stream, LayerEvents(LAYERS, lambda: FakeEvent(stream), **kwargs)


# ---- on the host


def test_a_layer_is_computed_when_it_is_recorded() -> None:
    layers = LayerEvents(LAYERS)
    layers.record(1)
    assert layers.synchronize_layer(1, None) is True
    assert layers.synchronize_layer(1, 1) is True
    assert layers.synchronize_layer(0, 1) is False


def test_a_wait_ends_with_the_record(background: Callable[..., Future[bool]]) -> None:
    layers = LayerEvents(LAYERS)
    waits = [background(layers.synchronize_layer, layer, None) for layer in (0, 0, 1)]
    wait_for_waiter(layers, 3)
    layers.record(1)
    assert waits[2].result(PATIENCE_S) is True
    assert not waits[0].done()
    layers.record(0)
    assert [wait.result(PATIENCE_S) for wait in waits] == [True, True, True]


@pytest.mark.parametrize("given", [30, None])
def test_a_wait_ends_with_its_time(given: int | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llm_datadist")
    layers = LayerEvents(LAYERS, timeout_in_millis=30)
    began = time.monotonic()
    assert layers.synchronize_layer(2, given) is False
    assert 0.03 <= time.monotonic() - began < PATIENCE_S
    assert "layer 2 was not recorded within 30 ms" in caplog.text


def test_all_layers_from_one_thread_to_several(background: Callable[..., Future[Any]]) -> None:
    count = 200
    layers = LayerEvents(count)
    done: list[int] = []

    def transfer() -> list[bool]:
        answers = []
        for layer in range(count):
            answers.append(layers.synchronize_layer(layer, None))
            assert layer in done
        return answers

    waits = [background(transfer) for _ in range(4)]
    for layer in range(count):
        done.append(layer)
        layers.record(layer)
    assert [wait.result(PATIENCE_S) for wait in waits] == [[True] * count] * 4


# ---- on a stream


def test_an_event_is_waited_for_as_torch_sees_it(background: Callable[..., Future[bool]]) -> None:
    stream, layers = on_stream()
    stream.launch(lambda: None)  # the layer itself
    layers.record(0)
    wait = background(layers.synchronize_layer, 0, None)
    stream.wait_for_queries(3)
    assert layers._recorded[0].raw_query(), "the device has not seen the record"  # type: ignore[union-attr]
    assert not wait.done()
    stream.pass_on()
    stream.wait_for_queries(2)
    stream.compute(1)
    stream.wait_for_queries(2)
    assert not wait.done(), "the layer is computed, the record behind it not yet reached"
    stream.compute(1)
    assert wait.result(PATIENCE_S) is True


def test_a_layer_that_was_not_recorded_is_not_ready() -> None:
    stream, layers = on_stream()
    assert FakeEvent(stream).query(), "what an event says that nobody has recorded"
    assert layers.synchronize_layer(0, 20) is False


def test_a_device_that_does_not_come_to_the_event(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llm_datadist")
    stream, layers = on_stream()
    layers.record(0)
    stream.pass_on()
    began = time.monotonic()
    assert layers.synchronize_layer(0, 30) is False
    assert 0.03 <= time.monotonic() - began < PATIENCE_S
    assert "layer 0 was recorded, but not computed within 30 ms" in caplog.text
    stream.compute()
    assert layers.synchronize_layer(0, 1) is True


def test_the_stream_may_be_another_than_the_current_one() -> None:
    stream, layers = on_stream()
    other = FakeStream()
    layers.record(0, other)
    stream.pass_on()
    stream.compute()
    assert layers.synchronize_layer(0, 5) is False
    other.pass_on()
    other.compute()
    assert layers.synchronize_layer(0, None) is True


def test_an_event_that_cannot_be_recorded_or_asked() -> None:
    class Broken:
        def record(self) -> None:
            raise OSError("no event left")

        def query(self) -> bool:
            raise OSError("the device is lost")

    layers = LayerEvents(LAYERS, Broken)
    with pytest.raises(OSError, match="no event left"):
        layers.record(0)
    assert layers.synchronize_layer(0, 5) is False
    Broken.record = lambda self: None  # type: ignore[method-assign]
    layers.record(0)
    with pytest.raises(OSError, match="the device is lost"):
        layers.synchronize_layer(0, None)


# ---- the model fails, the next pass


def test_a_failure_ends_waits_and_later_ones(background: Callable[..., Future[bool]]) -> None:
    stream, layers = on_stream()
    layers.record(1)
    waits = [background(layers.synchronize_layer, layer, None) for layer in (0, 1)]
    stream.wait_for_queries(2)
    layers.fail(ValueError("a shape is wrong"))
    layers.fail("another one")
    for wait in waits:
        with pytest.raises(RuntimeError, match="^the model failed: ValueError: a shape is wrong$"):
            wait.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        layers.synchronize_layer(1, None)
    layers.reset()
    layers.record(0, stream)
    stream.pass_on()
    stream.compute()
    assert layers.synchronize_layer(0, None) is True


def test_a_failure_while_the_event_is_asked() -> None:
    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            layers.fail("in between")
            return True

    layers = LayerEvents(LAYERS, Event)
    layers.record(0)
    with pytest.raises(RuntimeError, match="in between"):
        layers.synchronize_layer(0, None)


def test_the_next_pass_begins_with_nothing(background: Callable[..., Future[bool]]) -> None:
    layers = LayerEvents(LAYERS)
    layers.record(0)
    wait = background(layers.synchronize_layer, 1, None)
    wait_for_waiter(layers)
    layers.reset()
    assert wait.result(PATIENCE_S) is False
    assert layers.synchronize_layer(0, 1) is False
    layers.record(0)
    assert layers.synchronize_layer(0, None) is True


def test_a_pass_that_ends_while_its_event_is_asked(background: Callable[..., Future[bool]]) -> None:
    stream, layers = on_stream()
    layers.record(0)
    wait = background(layers.synchronize_layer, 0, None)
    stream.wait_for_queries(2)
    layers.reset()
    assert wait.result(PATIENCE_S) is False


def test_a_record_that_ends_after_the_reset_does_not_count() -> None:
    class Event:
        def record(self) -> None:
            layers.reset()

        def query(self) -> bool:
            return True

    layers = LayerEvents(LAYERS, Event)
    layers.record(0)
    assert layers.synchronize_layer(0, 5) is False


def test_a_layer_is_recorded_once_in_a_pass() -> None:
    layers = LayerEvents(LAYERS)
    layers.record(3)
    with pytest.raises(RuntimeError, match=r"layer 3 is recorded already, call reset\(\)"):
        layers.record(3)
    layers.reset()
    layers.record(3)


# ---- arguments


def test_layers_that_do_not_exist() -> None:
    layers = LayerEvents(LAYERS)
    for layer in (-1, LAYERS):
        with pytest.raises(ValueError, match=rf"layer_index {layer} is out of range, should be in \[0, 4\)"):
            layers.record(layer)
        with pytest.raises(ValueError, match="layer_index"):
            layers.synchronize_layer(layer, None)
    with pytest.raises(TypeError, match="layer_index"):
        layers.record("0")  # type: ignore[arg-type]


def test_arguments() -> None:
    for wrong in (0, -1, 2**32):
        with pytest.raises(ValueError, match="num_layers"):
            LayerEvents(wrong)
        with pytest.raises(ValueError, match="timeout_in_millis"):
            LayerEvents(1, timeout_in_millis=wrong)
    with pytest.raises(TypeError, match="num_layers"):
        LayerEvents(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="make_event"):
        LayerEvents(1, FakeEvent(FakeStream()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="error"):
        LayerEvents(1).fail(None)  # type: ignore[arg-type]


# ---- what a transfer makes of it


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda layers: layers.record(1), LLMStatusCode.LLM_SUCCESS),
        (lambda layers: layers.fail("no memory"), LLMStatusCode.LLM_FAILED),
        (lambda layers: None, LLMStatusCode.LLM_PARAM_INVALID),
    ],
)
def test_the_result_of_a_transfer(end: Callable[[LayerEvents], None], code: LLMStatusCode) -> None:
    layers = LayerEvents(2, timeout_in_millis=20)
    layers.record(0)
    pushed: list[int] = []

    def push(*args: Any) -> None:
        layer = args[2][0] // 2
        pushed.append(layer)
        if layer == 0:  # what becomes of layer 1 is decided while layer 0 is on its way
            end(layers)

    job = TransferJob(LayerTransfer(7, (Destination(1, range(2), (1, 2, 3, 4), 0),), None, None, 0))
    job.run(layers.synchronize_layer, push)
    assert job.get_results(0) == [code]
    assert pushed == ([0, 1] if code is LLMStatusCode.LLM_SUCCESS else [0])
