"""transfer_cache_async: a prompt writes, layer by layer, into the caches of a decoder in another process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    CacheDesc,
    CacheKey,
    CacheTask,
    DataType,
    KvCache,
    KvCacheManager,
    LayerSynchronizer,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.introspection import describe_links
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.conftest import Serving, Start, StartRemote
from tests.conformance.expectations import (
    INVALID,
    INVALID_ID,
    LINKED,
    LITTLE_S,
    NOT_EXIST,
    NOT_LINKED,
    OK,
    TIMEOUT,
    outcome,
    wait_until,
)
from tests.conformance.remote import DECODER, PROMPT, SENTINEL, SHAPE, SLOTS, STRIDE, payload_slot
from tests.processes import Member

TENSORS, LAYERS = 8, 4
ENOUGH_MS = 10_000


class Ready(LayerSynchronizer):
    """Every layer is there already; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int | None, int]] = []

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        self.calls.append((layer_index, timeout_in_millis, threading.get_ident()))
        return True


class Computing(LayerSynchronizer):
    """Calls a function of the test for each layer."""

    def __init__(self, compute: Callable[[int], Any]) -> None:
        self._compute = compute

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return bool(self._compute(layer_index))


def source_cache(manager: KvCacheManager, tensors: int = TENSORS, shape: tuple[int, int] = SHAPE) -> KvCache:
    """Allocate a cache with the bytes of seed 1."""
    cache = manager.allocate_cache(CacheDesc(tensors, shape, DataType.DT_UINT8))
    for tensor in range(tensors):
        tensor_view(cache, tensor)[:] = dd.payload(1, tensor, shape[0] * shape[1]).reshape(shape)
    return cache


def addresses_of(state: dd.State, cache_id: int) -> list[int]:
    return list(state["caches"][cache_id].per_device_tensor_addrs[0])


def fill_with_sentinel(state: dd.State, cache_id: int) -> None:
    cache = state["caches"][cache_id]
    for tensor in range(cache.cache_desc.num_tensors):
        tensor_view(cache, tensor)[:] = SENTINEL


class Destination:
    """A cache of the decoder: its addresses, and what is in it."""

    def __init__(self, serving: Serving, tensors: int = TENSORS, shape: tuple[int, int] = SHAPE) -> None:
        self._call = serving.decoder.call
        self._shape = shape
        self.cache_id = self._call(dd.allocate, tensors, shape)
        self._call(fill_with_sentinel, self.cache_id)
        self.addresses: list[int] = self._call(addresses_of, self.cache_id)

    def slot(self, tensor: int, index: int) -> bytes:
        stride = self._shape[1]
        return bytes(self._call(dd.read, self.cache_id, tensor)[index * stride : (index + 1) * stride])

    def untouched(self, *tensors: int) -> bool:
        whole = bytes([SENTINEL]) * (self._shape[0] * self._shape[1])
        return all(self._call(dd.read, self.cache_id, tensor) == whole for tensor in tensors)


def test_C209_all_layers(serving: Serving) -> None:
    there = Destination(serving)
    config = TransferConfig(DECODER, [address + 2 * STRIDE for address in there.addresses], None, 1)
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), Ready(), [config])
    assert isinstance(task, CacheTask)
    assert task.synchronize(ENOUGH_MS) is OK
    assert task.get_results() == [OK]
    for tensor in range(TENSORS):
        assert there.slot(tensor, 2) == payload_slot(1, tensor, 1)
        assert {there.slot(tensor, index) for index in (0, 1, 3)} == {bytes([SENTINEL]) * STRIDE}


def test_C210_layers_in_order_on_another_thread(serving: Serving) -> None:
    there, ready = Destination(serving), Ready()
    configs = [TransferConfig(DECODER, there.addresses)] * 2
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), ready, configs)
    assert task.synchronize(ENOUGH_MS) is OK
    assert [(layer, timeout) for layer, timeout, _ in ready.calls] == [(layer, None) for layer in range(LAYERS)]
    assert threading.get_ident() not in {thread for _, _, thread in ready.calls}


