"""Links over HCCL over which one end copies alone: real processes, each with a device of the Ascend simulator.

The prompt says its port and carries out what the decoder asks of it; at the end nothing may live on the simulator.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LayerSynchronizer,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.introspection import describe_links
from llm_datadist.transports.hccl.hccl_device import THREAD_NAME
from tests.ascend_simulator import build
from tests.datadist_member import payload
from tests.on_simulator import counter, pair_on_simulator, set_knob
from tests.simulated_pair import (
    DECODER,
    FAULT,
    LINKED,
    LITTLE_S,
    OK,
    PROMPT,
    SHAPE,
    TIMEOUT,
    Decoder,
    allocate,
    bytes_of,
    code_of,
    fill,
    holds,
    offer,
    prefix,
    start,
    wait_for,
)

FAILED = LLMStatusCode.LLM_FAILED
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
TIMEOUT_S = 1.5
PATIENCE = int(os.environ.get("LLM_DATADIST_TEST_PATIENCE", "1"))  # thousands of tasks take the simulator a while
BLOCKS, BLOCK, BLOCK_TENSORS = 5001, 512, 2
BLOCKS_KEY = BlocksCacheKey(PROMPT)
WIRES = {"hccs": {}, "roce": {"LINK": "roce", "LLM_DATADIST_TEST_ADDRESSES": "1"}}
SETTINGS = {"LLM_DATADIST_DEVICE": "simulator", "LLM_DATADIST_TRANSPORT": "hccl_one_sided"}


def run(decoder: Callable[[Connection], None], prompt: Callable[[Connection], None] | None = None, **more: Any) -> None:
    pair_on_simulator(prompt or offer_here, decoder, **{**SETTINGS, **more})


def start_here(role: LLMRole, cluster_id: int, port: int | None = None) -> LLMDataDist:
    with addresses_of_devices():
        return start(role, cluster_id, port, TIMEOUT_S * PATIENCE)


@contextlib.contextmanager
def addresses_of_devices() -> Iterator[None]:
    """Have a program that answers as the vendor's tool does where a server has no file with addresses."""
    if "LLM_DATADIST_TEST_ADDRESSES" not in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        tool = Path(folder, "hccn_tool")
        tool.write_text('#!/bin/sh\n[ "$2" -ge 0 ] && echo "ipaddr:127.0.0.$((2 + $2))"\n')
        tool.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        yield


def allocate_blocks(datadist: LLMDataDist, key: BlocksCacheKey | None = None) -> KvCache:
    desc = CacheDesc(BLOCK_TENSORS, (BLOCKS, BLOCK), DataType.DT_UINT8)
    return datadist.kv_cache_manager.allocate_blocks_cache(desc, key)


# ---- the prompt's process


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return True


class Offering:
    """What the decoder can ask the prompt for; each method by its name."""

    def __init__(self, datadist: LLMDataDist) -> None:
        self._datadist = datadist
        keys = [prefix(number) for number in range(3)]
        self._cache = allocate(datadist, *keys, CacheKey(PROMPT, 77))
        fill(datadist, self._cache, 7)
        self._blocks = allocate_blocks(datadist, BLOCKS_KEY)
        fill(datadist, self._blocks, 8)

    def fault(self, faults: str) -> None:
        set_knob("FAULTS", faults)

    def struck(self, where: str) -> int:
        return counter(f"fault.{where}")

    def calls(self, function: str) -> int:
        return counter(f"calls.{function}")

    def push(self, addresses: list[int], **blocks: Any) -> tuple[LLMStatusCode, float]:
        """Send the layer of the first two tensors to addresses of the decoder; with blocks, that of the other cache."""
        cache = self._blocks if blocks else self._cache
        config = TransferConfig(DECODER, addresses, range(1), 0)
        began = time.monotonic()
        task = self._datadist.kv_cache_manager.transfer_cache_async(cache, Ready(), [config], **blocks)
        return task.synchronize(5000), time.monotonic() - began

    def hold_lock(self, seconds: float) -> None:
        """Answer first, then keep the interpreter lock in a C call: no Python code of this process runs."""
        threading.Thread(target=lambda: ctypes.PyDLL(None).usleep(int(seconds * 1e6))).start()

    def publish(self, blocks: list[int]) -> bytes:
        return self._datadist.kv_cache_manager.publish_blocks(self._blocks, blocks)

    def retire(self, token: bytes) -> None:
        self._datadist.kv_cache_manager.retire_blocks(token)

    def links(self) -> list[tuple[str, str, str]]:
        return [(link.transport, link.reason, link.state) for link in describe_links(self._datadist)]


