"""What fails on a device, in HCCL or at the peer, ordered of the Ascend simulator: the code, the time, what goes on.

Each test has two processes of its own on two simulated devices. They speak over a pipe: the prompt says its port, the
decoder asks it for faults. At the end nothing may live on the simulator.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.introspection import describe_links
from llm_datadist.layer_events import LayerEvents
from tests.datadist_member import MIB, cluster_info, make_options, payload
from tests.on_simulator import counter, on_simulator, pair_on_simulator, set_knob

PROMPT, DECODER = 1, 2
OK = LLMStatusCode.LLM_SUCCESS
LINKED = (OK, [OK])
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
TIMEOUT_S = 1.0
LITTLE_S = 1.0  # beyond a deadline, on a busy machine
SHAPE = (4, MIB)  # a slot is a step's item of its own
TENSORS = 4
NO_REQUEST = (1 << 64) - 1
FAULT = "LLM_DATADIST_TEST_FAULT"


def start(role: LLMRole, cluster_id: int, port: int | None = None) -> LLMDataDist:
    options = make_options(role, port=port, pool_bytes=96 * MIB, sync_kv_timeout=int(TIMEOUT_S * 1000))
    options["ge.exec.deviceId"] = "0" if role is LLMRole.PROMPT else "1"
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(options)
    return datadist


def allocate(datadist: LLMDataDist, *keys: CacheKey) -> KvCache:
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_UINT8)
    return datadist.kv_cache_manager.allocate_cache(desc, list(keys))


def fill(datadist: LLMDataDist, cache: KvCache, seed: int) -> None:
    pool = datadist._engine._caches.device
    for tensor, address in enumerate(cache.per_device_tensor_addrs[0]):
        pool.write(address, payload(seed, tensor, SHAPE[0] * SHAPE[1]).tobytes())


def holds(
    datadist: LLMDataDist, cache: KvCache, slot: int, seed: int, of_slot: int = 0, tensors: int = TENSORS
) -> bool:
    for tensor in range(tensors):
        array = datadist.kv_cache_manager.get_cache_tensors(cache, tensor)[0].numpy()
        if (array[slot] != payload(seed, tensor, SHAPE[0] * SHAPE[1]).reshape(SHAPE)[of_slot]).any():
            return False
    return True


def code_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[LLMStatusCode, str, float]:
    """Code and text that a call ends with, and how long it took."""
    began = time.monotonic()
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code, str(error), time.monotonic() - began
    return OK, "", time.monotonic() - began


def assert_nothing_lives() -> None:
    live = ("allocations", "imports", "exports", "host", "streams", "events", "communicators", "registrations")
    left = {name: count for name in live if (count := counter(f"live.{name}"))}
    assert not left, left


# ---- the prompt's process: what the decoder asks for


def prompt(peer: Connection) -> None:
    """Offer slots 0 to 3 of a cache under prefix keys, and do what the decoder says until it says the end."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    datadist = start(LLMRole.PROMPT, PROMPT, port)
    cache = allocate(datadist, *(CacheKey(PROMPT, NO_REQUEST, prefix_id=number) for number in range(4)))
    fill(datadist, cache, 7)
    peer.send((port, os.getpid()))
    while (asked := peer.recv()) is not None:
        what, *arguments = asked
        if what == "fault":
            set_knob("FAULTS", arguments[0])
            peer.send(True)
        elif what == "struck":
            peer.send(counter(f"fault.{arguments[0]}"))
        elif what == "push":
            peer.send(push(datadist, cache, *arguments))
    datadist.finalize()
    holder.close()
    assert_nothing_lives()


def push(datadist: LLMDataDist, cache: KvCache, addresses: list[int]) -> tuple[LLMStatusCode, str, float]:
    """Send the layer of the first two tensors to addresses of the decoder."""
    config = TransferConfig(DECODER, addresses, range(1), 0)
    synchronizer = LayerEvents(1)
    synchronizer.record(0)
    began = time.monotonic()
    code = datadist.kv_cache_manager.transfer_cache_async(cache, synchronizer, [config]).synchronize(5000)
    return code, "", time.monotonic() - began


class Linked:
    """The decoder's process: an instance, linked to the prompt."""

    def __init__(self, peer: Connection) -> None:
        self.peer = peer
        self.port, self.prompt_pid = peer.recv()
        self.datadist = start(LLMRole.DECODER, DECODER)
        self.cache = allocate(self.datadist)

    def link(self, timeout: int = 5000) -> Any:
        return self.datadist.link_clusters([cluster_info(PROMPT, self.port)], timeout)

    def unlink(self) -> Any:
        return self.datadist.unlink_clusters([cluster_info(PROMPT, self.port)], 5000)

    def pull(self, number: int = 0, slot: int = 0) -> tuple[LLMStatusCode, str, float]:
        key = CacheKey(PROMPT, NO_REQUEST, prefix_id=number)
        return code_of(self.datadist.kv_cache_manager.pull_cache, key, self.cache, slot)

    def ask(self, *what: Any) -> Any:
        self.peer.send(what)
        return self.peer.recv()

    def states(self) -> list[str]:
        return [link.state for link in describe_links(self.datadist)]

    def end(self, *, prompt_lives: bool = True) -> None:
        if prompt_lives:
            self.peer.send(None)
        self.datadist.finalize()
        assert_nothing_lives()


