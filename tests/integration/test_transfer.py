"""transfer_cache_async between real processes: the prompt sends layers to addresses in a decoder."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

import numpy as np
import pytest

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.pair import DECODER, PROMPT, Pair, start_decoder
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
RUNNING = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
NO_CACHE = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
LINKED = (OK, [OK])
Members = Callable[[str], Member]

SLOTS, SIZE = 3, 4096  # bytes of a slot
LAYERS = 4
SHAPE = (SLOTS, SIZE)
MINE, OLD = 1, 999  # seeds of what the prompt sends and of what was there before
PATIENCE_S = 10.0
MIB = 1 << 20

# cluster, addresses, layers, slot
Config = tuple[int, list[int], Optional[range], int]


# ---- what the prompt does


class Steps(LayerSynchronizer):
    """Notes what it is asked, writes a layer if it is told to, and holds some layers until `go`."""

    def __init__(self, cache: KvCache, answers: dict[int, Any], hold: Iterable[int], writes: int | None) -> None:
        self.asked: list[tuple[int, int | None, int]] = []
        self._cache, self._answers, self._hold, self._writes = cache, answers, set(hold), writes
        self.changed = threading.Condition()
        self.going = False

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        with self.changed:
            self.asked.append((layer_index, timeout_in_millis, threading.get_ident()))
            self.changed.notify_all()
            if layer_index in self._hold:
                self.changed.wait_for(lambda: self.going, PATIENCE_S)
        if self._writes is not None:
            for tensor in (2 * layer_index, 2 * layer_index + 1):
                view = tensor_view(self._cache, tensor).reshape(-1)
                view[:] = dd.payload(self._writes, tensor, view.size)
        answer = self._answers.get(layer_index, True)
        if isinstance(answer, BaseException):
            raise answer
        return bool(answer)


def transfer(
    state: dd.State,
    cache_id: int,
    configs: Sequence[Config],
    answers: dict[int, Any] | None = None,
    hold: Iterable[int] = (),
    writes: int | None = None,
    **blocks: Any,
) -> None:
    """Start a transfer; the other functions ask about it."""
    cache = state["caches"][cache_id]
    state["steps"] = Steps(cache, answers or {}, hold, writes)
    state["configs"] = [TransferConfig(*config) for config in configs]
    state["caller"] = threading.get_ident()
    state["task"] = dd.manager(state).transfer_cache_async(cache, state["steps"], state["configs"], **blocks)


def results(state: dd.State, timeout: int | None = 10_000) -> list[LLMStatusCode | None]:
    answer: list[LLMStatusCode | None] = state["task"].get_results(timeout)
    return answer


def synchronize(state: dd.State, timeout: int | None = 10_000) -> LLMStatusCode:
    return state["task"].synchronize(timeout)


def asked(state: dd.State) -> list[int]:
    """Layers that the synchronizer was asked for, after a check of how it was asked."""
    for _, timeout, thread in state["steps"].asked:
        assert timeout is None
        assert thread != state["caller"]
    return [layer for layer, _, _ in state["steps"].asked]


def wait_until_asked(state: dd.State, layer: int) -> None:
    steps = state["steps"]
    with steps.changed:
        assert steps.changed.wait_for(lambda: layer in [entry[0] for entry in steps.asked], PATIENCE_S)


def go(state: dd.State) -> None:
    with state["steps"].changed:
        state["steps"].going = True
        state["steps"].changed.notify_all()


def layer_range(state: dd.State) -> range | None:
    return state["configs"][0].src_layer_range


def transfer_threads(state: dd.State) -> int:
    return sum(thread.name == "llm_datadist-transfer" for thread in threading.enumerate())


# ---- what the decoder does


def addresses(state: dd.State, cache_id: int) -> list[int]:
    return list(state["caches"][cache_id].per_device_tensor_addrs[0])


# ---- the pair


def offer(pair: Pair, tensors: int = 2 * LAYERS, shape: tuple[int, int] = SHAPE, **kwargs: Any) -> int:
    cache = pair.prompt.call(dd.allocate, tensors, shape, **kwargs)
    pair.prompt.call(dd.fill, cache, MINE)
    return int(cache)


def target(member: Member, tensors: int = 2 * LAYERS, shape: tuple[int, int] = SHAPE) -> tuple[int, list[int]]:
    cache = member.call(dd.allocate, tensors, shape)
    member.call(dd.fill, cache, OLD)
    return int(cache), member.call(addresses, cache)


def to_slot(addrs: list[int], slot: int, size: int = SIZE) -> list[int]:
    return [address + slot * size for address in addrs]


def assert_slots(
    member: Member,
    cache: int,
    tensor: int,
    moved: dict[int, int],
    source_tensor: int | None = None,
    shape: tuple[int, int] = SHAPE,
    seed: int = MINE,
) -> None:
    """Check every slot of a tensor: those in `moved` are the prompt's, the others the old ones."""
    nbytes = shape[0] * shape[1]
    wanted = dd.payload(OLD, tensor, nbytes).reshape(shape).copy()
    source = dd.payload(seed, tensor if source_tensor is None else source_tensor, nbytes).reshape(shape)
    for to, of in moved.items():
        wanted[to] = source[of]
    got = np.frombuffer(member.call(dd.read, cache, tensor), np.uint8).reshape(shape)
    np.testing.assert_array_equal(got, wanted)