def offer_here(peer: Connection) -> None:
    offer(peer, lambda port: start_here(LLMRole.PROMPT, PROMPT, port), Offering)


class Linked(Decoder):
    """The decoder's process, linked to the prompt."""

    def __init__(self, peer: Connection, *, link: bool = True) -> None:
        super().__init__(peer, start_here(LLMRole.DECODER, DECODER))
        if link:
            assert self.link() == LINKED

    def links(self) -> list[tuple[str, str, str]]:
        return [(link.transport, link.reason, link.state) for link in describe_links(self.datadist)]


def gets() -> int:
    return counter("calls.HcclBatchGet")


# ---- what is moved


def pull_and_push(peer: Connection) -> None:
    linked = Linked(peer)
    datadist, manager = linked.datadist, linked.manager
    assert linked.pull(2, 3)[0] is OK
    assert holds(datadist, linked.cache, 7, {3: 2})
    assert linked.pull(1, 0)[0] is OK
    assert holds(datadist, linked.cache, 7, {0: 1, 3: 2})

    # A key of a request is released by the pull, and by no one that fails.
    assert code_of(manager.pull_cache, CacheKey(PROMPT, 77), linked.cache, 9)[0] is not OK
    assert code_of(manager.pull_cache, CacheKey(PROMPT, 77), linked.cache, 2)[0] is OK
    assert holds(datadist, linked.cache, 7, {2: 3})
    assert code_of(manager.pull_cache, CacheKey(PROMPT, 77), linked.cache, 2)[0] is NOT_EXIST

    before = gets()
    addresses = linked.cache.per_device_tensor_addrs[0][2:]
    assert linked.ask("push", addresses)[0] is OK
    found = [bytes_of(datadist, linked.cache, 2 + tensor)[0] for tensor in range(2)]
    wanted = [payload(7, tensor, SHAPE[0] * SHAPE[1]).reshape(SHAPE)[0] for tensor in range(2)]
    assert all((one == other).all() for one, other in zip(found, wanted))
    assert gets() == before + 1, "the end that is written to copies"
    assert linked.ask("push", [8, addresses[0]])[0] is not OK
    assert gets() == before + 1, "an address that is none is refused before anything moves"

    for function in ("HcclSend", "HcclRecv", "HcclBatchSendRecv", "HcclBatchPut"):
        assert (counter(f"calls.{function}"), linked.ask("calls", function)) == (0, 0)
    assert linked.ask("calls", "HcclBatchGet") == 0
    assert linked.links()[0][0] == linked.ask("links")[0][0] == "hccl_one_sided"
    linked.end()


@pytest.mark.parametrize("wire", WIRES)
def test_bytes_that_are_pulled_and_pushed_arrive(wire: str) -> None:
    run(pull_and_push, **WIRES[wire])


def pull_many_blocks(peer: Connection) -> None:
    linked = Linked(peer)
    cache = allocate_blocks(linked.datadist)
    order = np.random.default_rng(1).permutation(BLOCKS)
    for blocks, calls in ((1, 1), (128, 1), (129, 2), (2500, 20)):  # descriptors: two tensors
        source = [int(number) for number in order[:blocks]]
        target = [BLOCKS - 1 - 2 * number for number in range(blocks)]  # none follows another one
        fill(linked.datadist, cache, 9)
        before = gets()
        linked.manager.pull_blocks(BLOCKS_KEY, cache, source, target)
        assert gets() - before == calls
        pairs = dict(zip(target, source))
        assert holds(linked.datadist, cache, 8, pairs)
        assert holds(linked.datadist, cache, 9, {number: number for number in set(range(BLOCKS)) - set(pairs)})

    before = gets()
    linked.manager.pull_blocks(BLOCKS_KEY, cache, list(range(5, 4000)), list(range(905, 4900)))
    assert gets() - before == 1, "blocks that follow each other are one piece"
    assert holds(linked.datadist, cache, 8, dict(zip(range(905, 4900), range(5, 4000))))

    linked.manager.pull_blocks(BLOCKS_KEY, cache, [1, 2, 3, 4], [6, 5, 5, 6])
    assert holds(linked.datadist, cache, 8, {5: 3, 6: 4}), "of blocks that go to one place the last one stays"

    addresses = cache.per_device_tensor_addrs[0]
    fill(linked.datadist, cache, 9)
    code, _ = linked.ask("push", addresses, src_block_indices=[9, 4, 7], dst_block_indices=[3, 100, 4])
    assert code is OK
    assert holds(linked.datadist, cache, 8, {3: 9, 100: 4, 4: 7})
    assert holds(linked.datadist, cache, 9, {2: 2, 5: 5, 99: 99, 101: 101})
    linked.end()


