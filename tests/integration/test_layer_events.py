"""A prompt pushes layers while they are computed, on the host and on a fake of a device's stream."""

from __future__ import annotations

import numpy as np
import pytest

from llm_datadist import LLMStatusCode, TransferConfig
from llm_datadist.layer_events import LayerEvents
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.fake_task_queue import FakeEvent, FakeStream
from tests.pair import DECODER, Pair
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
LAYERS, SIZE = 4, 64 << 10
BEFORE, COMPUTED = 1, 2  # seeds of what stands in the prompt's cache before the model and after it
OLD = 3  # of what stands in the decoder's


# ---- in the prompt


def begin(state: dd.State, cache_id: int, addrs: list[int], on_stream: bool) -> None:
    """Start a transfer of all layers, before the model."""
    stream = FakeStream()
    make_event = (lambda: FakeEvent(stream)) if on_stream else None
    state.update(stream=stream, layers=LayerEvents(LAYERS, make_event), cache=state["caches"][cache_id])
    config = TransferConfig(DECODER, addrs)
    state["task"] = dd.manager(state).transfer_cache_async(state["cache"], state["layers"], [config])


def compute(state: dd.State, layer: int, seed: int = COMPUTED) -> None:
    for tensor in (2 * layer, 2 * layer + 1):
        tensor_view(state["cache"], tensor).reshape(-1)[:] = dd.payload(seed, tensor, SIZE)


def compute_on_host(state: dd.State) -> None:
    for layer in range(LAYERS):
        compute(state, layer)
        state["layers"].record(layer)


def launch_all(state: dd.State) -> None:
    """Give the whole model to the stream, as a program does that is far ahead of the device."""
    for layer in range(LAYERS):
        state["stream"].launch(lambda layer=layer: compute(state, layer))
        state["layers"].record(layer)


def pass_on(state: dd.State) -> None:
    state["stream"].wait_for_queries(2)
    state["stream"].pass_on()
    state["stream"].wait_for_queries(2)


def compute_on_stream(state: dd.State, layer: int) -> None:
    """Let the device come to the end of a layer; returns when the transfer waits for the next one, or has ended."""
    state["stream"].compute(2)
    if layer + 1 < LAYERS:
        state["stream"].wait_for_queries(2)


def results(state: dd.State) -> list[LLMStatusCode | None]:
    answer: list[LLMStatusCode | None] = state["task"].get_results(10_000)
    return answer


def fail(state: dd.State) -> None:
    state["layers"].fail("out of memory")


def begin_again(state: dd.State, cache_id: int, addrs: list[int]) -> None:
    state["layers"].reset()
    config = TransferConfig(DECODER, addrs)
    state["task"] = dd.manager(state).transfer_cache_async(state["cache"], state["layers"], [config])


# ---- the test


def start(pair: Pair, on_stream: bool) -> tuple[int, int, list[int]]:
    """Give the caches of prompt and decoder, and the addresses in the decoder."""
    source = pair.prompt.call(dd.allocate, 2 * LAYERS, (1, SIZE))
    pair.prompt.call(dd.fill, source, BEFORE)
    target = pair.decoder.call(dd.allocate, 2 * LAYERS, (1, SIZE))
    pair.decoder.call(dd.fill, target, OLD)
    addrs = pair.decoder.call(addresses, target)
    pair.prompt.call(begin, source, addrs, on_stream)
    return source, target, addrs


def addresses(state: dd.State, cache_id: int) -> list[int]:
    return list(state["caches"][cache_id].per_device_tensor_addrs[0])


def assert_layers(decoder: Member, cache: int, arrived: int) -> None:
    """Check that so many layers are what the model has computed, and the others the old ones."""
    for tensor in range(2 * LAYERS):
        seed = COMPUTED if tensor < 2 * arrived else OLD
        got = np.frombuffer(decoder.call(dd.read, cache, tensor), np.uint8)
        np.testing.assert_array_equal(got, dd.payload(seed, tensor, SIZE), f"tensor {tensor}")


def test_layers_that_the_host_computes(pair: Pair) -> None:
    source, target, addrs = start(pair, on_stream=False)
    pair.prompt.call(compute_on_host)
    assert pair.prompt.call(results) == [OK]
    assert_layers(pair.decoder, target, LAYERS)
    pair.decoder.call(dd.fill, target, OLD)
    pair.prompt.call(dd.fill, source, BEFORE)
    pair.prompt.call(begin_again, source, addrs)
    pair.prompt.call(compute_on_host)
    assert pair.prompt.call(results) == [OK]
    assert_layers(pair.decoder, target, LAYERS)


def test_layers_that_a_stream_computes_late(pair: Pair) -> None:
    """Everything is launched and recorded at once; bytes that leave before the device has come there would be old."""
    _, target, _ = start(pair, on_stream=True)
    pair.prompt.call(launch_all)
    pair.prompt.call(pass_on)
    assert_layers(pair.decoder, target, 0)
    for layer in range(LAYERS - 1):
        pair.prompt.call(compute_on_stream, layer)
        assert_layers(pair.decoder, target, layer + 1)
    pair.prompt.call(compute_on_stream, LAYERS - 1)
    assert pair.prompt.call(results) == [OK]
    assert_layers(pair.decoder, target, LAYERS)


@pytest.mark.parametrize("on_stream", [False, True])
def test_a_model_that_fails(pair: Pair, on_stream: bool) -> None:
    source, target, addrs = start(pair, on_stream)
    if on_stream:
        pair.prompt.call(launch_all)
        pair.prompt.call(pass_on)
    pair.prompt.call(fail)
    assert pair.prompt.call(results) == [LLMStatusCode.LLM_FAILED]
    assert_layers(pair.decoder, target, 0)
    pair.prompt.call(begin, source, addrs, False)
    pair.prompt.call(compute_on_host)
    assert pair.prompt.call(results) == [OK], "the link is as good as before"
    assert_layers(pair.decoder, target, LAYERS)