def assert_untouched(member: Member, cache: int, tensors: int = 2 * LAYERS) -> None:
    for tensor in range(tensors):
        assert_slots(member, cache, tensor, {})


def run(pair: Pair, cache: int, configs: Sequence[Config], **kwargs: Any) -> list[LLMStatusCode | None]:
    pair.prompt.call(transfer, cache, configs, **kwargs)
    answer: list[LLMStatusCode | None] = pair.prompt.call(results)
    return answer


# ---- whole slots


def test_a_slot_arrives_and_nothing_else_changes(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, to_slot(addrs, 2), None, 1)]) == [OK]
    assert pair.prompt.call(synchronize) is OK
    for tensor in range(2 * LAYERS):
        assert_slots(pair.decoder, mine, tensor, {2: 1})
    assert pair.prompt.call(asked) == list(range(LAYERS))
    assert pair.prompt.call(layer_range) == range(LAYERS)


def test_a_layer_is_read_after_the_model_has_computed_it(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, addrs, None, 0)], writes=5) == [OK]
    for tensor in range(2 * LAYERS):
        assert_slots(pair.decoder, mine, tensor, {0: 0}, seed=5)


def test_a_layer_goes_out_while_the_next_one_computes(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)], hold=[2])
    pair.prompt.call(wait_until_asked, 2)
    for tensor in range(4):
        assert_slots(pair.decoder, mine, tensor, {0: 0})
    for tensor in range(4, 8):
        assert_slots(pair.decoder, mine, tensor, {})
    for timeout in (0, 1):
        assert pair.prompt.call(synchronize, timeout) is RUNNING
        assert pair.prompt.call(results, timeout) == [RUNNING]
    pair.prompt.call(go)
    assert pair.prompt.call(results, None) == [OK]
    assert_slots(pair.decoder, mine, 7, {0: 0})


def test_one_layer_of_many(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, addrs[:2], range(1, 2), 0)]) == [OK]
    assert pair.prompt.call(asked) == [1]
    for tensor in range(2):
        assert_slots(pair.decoder, mine, tensor, {0: 0}, source_tensor=2 + tensor)
    for tensor in range(2, 8):
        assert_slots(pair.decoder, mine, tensor, {})