def pulls_work(linked: Linked, seconds: float = 20.0) -> bool:
    """Pull until it works: a communicator that was lost is made anew, which may take longer than one pull."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if linked.pull(2, 1)[0] is OK:
            return holds(linked.datadist, linked.cache, 1, 7, 2)
    return False


# ---- one device


@on_simulator(LLM_DATADIST_DEVICE="simulator")
def test_a_pool_that_finds_no_memory_leaves_nothing_open() -> None:
    os.environ["LLMDD_SIM_FAULTS"] = "aclrtMallocAlign32#1+=code(207001)"  # read when the runtime is started
    code, text, _ = code_of(start, LLMRole.DECODER, DECODER)
    assert code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY, text
    assert "207001" in text
    assert counter("fault.aclrtMallocAlign32") >= 1
    assert_nothing_lives()
    set_knob("FAULTS", "")
    datadist = start(LLMRole.DECODER, DECODER)
    allocate(datadist)
    datadist.finalize()
    assert_nothing_lives()


@on_simulator(LLM_DATADIST_DEVICE="simulator")
@pytest.mark.parametrize(
    ("fault", "code"),
    [("code(507899)", LLMStatusCode.LLM_FAILED), ("half", LLMStatusCode.LLM_FAILED), ("hang", TIMEOUT)],
)
def test_a_copy_that_fails_says_so_and_the_next_one_works(fault: str, code: LLMStatusCode) -> None:
    datadist = start(LLMRole.DECODER, DECODER)
    cache, other = allocate(datadist), allocate(datadist)
    fill(datadist, cache, 3)
    set_knob("FAULTS", f"exec.copy#1={fault}")
    found, text, seconds = code_of(datadist.kv_cache_manager.copy_cache, other, cache, 1, 0)
    assert found is code, text
    assert counter("fault.exec.copy") == 1
    assert seconds < TIMEOUT_S + LITTLE_S
    if fault.startswith("code"):
        assert "507899" in text
    set_knob("FAULTS", "")
    datadist.kv_cache_manager.copy_cache(other, cache, 1, 0)
    assert holds(datadist, other, 1, 3)
    datadist.finalize()
    assert_nothing_lives()


# ---- making the communicator


def decoder_whose_communicator_fails(peer: Connection) -> None:
    linked = Linked(peer)
    where, at_prompt = os.environ[FAULT].split(",")
    if at_prompt == "prompt":
        linked.ask("fault", where)
    else:
        set_knob("FAULTS", where)
    began = time.monotonic()
    code, codes = linked.link()
    assert (code, codes) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    assert time.monotonic() - began < 5.0
    assert linked.states() == []
    assert linked.link(10_000) == LINKED
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 0, 7)
    linked.end()


@pytest.mark.parametrize("at", ["decoder", "prompt"])
@pytest.mark.parametrize("where", ["HcclCommInitRootInfoConfig#1=code(4)", "HcclBatchSendRecv#1=code(15)"])
def test_a_communicator_that_cannot_be_made_fails_the_link_and_not_the_next(where: str, at: str) -> None:
    pair_on_simulator(
        prompt, decoder_whose_communicator_fails, LLM_DATADIST_DEVICE="simulator", **{FAULT: f"{where},{at}"}
    )


def test_root_information_that_is_not_to_be_had_fails_the_link_and_not_the_next() -> None:
    fault = {FAULT: "HcclGetRootInfo#1=code(8),prompt"}
    pair_on_simulator(prompt, decoder_whose_communicator_fails, LLM_DATADIST_DEVICE="simulator", **fault)


def decoder_that_is_not_met(peer: Connection) -> None:
    linked = Linked(peer)
    linked.ask("fault", "HcclCommInitRootInfoConfig#1=delay(3000)")
    began = time.monotonic()
    assert linked.link(500) == (LLMStatusCode.LLM_LINK_FAILED, [TIMEOUT])
    assert time.monotonic() - began < 0.5 + LITTLE_S
    again = linked.link(15_000)
    assert again == LINKED, again
    assert linked.pull()[0] is OK
    linked.end()


def test_a_link_whose_partner_does_not_come_ends_at_the_callers_deadline() -> None:
    pair_on_simulator(prompt, decoder_that_is_not_met, LLM_DATADIST_DEVICE="simulator", TIME_SCALE=0.02)


# ---- transfers


def decoder_of_a_failing_pull(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    where, at_prompt = os.environ[FAULT].split(",")
    if at_prompt == "prompt":
        linked.ask("fault", where)
    else:
        set_knob("FAULTS", where)
    code, text, seconds = linked.pull()
    assert code in (LLMStatusCode.LLM_FAILED, TIMEOUT), text
    assert seconds < TIMEOUT_S + LITTLE_S
    point = where.partition("#")[0]
    struck = linked.ask("struck", point) if at_prompt == "prompt" else counter(f"fault.{point}")
    assert struck == 1
    assert linked.states() == ["LINKED"]
    assert pulls_work(linked)
    assert linked.unlink() == LINKED
    assert linked.link() == LINKED
    assert pulls_work(linked)
    linked.end()


@pytest.mark.parametrize(
    "fault",
    [
        "exec.send#1=code(507899),prompt",
        "exec.send#2=half,prompt",
        "exec.send#1=hang,prompt",
        "HcclBatchSendRecv#1=code(15),prompt",
        "exec.recv#1=code(507899),decoder",
        "exec.recv#1=hang,decoder",
        "HcclBatchSendRecv#1=code(1),decoder",
        "exec.send#1=eof,prompt",
    ],
)
def test_a_pull_whose_device_fails_ends_in_time_and_the_next_one_works(fault: str) -> None:
    pair_on_simulator(prompt, decoder_of_a_failing_pull, LLM_DATADIST_DEVICE="simulator", **{FAULT: fault})


def decoder_of_a_failing_push(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    addresses = linked.cache.per_device_tensor_addrs[0][:2]
    where, at_prompt = os.environ[FAULT].split(",")
    if at_prompt == "prompt":
        linked.ask("fault", where)
    else:
        set_knob("FAULTS", where)
    code, text, seconds = linked.ask("push", addresses)
    assert code in (LLMStatusCode.LLM_FAILED, TIMEOUT), text
    assert seconds < TIMEOUT_S + LITTLE_S
    give_up = time.monotonic() + 20
    while code is not OK and time.monotonic() < give_up:
        code, text, _ = linked.ask("push", addresses)
    assert code is OK, text
    assert holds(linked.datadist, linked.cache, 0, 7, tensors=2)
    linked.end()


@pytest.mark.parametrize(
    "fault", ["exec.send#1=code(507899),prompt", "exec.recv#1=hang,decoder", "HcclBatchSendRecv#1=code(15),decoder"]
)
def test_a_push_whose_device_fails_ends_in_time_and_the_next_one_works(fault: str) -> None:
    pair_on_simulator(prompt, decoder_of_a_failing_push, LLM_DATADIST_DEVICE="simulator", **{FAULT: fault})


# ---- the peer dies, or stands still


def prompt_that_is_killed(peer: Connection) -> None:
    """Be the prompt; the end by SIGKILL is what the test wants, so it happens in a child."""
    child = os.fork()
    if child == 0:
        prompt(peer)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def decoder_whose_prompt_dies(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    linked.ask("fault", os.environ[FAULT])
    code, text, seconds = linked.pull()
    assert code is TIMEOUT, text
    assert seconds < TIMEOUT_S + LITTLE_S
    give_up = time.monotonic() + 5
    while linked.states() != ["BROKEN"] and time.monotonic() < give_up:
        time.sleep(0.001)
    assert linked.states() == ["BROKEN"]
    assert linked.pull()[0] is TIMEOUT
    linked.end(prompt_lives=False)


@pytest.mark.parametrize("fault", ["HcclBatchSendRecv#1=kill", "exec.send#1=kill", "exec.send#2=kill"])
def test_a_prompt_that_dies_before_or_while_it_sends(fault: str) -> None:
    environment = {"LLM_DATADIST_DEVICE": "simulator", FAULT: fault}
    pair_on_simulator(prompt_that_is_killed, decoder_whose_prompt_dies, **environment)


def decoder_whose_prompt_stands_still(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    linked.ask("fault", "exec.send#1=stop")
    code, text, seconds = linked.pull()
    assert code is TIMEOUT, text
    assert seconds < TIMEOUT_S + LITTLE_S
    before = linked.datadist.kv_cache_manager.get_cache_tensors(linked.cache, 0)[0].numpy().copy()
    os.kill(linked.prompt_pid, signal.SIGCONT)
    assert pulls_work(linked)
    after = linked.datadist.kv_cache_manager.get_cache_tensors(linked.cache, 0)[0].numpy()
    assert (before[0] == after[0]).all(), "the late sender wrote into memory of the pull that had ended"
    linked.end()


def test_a_prompt_that_stands_still_costs_one_pull() -> None:
    pair_on_simulator(prompt, decoder_whose_prompt_stands_still, LLM_DATADIST_DEVICE="simulator")


# ---- the test bed


def decoder_that_compares_bytes(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    set_knob("FAULTS", f"exec.recv#1={os.environ[FAULT]}")
    assert linked.pull()[0] is OK
    assert counter("fault.exec.recv") == 1
    assert not holds(linked.datadist, linked.cache, 0, 7), "a comparison that does not see it proves nothing"
    set_knob("FAULTS", "")
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 0, 7)
    linked.end()


@pytest.mark.parametrize("lie", ["drop", "corrupt"])
def test_a_device_that_lies_is_seen_by_the_comparison(lie: str) -> None:
    pair_on_simulator(prompt, decoder_that_compares_bytes, LLM_DATADIST_DEVICE="simulator", **{FAULT: lie})