@pytest.mark.parametrize("wire", WIRES)
def test_calls_are_cut_where_hccl_wants_it(wire: str) -> None:
    run(pull_many_blocks, **WIRES[wire], MIN_DELAY_US=0, LLM_DATADIST_TEST_PATIENCE=10)


def pull_from_a_busy_prompt(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.pull()[0] is OK
    linked.ask("hold_lock", 2.0)
    began = time.monotonic()
    assert linked.pull(1, 1)[0] is OK
    assert time.monotonic() - began < TIMEOUT_S
    assert holds(linked.datadist, linked.cache, 7, {0: 0, 1: 1})
    linked.end()


def test_a_prompt_that_holds_its_interpreter_lock_is_pulled_from() -> None:
    run(pull_from_a_busy_prompt)


def pull_sealed(peer: Connection) -> None:
    linked = Linked(peer)
    cache = allocate_blocks(linked.datadist)
    token = linked.ask("publish", [3, 4])
    linked.manager.pull_blocks(BLOCKS_KEY, cache, [3, 4], [0, 1], token=token)
    assert holds(linked.datadist, cache, 8, {0: 3, 1: 4})
    set_knob("FAULTS", "exec.get#1=delay(400)")
    ended: list[Any] = []
    pull = linked.manager.pull_blocks
    thread = threading.Thread(
        target=lambda: ended.append(code_of(pull, BLOCKS_KEY, cache, [3, 4], [0, 1], token=token))
    )
    thread.start()
    wait_for(lambda: counter("fault.exec.get") == 1)
    linked.ask("retire", token)
    thread.join()
    assert ended[0][0] is NOT_EXIST, "bytes that were copied after the seal was broken prove nothing"
    linked.end()


def test_a_seal_that_breaks_while_bytes_are_copied_is_seen() -> None:
    run(pull_sealed)


# ---- which transport


def expect_two_sided(peer: Connection) -> None:
    """Be linked over the ordinary transport, with the reason that the test names."""
    if os.environ.get("LLM_DATADIST_TEST_OLD") == "decoder":
        be_old()
    linked = Linked(peer)
    wanted = os.environ["LLM_DATADIST_TEST_REASON"]
    for transport, reason, state in (*linked.links(), *linked.ask("links")):
        assert (transport, state) == ("hccl", "LINKED")
        assert wanted in reason
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0})
    assert gets() == 0
    linked.end()


def be_old() -> None:
    for name in ("ACL", "HCOMM", "HCCL"):
        os.environ[f"LLM_DATADIST_{name}_LIBRARY"] = str(build.library("no_onesided"))


def offer_of_old(peer: Connection) -> None:
    be_old()
    offer_here(peer)


def offer_by_default(peer: Connection) -> None:
    del os.environ["LLM_DATADIST_TRANSPORT"]
    offer_here(peer)


@pytest.mark.parametrize("old", ["decoder", "prompt"])
def test_hccl_without_one_sided_transfers_at_one_end_means_the_ordinary_ones(old: str) -> None:
    more = {"LLM_DATADIST_TEST_OLD": old, "LLM_DATADIST_TEST_REASON": "has no one-sided transfers"}
    run(expect_two_sided, offer_of_old if old == "prompt" else offer_here, **more)