def test_the_model_fails_at_a_layer(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    configs = [(DECODER, addrs[:6], range(3), 0), (DECODER, addrs[4:], range(2, 4), 0)]
    assert run(pair, cache, configs, answers={0: False}) == [INVALID, None]
    assert pair.prompt.call(synchronize) is INVALID
    assert_untouched(pair.decoder, mine)
    assert run(pair, cache, configs, answers={3: False}) == [OK, INVALID]


def test_the_synchronizer_raises(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    configs = [(DECODER, addrs, None, 0)]
    assert run(pair, cache, configs, answers={1: RuntimeError("the model broke")}) == [LLMStatusCode.LLM_FAILED]
    assert_slots(pair.decoder, mine, 0, {0: 0})
    assert_slots(pair.decoder, mine, 2, {})
    assert run(pair, cache, configs) == [OK], "the process and the link go on"


def test_many_large_layers(pair: Pair) -> None:
    shape = (1, 2 * MIB)
    cache = offer(pair, 16, shape)
    mine, addrs = target(pair.decoder, 16, shape)
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [OK]
    for tensor in range(16):
        assert_slots(pair.decoder, mine, tensor, {0: 0}, shape=shape)


def test_two_configs_of_one_decoder(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    configs = [(DECODER, to_slot(addrs, 0), None, 1), (DECODER, to_slot(addrs[4:], 2), range(2, 4), 0)]
    assert run(pair, cache, configs) == [OK, OK]
    assert pair.prompt.call(asked) == list(range(LAYERS))
    assert_slots(pair.decoder, mine, 0, {0: 1})
    assert_slots(pair.decoder, mine, 7, {0: 1, 2: 0})


def test_several_decoders(pair: Pair, members: Members) -> None:
    other = start_decoder(members("other"), cluster_id=3)
    assert other.call(dd.link, PROMPT, pair.port) == LINKED
    cache = offer(pair)
    first, first_addrs = target(pair.decoder)
    second, second_addrs = target(other)
    configs = [(3, second_addrs[:2], range(1), 2), (DECODER, first_addrs, None, 1)]
    assert run(pair, cache, configs) == [OK, OK]
    assert_slots(other, second, 1, {0: 2})
    assert_slots(other, second, 2, {})
    for tensor in range(8):
        assert_slots(pair.decoder, first, tensor, {0: 1})


def test_jobs_side_by_side(pair: Pair, members: Members) -> None:
    """A second job on another link does not wait for the first."""
    other = start_decoder(members("other"), cluster_id=3)
    assert other.call(dd.link, PROMPT, pair.port) == LINKED
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    second, second_addrs = target(other)
    assert pair.prompt.call(two_transfers, cache, (DECODER, addrs, None, 0), (3, second_addrs, None, 1)) == [[OK], [OK]]
    assert_slots(pair.decoder, mine, 7, {0: 0})
    assert_slots(other, second, 7, {0: 1})


def two_transfers(state: dd.State, cache_id: int, first: Config, second: Config) -> list[Any]:
    transfer(state, cache_id, [first], hold=[1])
    first_task, first_steps = state["task"], state["steps"]
    wait_until_asked(state, 1)
    transfer(state, cache_id, [second])
    second_results = results(state)
    with first_steps.changed:
        first_steps.going = True
        first_steps.changed.notify_all()
    return [first_task.get_results(10_000), second_results]


def test_no_configs(pair: Pair) -> None:
    cache = offer(pair)
    pair.prompt.call(transfer, cache, [])
    assert pair.prompt.call(results, 0) == []
    assert pair.prompt.call(synchronize, 0) is OK


def test_a_transfer_touches_no_key(pair: Pair) -> None:
    cache = offer(pair, keys=[CacheKey(PROMPT, 10)])
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [OK]
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 10), mine, 1)
    assert_slots(pair.decoder, mine, 3, {0: 0, 1: 0})


# ---- blocks


@pytest.mark.parametrize("size", [None, 0, SIZE])
def test_blocks_go_where_the_block_tables_say(pair: Pair, size: int | None) -> None:
    shape = (8, SIZE)
    cache = offer(pair, shape=shape)
    mine, addrs = target(pair.decoder, shape=shape)
    blocks = {"src_block_indices": [0, 1, 7], "dst_block_indices": (5, 6, 0), "dst_block_memory_size": size}
    assert run(pair, cache, [(DECODER, addrs, None, 0)], **blocks) == [OK]
    for tensor in range(2 * LAYERS):
        assert_slots(pair.decoder, mine, tensor, {5: 0, 6: 1, 0: 7}, shape=shape)


def test_blocks_of_some_layers(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    blocks = {"src_block_indices": [2], "dst_block_indices": [0]}
    assert run(pair, cache, [(DECODER, addrs[:4], range(2, 4), 0)], **blocks) == [OK]
    assert pair.prompt.call(asked) == [2, 3]
    for tensor in range(4):
        assert_slots(pair.decoder, mine, tensor, {0: 2}, source_tensor=4 + tensor)
    assert_slots(pair.decoder, mine, 4, {})


@pytest.mark.parametrize(
    "blocks",
    [
        {"src_block_indices": [0], "dst_block_indices": [0], "dst_block_memory_size": 2 * SIZE},
        {"src_block_indices": [0], "dst_block_indices": [0], "dst_block_memory_size": SIZE - 1},
        {"src_block_indices": [0], "dst_block_indices": [0], "dst_block_memory_size": 2**64 - 1},
        {"src_block_indices": [SLOTS], "dst_block_indices": [0]},
        {"src_block_indices": [2**64 - 1], "dst_block_indices": [0]},
        {"src_block_indices": [0], "dst_block_indices": [SLOTS]},
        {"src_block_indices": [0, 0], "dst_block_indices": [0, SLOTS]},
        {"src_block_indices": [0], "dst_block_indices": [2**64 - 1]},
        {"src_block_indices": [0], "dst_block_indices": [2**52]},
    ],
)
def test_blocks_that_do_not_fit(pair: Pair, blocks: dict[str, Any]) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, addrs, None, 0)], **blocks) == [INVALID]
    assert_untouched(pair.decoder, mine)
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [OK], "the link stays good"