def test_C211_a_layer_is_read_after_its_synchronize(serving: Serving) -> None:
    there, cache = Destination(serving), source_cache(serving.manager)

    def compute(layer: int) -> bool:
        for tensor in (2 * layer, 2 * layer + 1):
            tensor_view(cache, tensor)[0] = 100 + tensor
        return True

    task = serving.manager.transfer_cache_async(cache, Computing(compute), [TransferConfig(DECODER, there.addresses)])
    assert task.synchronize(ENOUGH_MS) is OK
    for tensor in range(TENSORS):
        assert there.slot(tensor, 0) == bytes([100 + tensor]) * STRIDE


def test_C212_a_running_task(serving: Serving) -> None:
    there, go_on = Destination(serving), threading.Event()
    configs = [TransferConfig(DECODER, there.addresses), TransferConfig(DECODER, there.addresses[:2], range(1))]
    synchronizer = Computing(lambda layer: go_on.wait(20))
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), synchronizer, configs)
    assert task.synchronize(0) is TIMEOUT
    assert task.get_results(0) == [TIMEOUT, TIMEOUT]
    go_on.set()
    assert task.synchronize(ENOUGH_MS) is OK
    assert task.get_results(ENOUGH_MS) == [OK, OK]


def test_C213_a_failed_layer(serving: Serving) -> None:
    there = Destination(serving)
    configs = [
        TransferConfig(DECODER, there.addresses[:6], range(3)),
        TransferConfig(DECODER, there.addresses[4:8], range(2, 4)),
    ]
    synchronizer = Computing(lambda layer: layer != 0)
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), synchronizer, configs)
    assert task.get_results(ENOUGH_MS) == [INVALID, None]
    assert task.synchronize() is INVALID
    assert there.untouched(*range(TENSORS))


def test_C214_one_layer(serving: Serving) -> None:
    there, ready = Destination(serving), Ready()
    config = TransferConfig(DECODER, there.addresses[2:4], range(1, 2))
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), ready, [config])
    assert task.synchronize(ENOUGH_MS) is OK
    assert [layer for layer, _, _ in ready.calls] == [1]
    assert [there.slot(tensor, 0) for tensor in (2, 3)] == [payload_slot(1, tensor, 0) for tensor in (2, 3)]
    assert there.untouched(0, 1, 4, 5, 6, 7)


def test_C215_no_range_becomes_all_layers(serving: Serving) -> None:
    config = TransferConfig(DECODER, Destination(serving).addresses)
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), Ready(), [config])
    assert config.src_layer_range == range(LAYERS)
    assert task.synchronize(ENOUGH_MS) is OK


def test_C216_not_linked(start: Start) -> None:
    manager = start(LLMRole.PROMPT).kv_cache_manager
    config = TransferConfig(77, [512] * TENSORS)
    task = manager.transfer_cache_async(source_cache(manager), Ready(), [config])
    assert task.get_results(ENOUGH_MS) == [NOT_LINKED]


def test_C217_wrong_addresses(serving: Serving) -> None:
    there, cache = Destination(serving), source_cache(serving.manager)
    below, above = there.addresses[0] - (1 << 40), there.addresses[0] + (SLOTS - 1) * STRIDE + 1
    for wrong in (below, above, 512):
        config = TransferConfig(DECODER, [wrong, there.addresses[1]], range(1))
        task = serving.manager.transfer_cache_async(cache, Ready(), [config])
        assert task.get_results(ENOUGH_MS) == [INVALID]
    assert there.untouched(*range(TENSORS))


def test_C218_a_deallocated_source(serving: Serving) -> None:
    cache = source_cache(serving.manager)
    serving.manager.deallocate_cache(cache)
    config = TransferConfig(DECODER, Destination(serving).addresses)
    task = serving.manager.transfer_cache_async(cache, Ready(), [config])
    assert task.get_results(ENOUGH_MS) == [NOT_EXIST]


@pytest.mark.parametrize("nbytes", [None, 0, STRIDE])
def test_C219_blocks(serving: Serving, nbytes: int | None) -> None:
    cache, there = source_cache(serving.manager, shape=(8, STRIDE)), Destination(serving, shape=(8, STRIDE))
    config = TransferConfig(DECODER, there.addresses)
    task = serving.manager.transfer_cache_async(cache, Ready(), [config], [0, 1], [5, 6], nbytes)
    assert task.synchronize(ENOUGH_MS) is OK
    for tensor in range(TENSORS):
        assert [there.slot(tensor, block) for block in (5, 6)] == [
            payload_slot(1, tensor, block, (8, STRIDE)) for block in (0, 1)
        ]
        assert there.slot(tensor, 4) == there.slot(tensor, 7) == bytes([SENTINEL]) * STRIDE