def test_both_ends_have_to_ask_for_it() -> None:
    run(expect_two_sided, offer_by_default, LLM_DATADIST_TEST_REASON="the settings of the server do not ask")


def link_without_addresses(peer: Connection) -> None:
    linked = Linked(peer, link=False)
    assert linked.link() == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    linked.end()


def test_a_network_without_addresses_fails_the_link() -> None:
    run(link_without_addresses, HCCL_INTRA_ROCE_ENABLE=1)


def offer_with_a_small_pool(peer: Connection) -> None:
    """Say less than the truth about what may be reached, as a peer whose replies cannot be believed."""
    from dataclasses import replace

    from llm_datadist.transports.hccl.one_sided import OneSided

    make_offer = OneSided.offer
    OneSided.offer = lambda self, wish: replace(make_offer(self, wish), pool_bytes=4096)  # type: ignore[method-assign]
    offer_here(peer)


def pull_from_outside(peer: Connection) -> None:
    linked = Linked(peer)
    for _ in range(2):
        code, text, _ = linked.pull()
        assert code is FAILED
        assert "outside of its pool" in text
    assert gets() == 0, "nothing moves"
    assert counter("calls.HcclCommPrepare") == 1, "and nothing is lost by it"
    linked.end()


def test_a_range_outside_of_what_the_peer_has_bound_is_refused() -> None:
    run(pull_from_outside, offer_with_a_small_pool)


# ---- links come and go


def taken_down() -> bool:
    """Whether the communicators are gone, and the threads that take them down."""
    gone = not counter("live.communicators")
    return gone and not any(thread.name == THREAD_NAME for thread in threading.enumerate())


def link_again_and_again(peer: Connection) -> None:
    linked = Linked(peer)
    device = linked.datadist._engine._caches.device.device
    assert linked.pull()[0] is OK
    assert linked.unlink() == LINKED
    names = ("streams", "events", "communicators", "registrations", "allocations")
    wait_for(taken_down)
    before = [counter(f"live.{name}") for name in names], device.memory_info()
    for _ in range(10):
        assert linked.link() == LINKED
        assert linked.pull(1)[0] is OK
        assert linked.unlink() == LINKED
    wait_for(taken_down)
    assert ([counter(f"live.{name}") for name in names], device.memory_info()) == before
    assert counter("calls.HcclRegisterGlobalMem") == 1, "the pool is registered once"
    linked.end()


def test_links_leave_nothing_behind() -> None:
    run(link_again_and_again)


def link_that_fails_once(peer: Connection) -> None:
    linked = Linked(peer, link=False)
    where, at_prompt = os.environ[FAULT].split(",")
    if at_prompt == "prompt":
        linked.ask("fault", where)
    else:
        set_knob("FAULTS", where)
    began = time.monotonic()
    assert linked.link() == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    assert time.monotonic() - began < 5.0
    point = where.partition("#")[0]
    assert (linked.ask("struck", point) if at_prompt == "prompt" else counter(f"fault.{point}")) == 1
    assert linked.link(10_000) == LINKED
    assert linked.works()
    linked.end()


@pytest.mark.parametrize(
    "fault",
    [
        "HcclRegisterGlobalMem#1=code(3),prompt",
        "HcclCommInitClusterInfoMemConfig#1=code(4),prompt",
        "HcclCommInitClusterInfoMemConfig#1=code(4),decoder",
        "HcclCommBindMem#1=code(1),decoder",
        "HcclCommPrepare#1=code(11),prompt",
        "link.meet#1=code(12),decoder",
    ],
)
def test_a_communicator_that_cannot_be_made_fails_the_link_and_not_the_next(fault: str) -> None:
    run(link_that_fails_once, **{FAULT: fault})


def link_in_vain(peer: Connection) -> None:
    linked = Linked(peer, link=False)
    linked.ask("fault", "HcclCommPrepare#1=delay(3000)")
    began = time.monotonic()
    assert linked.link(500) == (LLMStatusCode.LLM_LINK_FAILED, [TIMEOUT])
    assert time.monotonic() - began < 0.5 + LITTLE_S
    assert linked.link(20_000) == LINKED
    assert linked.works()
    linked.end()