# ---- what fails


def test_no_link(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(99, addrs, None, 0)]) == [LLMStatusCode.LLM_NOT_YET_LINK]
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == LINKED
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [LLMStatusCode.LLM_NOT_YET_LINK]
    assert_untouched(pair.decoder, mine)
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [OK]
    assert_slots(pair.decoder, mine, 0, {0: 0})


def test_a_slot_that_does_not_exist(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    for slot in (SLOTS, 2**32 - 1):
        assert run(pair, cache, [(DECODER, addrs, None, slot)]) == [INVALID]
    assert_untouched(pair.decoder, mine)


def test_a_source_that_is_deallocated(pair: Pair) -> None:
    cache = offer(pair, keys=[CacheKey(PROMPT, 10)])  # the key still holds the memory
    mine, addrs = target(pair.decoder)
    assert pair.prompt.call(transfer_deallocated, cache, (DECODER, addrs, None, 0)) == [NO_CACHE]
    assert_untouched(pair.decoder, mine)


def transfer_deallocated(state: dd.State, cache_id: int, config: Config) -> list[LLMStatusCode | None]:
    cache = state["caches"][cache_id]
    dd.deallocate(state, cache_id)
    state["caches"][cache_id] = cache
    transfer(state, cache_id, [config])
    return results(state)


def test_a_source_that_is_deallocated_meanwhile(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)], hold=[1])
    pair.prompt.call(wait_until_asked, 1)
    pair.prompt.call(dd.deallocate, cache)
    pair.prompt.call(go)
    assert pair.prompt.call(results) == [NO_CACHE]
    assert_slots(pair.decoder, mine, 1, {0: 0})
    assert_slots(pair.decoder, mine, 2, {})
    assert pair.prompt.call(dd.pool_used) == 0


def test_a_source_in_host_memory(pair: Pair) -> None:
    _, addrs = target(pair.decoder)
    assert pair.prompt.call(transfer_host_cache, addrs[:2]) == [NO_CACHE]