def test_C219_another_block_size(serving: Serving) -> None:
    cache, there = source_cache(serving.manager), Destination(serving)
    config = TransferConfig(DECODER, there.addresses)
    task = serving.manager.transfer_cache_async(cache, Ready(), [config], [0], [1], STRIDE // 2)
    assert task.get_results(ENOUGH_MS) == [INVALID]
    assert there.untouched(*range(TENSORS))


def test_C224_an_exception_in_the_synchronizer(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    def fail(layer: int) -> bool:
        raise ZeroDivisionError("in the model")

    config = TransferConfig(DECODER, Destination(serving).addresses)
    task = serving.manager.transfer_cache_async(source_cache(serving.manager), Computing(fail), [config])
    assert task.get_results(ENOUGH_MS) == [LLMStatusCode.LLM_FAILED]
    assert "in the model" in caplog.text


def pull_until_told(state: dd.State, key: CacheKey, cache_id: int) -> set[LLMStatusCode]:
    """Pull the same key again and again; give the codes that the pulls ended with."""
    codes = set()
    while not state.get("stop pulling"):
        codes.add(outcome(dd.pull_cache, state, key, cache_id))
        state["pulling"] = True
    return codes


def stop_pulling(state: dd.State) -> None:
    state["stop pulling"] = True


def is_pulling(state: dd.State) -> bool:
    return bool(state.get("pulling"))


def test_C225_a_transfer_beside_pulls(
    serving: Serving, members: Callable[[str], Member], start_remote: StartRemote
) -> None:
    busy = LLMStatusCode.LLM_LINK_BUSY
    decoder = start_remote(members("decoder"), LLMRole.DECODER, 3)
    assert decoder.call(dd.link, PROMPT, serving.port) == LINKED
    there = Destination(serving._replace(decoder=decoder))
    prefix = CacheKey(PROMPT, INVALID_ID, 0, 7)
    offered = serving.manager.allocate_cache(CacheDesc(TENSORS, SHAPE, DataType.DT_UINT8), [prefix])
    for tensor in range(TENSORS):
        tensor_view(offered, tensor)[:] = dd.payload(3, tensor, SLOTS * STRIDE).reshape(SHAPE)
    mine = decoder.call(dd.allocate, TENSORS, SHAPE)
    pulling = decoder.member.start(pull_until_told, prefix, mine)
    wait_until(lambda: bool(decoder.call(is_pulling)))
    cache, codes = source_cache(serving.manager), []
    for _ in range(50):
        task = serving.manager.transfer_cache_async(cache, Ready(), [TransferConfig(3, there.addresses)])
        codes += task.get_results(ENOUGH_MS)
    decoder.call(stop_pulling)
    for ends in (set(codes), pulling.result()):
        assert OK in ends
        assert ends <= {OK, busy}
    for tensor in range(TENSORS):
        assert there.slot(tensor, 0) == payload_slot(1, tensor, 0)
        assert decoder.call(dd.read, mine, tensor)[:STRIDE] == payload_slot(3, tensor, 0)


def test_C226_the_decoder_dies(
    start: Start, free_port: Callable[[], int], members: Callable[[str], Member], start_remote: StartRemote
) -> None:
    """What is sent in the moment before the prompt learns of the death counts as sent."""
    port = free_port()
    address = {"llm.listenIpInfo": f"127.0.0.1:{port}"}
    prompt = start(LLMRole.PROMPT, PROMPT, sync_kv_timeout=1000, changes=address)
    decoder = start_remote(members("decoder"), LLMRole.DECODER, DECODER)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    there = Destination(Serving(prompt, prompt.kv_cache_manager, decoder, port))
    died = []

    def compute(layer: int) -> bool:
        if layer == 1:
            decoder.member.kill()
            died.append(time.monotonic())
            wait_until(lambda: [link.state for link in describe_links(prompt)] != ["LINKED"])
        return True

    cache = source_cache(prompt.kv_cache_manager)
    config = TransferConfig(DECODER, there.addresses)
    task = prompt.kv_cache_manager.transfer_cache_async(cache, Computing(compute), [config])
    (result,) = task.get_results(ENOUGH_MS)
    assert died
    assert time.monotonic() - died[0] < (LAYERS - 1) * 1.0 + LITTLE_S
    assert result not in (OK, None)