def test_a_link_whose_partner_does_not_come_ends_at_the_callers_deadline() -> None:
    run(link_in_vain)


# ---- what fails on the way


def transfer_that_fails(peer: Connection) -> None:
    """Pull, or be pushed to, while a fault is ordered of this end, which copies either way."""
    linked = Linked(peer)
    where, direction = os.environ[FAULT].split(",")
    addresses = linked.cache.per_device_tensor_addrs[0][:2]
    set_knob("FAULTS", where)
    if direction == "pull":
        code, text, seconds = linked.pull()
    else:
        (code, seconds), text = linked.ask("push", addresses), ""
    assert code in (FAILED, TIMEOUT), text
    assert seconds < TIMEOUT_S + LITTLE_S
    assert counter(f"fault.{where.partition('#')[0]}") == 1
    assert linked.works()
    give_up = time.monotonic() + 10
    while (code := linked.ask("push", addresses)[0]) is not OK and time.monotonic() < give_up:
        pass
    assert code is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0}, tensors=2)
    assert linked.unlink() == LINKED
    assert linked.link() == LINKED
    assert linked.works()
    linked.end()


@pytest.mark.parametrize(
    "fault",
    [
        "exec.get#1=code(507899),pull",
        "exec.get#1=half,pull",
        "exec.get#1=hang,pull",
        "exec.get#1=eof,pull",
        "HcclBatchGet#1=code(4),pull",
        "exec.get#1=hang,push",
        "HcclBatchGet#1=code(4),push",
    ],
)
def test_a_transfer_whose_device_fails_ends_in_time_and_the_next_one_works(fault: str) -> None:
    run(transfer_that_fails, **{FAULT: fault}, **WIRES["roce" if "eof" in fault else "hccs"])


def offer_until_killed(peer: Connection) -> None:
    """Offer in a child, whose end by SIGKILL is what the test wants."""
    child = os.fork()
    if child == 0:
        offer_here(peer)
        os._exit(1)
    peer.close()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def pull_from_the_dying(peer: Connection) -> None:
    linked = Linked(peer)
    set_knob("FAULTS", "exec.get#1=delay(300)")
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(linked.pull()))
    thread.start()
    wait_for(lambda: counter("fault.exec.get") == 1)
    os.kill(linked.prompt_pid, signal.SIGKILL)
    thread.join()
    code, text, seconds = ended[0]
    assert code is TIMEOUT, text
    assert seconds < TIMEOUT_S + LITTLE_S
    wait_for(lambda: linked.links()[0][2] == "BROKEN")
    code, text, _ = linked.pull()
    assert code is TIMEOUT, text
    linked.end(prompt_lives=False)


@pytest.mark.parametrize("wire", WIRES)
def test_a_prompt_that_dies_while_its_memory_is_read(wire: str) -> None:
    run(pull_from_the_dying, offer_until_killed, **WIRES[wire])


def stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped: they see the signal one after the other."""
    stats = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}


def pull_from_the_stopped(peer: Connection) -> None:
    linked = Linked(peer)
    os.kill(linked.prompt_pid, signal.SIGSTOP)
    wait_for(lambda: stands_still(linked.prompt_pid))
    code, text, seconds = linked.pull()
    assert code is TIMEOUT, text
    assert seconds < TIMEOUT_S + LITTLE_S
    os.kill(linked.prompt_pid, signal.SIGCONT)
    assert linked.works()
    assert counter("calls.HcclCommPrepare") == 1, "nothing was copied, so nothing was lost"
    linked.end()


def test_a_prompt_that_stands_still_costs_one_pull() -> None:
    run(pull_from_the_stopped)


def transfer_that_lies(peer: Connection) -> None:
    linked = Linked(peer)
    for lie in ("drop", "corrupt"):
        set_knob("FAULTS", f"exec.get#1={lie}")
        fill(linked.datadist, linked.cache, 9)
        assert linked.pull()[0] is OK
        assert not holds(linked.datadist, linked.cache, 7, {0: 0}), "a comparison that does not see it proves nothing"
    set_knob("FAULTS", "")
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0})
    linked.end()


def test_a_device_that_lies_is_seen_by_the_comparisons() -> None:
    run(transfer_that_lies)