def transfer_host_cache(state: dd.State, addrs: list[int]) -> list[LLMStatusCode | None]:
    memory = np.zeros(2 * SIZE, np.uint8)
    desc = CacheDesc(2, (1, SIZE), DataType.DT_UINT8, Placement.HOST)
    state["caches"][-1] = KvCache.create_cpu_cache(desc, [memory.ctypes.data, memory.ctypes.data + SIZE])
    transfer(state, -1, [(DECODER, addrs, None, 0)])
    return results(state)


def test_a_source_that_only_the_transfer_holds(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)], hold=[1])
    pair.prompt.call(wait_until_asked, 1)
    assert pair.prompt.call(forget_source, cache) > 0
    pair.prompt.call(go)
    assert pair.prompt.call(results) == [OK]
    assert_slots(pair.decoder, mine, 7, {0: 0})
    deadline = time.monotonic() + PATIENCE_S
    while pair.prompt.call(forget_steps):
        assert time.monotonic() < deadline


def forget_source(state: dd.State, cache_id: int) -> int:
    """Drop every reference of this process but the transfer's; gives the bytes that are still held."""
    del state["caches"][cache_id]
    del state["steps"]._cache
    gc.collect()
    return dd.pool_used(state)


def forget_steps(state: dd.State) -> int:
    return dd.pool_used(state)


def test_addresses_that_are_in_no_cache_of_the_decoder(pair: Pair) -> None:
    cache = offer(pair, tensors=2)
    before, before_addrs = target(pair.decoder, tensors=2)
    mine, addrs = target(pair.decoder, tensors=2)
    gone, gone_addrs = target(pair.decoder, tensors=2)
    pair.decoder.call(dd.deallocate, gone)
    k, v = addrs
    nbytes = SLOTS * SIZE
    wrong = [
        [0, 0],
        [2**64 - 1, 2**64 - 1],
        [2**63, v],
        [before_addrs[0] - 1, v],  # before the first tensor of the pool
        [k, v + nbytes],  # behind the end
        [k, v + nbytes - SIZE + 1],  # over the end by a byte
        [k + nbytes - SIZE + 512, v],  # out of one tensor into the next
        [k, 0],  # the first tensor of the layer is good, and is not written either
        gone_addrs,
    ]
    for pair_of_addresses in wrong:
        assert run(pair, cache, [(DECODER, pair_of_addresses, None, 0)]) == [INVALID], pair_of_addresses
    for each in (before, mine):
        assert_untouched(pair.decoder, each, tensors=2)
    assert run(pair, cache, [(DECODER, [k + 100, v + nbytes - SIZE], None, 0)]) == [OK], "any place in a tensor is good"


