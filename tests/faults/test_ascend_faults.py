"""What fails on a device, in HCCL or at the peer, ordered of the Ascend simulator: the code, the time, what goes on.

Each test has two processes of its own on two simulated devices. They speak over a pipe: the prompt says its port, the
decoder asks it for faults. At the end nothing may live on the simulator.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

import pytest

from llm_datadist import (
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)
from llm_datadist.introspection import describe_links
from llm_datadist.layer_events import LayerEvents
from tests.on_simulator import counter, on_simulator, pair_on_simulator, set_knob, soon
from tests.simulated_pair import (
    DECODER,
    FAULT,
    LINKED,
    LITTLE_S,
    OK,
    PROMPT,
    TIMEOUT,
    Decoder,
    Outcome,
    allocate,
    assert_nothing_lives,
    code_of,
    fill,
    holds,
    offer,
    prefix,
    start,
    wait_for,
)

TIMEOUT_S = 1.0

# ---- the two processes


class Offering:
    """What the decoder can ask the prompt for."""

    def __init__(self, datadist: LLMDataDist) -> None:
        self._datadist = datadist
        self._cache = allocate(datadist, *(prefix(number) for number in range(4)))
        fill(datadist, self._cache, 7)

    def fault(self, faults: str) -> None:
        set_knob("FAULTS", faults)

    def struck(self, where: str) -> int:
        return counter(f"fault.{where}")

    def calls(self, function: str) -> int:
        return counter(f"calls.{function}")

    def push(self, addresses: list[int]) -> tuple[LLMStatusCode, float]:
        """Send the layer of the first two tensors to addresses of the decoder."""
        config = TransferConfig(DECODER, addresses, range(1), 0)
        synchronizer = LayerEvents(1)
        synchronizer.record(0)
        began = time.monotonic()
        task = self._datadist.kv_cache_manager.transfer_cache_async(self._cache, synchronizer, [config])
        return task.synchronize(5000), time.monotonic() - began


def prompt(peer: Connection) -> None:
    offer(peer, lambda port: start(LLMRole.PROMPT, PROMPT, port), Offering)


class Linked(Decoder):
    """The decoder's process."""

    def __init__(self, peer: Connection) -> None:
        super().__init__(peer, start(LLMRole.DECODER, DECODER))

    def states(self) -> list[str]:
        return [link.state for link in describe_links(self.datadist)]

    def order(self, fault: str) -> tuple[str, bool]:
        """Let something fail, here or at the prompt; gives the point, and whether it is at the prompt."""
        where, at = fault.split(",")
        if at == "prompt":
            self.ask("fault", where)
        else:
            set_knob("FAULTS", where)
        return where.partition("#")[0], at == "prompt"


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
    assert holds(datadist, other, 3, {1: 0})
    datadist.finalize()
    assert_nothing_lives()


# ---- making the communicator


def decoder_whose_communicator_fails(peer: Connection) -> None:
    linked = Linked(peer)
    linked.order(os.environ[FAULT])
    began = time.monotonic()
    code, codes = linked.link()
    assert (code, codes) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    assert time.monotonic() - began < 5.0
    assert linked.states() == []
    assert linked.link(10_000) == LINKED
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0})
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
    point, at_prompt = linked.order(os.environ[FAULT])
    code, text, seconds = linked.pull()
    assert code in (LLMStatusCode.LLM_FAILED, TIMEOUT), text
    assert seconds < TIMEOUT_S + LITTLE_S
    struck = linked.ask("struck", point) if at_prompt else counter(f"fault.{point}")
    assert struck == 1
    assert linked.states() == ["LINKED"]
    assert linked.works()
    assert linked.unlink() == LINKED
    assert linked.link() == LINKED
    assert linked.works()
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
    linked.order(os.environ[FAULT])
    code, seconds = linked.ask("push", addresses)
    assert code in (LLMStatusCode.LLM_FAILED, TIMEOUT)
    assert seconds < TIMEOUT_S + LITTLE_S
    give_up = time.monotonic() + 20
    while code is not OK and time.monotonic() < give_up:
        code, _ = linked.ask("push", addresses)
    assert code is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0}, tensors=2)
    linked.end()


