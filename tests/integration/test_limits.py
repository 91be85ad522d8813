"""Limits of links, each at the limit and over it: clusters a call, links of a process, set-ups at one time."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from llm_datadist import LLMRole, LLMStatusCode
from llm_datadist.control.messages import Accept, Hello, Message, Probe, ProbeAnswer, decode, encode
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.options import EngineOptions
from llm_datadist.transports import rendezvous
from tests import many_engines
from tests.many_engines import HOST, POOL_BYTES, address_of
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
FAILED = LLMStatusCode.LLM_LINK_FAILED
TOO_MANY = LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT
ALREADY = LLMStatusCode.LLM_ALREADY_LINK

CALL = 16  # clusters a call
LINKS = 512
SET_UPS = 16  # at one time, on a server
PROCESSES = 4
CALL_TIMEOUT_S = 60.0
ONE = 1  # cluster id of the engine whose links are counted

Members = Callable[[str], Member]


def ids_of(process: int) -> list[int]:
    """Cluster ids of the engines in a process; those of the last one are one more than the limit leaves room for."""
    each = LINKS // PROCESSES
    first = 1000 + process * each
    return list(range(first, first + each + (process == PROCESSES - 1)))


# ---- links of a process


def test_links_of_one_prompt(members: Members) -> None:
    prompt = members("prompt")
    (port,) = prompt.call(many_engines.open_prompts, [ONE])
    decoders = [members(f"decoders-{process}") for process in range(PROCESSES)]
    for call in [decoders[process].start(many_engines.open_decoders, ids_of(process)) for process in range(PROCESSES)]:
        call.result(CALL_TIMEOUT_S)
    *first_ids, last, over = ids_of(PROCESSES - 1)
    ids = [*(ids_of(process) for process in range(PROCESSES - 1)), first_ids]
    started = time.monotonic()
    calls = [decoder.start(many_engines.link_from_each, numbers, ONE, port) for decoder, numbers in zip(decoders, ids)]
    results = [result for call in calls for result in call.result(CALL_TIMEOUT_S)]
    print(f"{len(results)} links of one prompt in {time.monotonic() - started:.2f} s")
    assert results == [(OK, [OK])] * (LINKS - 1)

    link = many_engines.link_from_each
    both = decoders[-1].call(link, [last, over], ONE, port)  # at the same moment, and there is room for one
    assert sorted(both, key=str) == sorted([(OK, [OK]), (FAILED, [INVALID])], key=str)
    loser = (last, over)[both.index((FAILED, [INVALID]))]
    assert prompt.call(many_engines.states_of_links, ONE) == ["LINKED"] * LINKS

    assert decoders[0].call(many_engines.unlink_all, ids[0][0], [(ONE, port)]) == (OK, [OK])
    assert decoders[-1].call(link, [loser], ONE, port) == [(OK, [OK])]
    assert decoders[0].call(link, [ids[0][0]], ONE, port) == [(FAILED, [INVALID])]
    for decoder in decoders:
        decoder.call(many_engines.close_engines, timeout=CALL_TIMEOUT_S)
    prompt.call(many_engines.close_engines)


def test_links_of_one_decoder(members: Members) -> None:
    decoder = members("decoder")
    decoder.call(many_engines.open_decoders, [ONE])
    prompts = [members(f"prompts-{process}") for process in range(PROCESSES)]
    calls = [prompts[process].start(many_engines.open_prompts, ids_of(process)) for process in range(PROCESSES)]
    targets: list[tuple[int, int]] = []
    for process, call in enumerate(calls):
        targets += zip(ids_of(process), call.result(CALL_TIMEOUT_S))
    over = targets.pop()
    link_all = many_engines.link_to_all
    started = time.monotonic()
    for first in range(0, LINKS, CALL):
        result = decoder.call(link_all, ONE, targets[first : first + CALL], timeout=CALL_TIMEOUT_S)
        assert result == (OK, [OK] * CALL)
    print(f"{LINKS} links of one decoder in {time.monotonic() - started:.2f} s, {CALL} a call")

    assert decoder.call(link_all, ONE, [over]) == (INVALID, [INVALID])
    assert decoder.call(link_all, ONE, [targets[0], over]) == (INVALID, [INVALID] * 2)
    assert decoder.call(link_all, ONE, targets[:2]) == (OK, [ALREADY] * 2)
    assert decoder.call(many_engines.unlink_all, ONE, targets[:1]) == (OK, [OK])
    assert decoder.call(link_all, ONE, [targets[0], over]) == (INVALID, [INVALID] * 2)
    assert decoder.call(link_all, ONE, [over]) == (OK, [OK])
    assert decoder.call(many_engines.states_of_links, ONE) == ["LINKED"] * LINKS
    decoder.call(many_engines.close_engines)
    for prompt in prompts:
        prompt.call(many_engines.close_engines, timeout=CALL_TIMEOUT_S)


# ---- clusters of a call


@pytest.fixture
def decoder() -> Iterator[Engine]:
    with contextlib.closing(Engine(EngineOptions(LLMRole.DECODER, ONE, pool_bytes=POOL_BYTES))) as engine:
        yield engine


def test_clusters_of_a_call(decoder: Engine, members: Members) -> None:
    ids = list(range(2, 2 + CALL + 1))
    prompts = members("prompts")
    clusters = [address_of(*target) for target in zip(ids, prompts.call(many_engines.open_prompts, ids))]
    assert decoder.link(clusters, 5000) == (TOO_MANY, [])
    assert decoder.describe_links() == []
    assert decoder.link(clusters[:CALL], 5000) == (OK, [OK] * CALL)
    assert decoder.link(clusters, 5000) == (TOO_MANY, [])  # also if no new link is among them
    assert decoder.unlink(clusters, 5000, False) == (TOO_MANY, [])
    assert len(decoder.describe_links()) == CALL
    assert decoder.unlink(clusters[:CALL], 5000, False) == (OK, [OK] * CALL)
    prompts.call(many_engines.close_engines)


# ---- set-ups at one time


class Client:
    """Speaks to a server in raw messages. Answers come in the order in which the server gives them."""

    def __init__(self, port: int) -> None:
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.connect(f"tcp://{HOST}:{port}")

    def send(self, message: Message) -> None:
        self._dealer.send(encode(message))

    def hello(self, cluster_id: int, timeout_ms: int = 20_000) -> None:
        self.send(
            Hello(
                cluster_id=cluster_id,
                remote_cluster_id=ONE,
                role=2,
                instance=b"i" * 16,
                host=rendezvous.host_identity(),
                transports=["shared_memory"],
                reason="",
                timeout_ms=timeout_ms,
                cache_manager=False,
            )
        )

    def receive(self) -> Message:
        assert self._dealer.poll(5000), "no answer"
        return decode(self._dealer.recv())

    def all_answers(self) -> list[Message]:
        """Answers to everything that was sent so far: those that come before the answer to a probe."""
        self.send(Probe(cluster_id=0, token=b""))
        answers = [self.receive()]
        while not isinstance(answers[-1], ProbeAnswer):
            answers.append(self.receive())
        return answers[:-1]

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def port(free_port: Callable[[], int]) -> Iterator[int]:
    """Where a PROMPT listens, in this process."""
    number = free_port()
    options = EngineOptions(LLMRole.PROMPT, ONE, listen=((HOST, number),), pool_bytes=POOL_BYTES)
    with contextlib.closing(Engine(options)):
        yield number


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with contextlib.closing(Client(port)) as client:
        yield client


def give_up(accept: Message) -> None:
    """Take part in a set-up, go away in the middle, and wait until the server has noticed."""
    assert isinstance(accept, Accept)
    with rendezvous.connect(accept.rendezvous, 2) as connection:
        connection.sendall(accept.token)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1):
            pass


def test_set_ups_at_one_time(client: Client) -> None:
    for number in range(SET_UPS + 3):
        client.hello(100 + number)
    accepts = client.all_answers()
    assert len(accepts) == SET_UPS
    for done in range(3):
        give_up(accepts[done])
        accepts.append(client.receive())  # the next in line
    assert all(isinstance(accept, Accept) for accept in accepts)
    assert len({accept.token for accept in accepts}) == SET_UPS + 3  # type: ignore[union-attr]
    assert client.all_answers() == []


def test_who_waited_too_long_is_passed_over(client: Client) -> None:
    for number in range(SET_UPS):
        client.hello(100 + number)
    accepts = client.all_answers()
    client.hello(200, timeout_ms=1)
    client.hello(201)
    assert client.all_answers() == []
    late = time.monotonic() + 0.002
    while time.monotonic() < late:
        assert client.all_answers() == []
    for accept in accepts[:2]:
        give_up(accept)
    assert len(client.all_answers()) == 1, "two places came free, but only one of the two still waited"


def test_links_are_made_while_others_wait(client: Client, decoder: Engine, port: int) -> None:
    """A decoder that comes when every place is taken is linked as soon as one comes free."""
    started = time.monotonic()
    for number in range(SET_UPS):
        client.hello(100 + number, timeout_ms=500)
    assert len(client.all_answers()) == SET_UPS
    assert decoder.link([address_of(ONE, port)], 10_000) == (OK, [OK])
    assert time.monotonic() - started >= 0.5, "no place came free before"