def test_a_wrong_address_of_a_later_layer(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    assert run(pair, cache, [(DECODER, [*addrs[:7], 4096], None, 0), (DECODER, addrs, None, 0)]) == [INVALID, None]
    assert_slots(pair.decoder, mine, 5, {0: 0})
    assert_slots(pair.decoder, mine, 6, {})


def test_a_decoder_does_not_transfer(pair: Pair) -> None:
    mine, addrs = target(pair.decoder)
    with pytest.raises(LLMException, match="is not supported by") as caught:
        pair.decoder.call(transfer, mine, [(PROMPT, addrs, None, 0)])
    assert caught.value.status_code is INVALID


def test_several_devices_in_one_process(free_port: Callable[[], int]) -> None:
    prompt = LLMDataDist(LLMRole.PROMPT, PROMPT)
    listen = f"127.0.0.1:{free_port()};127.0.0.1:{free_port()}"
    prompt.init({"ge.exec.deviceId": "0;1", "ge.flowGraphMemMaxSize": str(MIB), "llm.listenIpInfo": listen})
    try:
        manager = prompt.kv_cache_manager
        cache = manager.allocate_cache(CacheDesc(2, SHAPE, DataType.DT_UINT8))
        steps = Steps(cache, {}, (), None)
        task = manager.transfer_cache_async(cache, steps, [TransferConfig(DECODER, [0, 0])])
        assert task.get_results(10_000) == [LLMStatusCode.LLM_FEATURE_NOT_ENABLED]
    finally:
        prompt.finalize()


# ---- beside other calls


def pull_for_a_while(state: dd.State, cache_id: int, nbytes: int, pulls: int) -> list[LLMStatusCode]:
    """Pull a prefix key again and again; gives the codes, after a check of every pull that succeeded."""
    views = [tensor_view(state["caches"][cache_id], tensor).reshape(-1) for tensor in range(2)]
    wanted = [dd.payload(MINE, tensor, nbytes) for tensor in range(2)]
    codes = []
    for _ in range(pulls):
        for view in views:
            view[:] = 0
        try:
            dd.pull_cache(state, CacheKey(PROMPT, 2**64 - 1, 0, 9), cache_id)
            codes.append(OK)
        except LLMException as error:
            codes.append(error.status_code)
            continue
        for view, want in zip(views, wanted):
            np.testing.assert_array_equal(view, want)
    return codes


def test_pulls_and_transfers_on_one_link(pair: Pair) -> None:
    shape = (1, 4 * MIB)
    cache = offer(pair, 2, shape, keys=[CacheKey(PROMPT, 2**64 - 1, 0, 9)])
    pulled = pair.decoder.call(dd.allocate, 2, shape)
    sent, addrs = target(pair.decoder, 2, shape)
    pulling = pair.decoder.start(pull_for_a_while, pulled, shape[1], 30)
    codes: list[LLMStatusCode | None] = []
    while not pulling.done():
        pair.decoder.call(dd.clear, sent)
        codes += run(pair, cache, [(DECODER, addrs, None, 0)])
        if codes[-1] is OK:
            for tensor in range(2):
                assert pair.decoder.call(dd.read, sent, tensor) == dd.payload(MINE, tensor, shape[1]).tobytes()
    assert set(pulling.result()) | set(codes) <= {OK, LLMStatusCode.LLM_LINK_BUSY}
    assert run(pair, cache, [(DECODER, addrs, None, 0)]) == [OK]


def test_finalize_while_a_transfer_waits_for_the_model(pair: Pair) -> None:
    cache = offer(pair)
    mine, addrs = target(pair.decoder)
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)], hold=[1])
    pair.prompt.call(wait_until_asked, 1)
    started = time.monotonic()
    pair.prompt.call(dd.finalize)
    assert time.monotonic() - started < 1.0, "it does not wait for the model"
    pair.prompt.call(go)
    assert pair.prompt.call(results) == [LLMStatusCode.LLM_FAILED]
    assert_slots(pair.decoder, mine, 1, {0: 0})
    assert_slots(pair.decoder, mine, 2, {})
    wait_for_no_threads(pair.prompt)


def wait_for_no_threads(member: Member) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while member.call(transfer_threads):
        assert time.monotonic() < deadline, "a thread stays behind"


def test_finalize_while_bytes_move(pair: Pair) -> None:
    shape = (1, 4 * MIB)
    cache = offer(pair, 4, shape)
    _, addrs = target(pair.decoder, 4, shape)
    answer = pair.prompt.call(finalize_during_transfers, cache, (DECODER, addrs, None, 0))
    assert answer == [LLMStatusCode.LLM_FAILED]
    assert pair.prompt.call(transfer_threads) == 0


def finalize_during_transfers(state: dd.State, cache_id: int, config: Config) -> list[LLMStatusCode | None]:
    """Finalize while layers go out one after the other; gives the results of the last transfer."""
    many = [config] * 1000
    transfer(state, cache_id, many)
    wait_until_asked(state, 0)
    dd.finalize(state)
    answer = results(state)
    done = [code for code in answer if code is not None]
    assert done[:-1] == [OK] * len(done[:-1])
    return done[-1:]


def test_a_process_that_leaves_during_a_transfer_leaves_with_status_0(pair: Pair) -> None:
    cache = offer(pair)
    _, addrs = target(pair.decoder)
    pair.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)], hold=[1])
    pair.prompt.call(wait_until_asked, 1)
    pair.prompt.leave()
    assert pair.prompt.exitcode == 0