@pytest.mark.parametrize(
    "fault", ["exec.send#1=code(507899),prompt", "exec.recv#1=hang,decoder", "HcclBatchSendRecv#1=code(15),decoder"]
)
def test_a_push_whose_device_fails_ends_in_time_and_the_next_one_works(fault: str) -> None:
    pair_on_simulator(prompt, decoder_of_a_failing_push, LLM_DATADIST_DEVICE="simulator", **{FAULT: fault})


def decoder_whose_communicator_goes_while_it_waits(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    exchange = linked.datadist._engine._links.get("test", PROMPT).end.exchange
    assert exchange.rank == 1, "the one that takes its turn when the other end has posted already"
    assert exchange.begin_change(soon())
    before = linked.ask("calls", "HcclBatchSendRecv")
    pulled: list[Outcome] = []
    pulling = threading.Thread(target=lambda: pulled.append(linked.pull()))
    pulling.start()
    wait_for(lambda: linked.ask("calls", "HcclBatchSendRecv") > before)
    exchange.discard(soon())
    exchange.end_change()
    pulling.join(TIMEOUT_S + LITTLE_S)
    ((code, text, _),) = pulled
    assert code in (OK, TIMEOUT), text
    assert linked.works()
    linked.end()


def test_a_communicator_that_goes_while_a_pull_waits_for_its_turn_is_made_anew() -> None:
    """The test takes it away without an abort, which the simulator would end the process for."""
    decoder = decoder_whose_communicator_goes_while_it_waits
    pair_on_simulator(prompt, decoder, LLM_DATADIST_DEVICE="simulator", MISUSE="log")


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


def decoder_whose_prompt_dies_over_a_communicator(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    exchange = linked.datadist._engine._links.get("test", PROMPT).end.exchange
    assert exchange.begin_change(soon())
    exchange.discard(soon())
    exchange.end_change()
    linked.ask("fault", "HcclCommInitRootInfoConfig#1=kill")
    code, text, seconds = linked.pull()
    assert (code, "is dead" in text) == (TIMEOUT, True), text
    assert seconds < TIMEOUT_S + LITTLE_S
    linked.end(prompt_lives=False)


def test_a_prompt_that_dies_while_a_pull_waits_for_a_communicator_is_a_dead_peer() -> None:
    decoder = decoder_whose_prompt_dies_over_a_communicator
    pair_on_simulator(prompt_that_is_killed, decoder, LLM_DATADIST_DEVICE="simulator")


def decoder_whose_prompt_stands_still(peer: Connection) -> None:
    linked = Linked(peer)
    assert linked.link() == LINKED
    linked.ask("fault", "exec.send#1=stop")
    code, text, seconds = linked.pull()
    assert code is TIMEOUT, text
    assert seconds < TIMEOUT_S + LITTLE_S
    before = linked.datadist.kv_cache_manager.get_cache_tensors(linked.cache, 0)[0].numpy().copy()
    os.kill(linked.prompt_pid, signal.SIGCONT)
    assert linked.works()
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
    assert not holds(linked.datadist, linked.cache, 7, {0: 0}), "a comparison that does not see it proves nothing"
    set_knob("FAULTS", "")
    assert linked.pull()[0] is OK
    assert holds(linked.datadist, linked.cache, 7, {0: 0})
    linked.end()


@pytest.mark.parametrize("lie", ["drop", "corrupt"])
def test_a_device_that_lies_is_seen_by_the_comparison(lie: str) -> None:
    pair_on_simulator(prompt, decoder_that_compares_bytes, LLM_DATADIST_DEVICE="simulator", **{FAULT: lie})
