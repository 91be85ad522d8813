"""Listeners that never answer, noise on every socket, a port that is taken."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable

import msgpack
import pytest
import zmq

from llm_datadist import CacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.control.messages import Accept, Hello, Refuse, decode, encode
from llm_datadist.transports import rendezvous, tcp
from tests import datadist_member as dd
from tests.integration.test_links import links
from tests.pair import PROMPT, Pair, start_decoder, start_prompt
from tests.processes import Member

Members = Callable[[str], Member]
OK = LLMStatusCode.LLM_SUCCESS


def ask(port: int, data: bytes, wait_ms: int = 2000) -> bytes | None:
    """Send raw bytes to a control server, give its answer or None."""
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(data)
        return dealer.recv() if dealer.poll(wait_ms) else None
    finally:
        context.destroy(linger=0)


def hello(**changes: object) -> Hello:
    fields = {
        "cluster_id": 50,
        "remote_cluster_id": PROMPT,
        "role": 2,
        "instance": b"i" * 16,
        "host": rendezvous.host_identity(),
        "transports": ["shared_memory"],
        "reason": "",
        "timeout_ms": 2000,
        "cache_manager": False,
        **changes,
    }
    return Hello(**fields)  # type: ignore[arg-type]


def _accept(name: str) -> Accept:
    return Accept(PROMPT, b"i" * 16, b"t" * 16, "shared_memory", "", name, "", 0)


@pytest.fixture
def transport() -> str:
    """What the pair uses: strangers come to both entrances of a server that allows everything."""
    return "shared_memory"


def assert_healthy(pair: Pair) -> None:
    pair.decoder.call(dd.check_link, PROMPT)
    cache = pair.prompt.call(dd.allocate, 2, (1, 64), keys=[CacheKey(PROMPT, 1)])
    pair.prompt.call(dd.fill, cache, 1)
    mine = pair.decoder.call(dd.allocate, 2, (1, 64))
    pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), mine)
    assert pair.decoder.call(dd.read, mine, 1) == dd.payload(1, 1, 64).tobytes()


def test_a_listener_that_never_answers(members: Members) -> None:
    decoder = start_decoder(members("decoder"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        overall, each = decoder.call(dd.link, PROMPT, silent.getsockname()[1], 300)
        assert time.monotonic() - started < 1.3
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT])
    assert decoder.call(links) == []


def test_a_server_that_speaks_another_version(members: Members) -> None:
    decoder = start_decoder(members("decoder"))
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        call = decoder.start(dd.link, PROMPT, port, 3000)
        assert router.poll(3000)
        peer, _ = router.recv_multipart()
        router.send_multipart([peer, msgpack.packb({"v": 99, "t": "accept"})])
        assert call.result() == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    finally:
        context.destroy(linger=0)


def test_a_server_that_accepts_and_names_no_socket(members: Members) -> None:
    decoder = start_decoder(members("decoder"))
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        call = decoder.start(dd.link, PROMPT, port, 3000)
        assert router.poll(3000)
        peer, _ = router.recv_multipart()
        router.send_multipart([peer, encode(_accept("nobody.there"))])
        assert call.result() == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
        assert decoder.call(links) == []
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("descriptors", [0, 1, 4])
def test_a_server_that_sends_wrong_descriptors(members: Members, descriptors: int) -> None:
    decoder = start_decoder(members("decoder"))
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    listener, name = rendezvous.listen()
    reading, writing = os.pipe()
    try:
        call = decoder.start(dd.link, PROMPT, port, 3000)
        assert router.poll(3000)
        peer, _ = router.recv_multipart()
        router.send_multipart([peer, encode(_accept(name))])
        listener.settimeout(3)
        connection, _ = listener.accept()
        assert connection.recv(16) == b"t" * 16
        rendezvous.send_descriptors(connection, rendezvous.GRANTED, [reading] * descriptors)
        assert call.result() == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
        connection.close()
    finally:
        os.close(reading)
        os.close(writing)
        listener.close()
        context.destroy(linger=0)


NOISE = {
    "nothing": b"",
    "text": b"noise",
    "zeros": bytes(60_000),
    "half a hello": msgpack.packb({"v": 1, "t": "hello"}),
    "a number": msgpack.packb(5),
}


@pytest.mark.parametrize("data", NOISE.values(), ids=NOISE.keys())
def test_noise_on_the_listening_port(pair: Pair, data: bytes) -> None:
    answer = ask(pair.port, data)
    assert answer is not None
    assert isinstance(decode(answer), Refuse)
    assert_healthy(pair)


def test_messages_beyond_the_limit_are_not_even_read(pair: Pair) -> None:
    assert ask(pair.port, bytes(200_000), wait_ms=300) is None
    assert_healthy(pair)


def test_raw_bytes_on_the_listening_port(pair: Pair) -> None:
    with socket.create_connection(("127.0.0.1", pair.port)) as connection:
        connection.sendall(os.urandom(10_000))
    assert_healthy(pair)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"remote_cluster_id": 9}, "the client expects 9"),
        ({"host": "elsewhere"}, "no transport in common"),
        ({"transports": ["pigeon"]}, "no transport in common"),
    ],
)
def test_hellos_that_cannot_be_met(pair: Pair, changes: dict[str, object], reason: str) -> None:
    answer = decode(ask(pair.port, encode(hello(**changes))) or b"")
    assert isinstance(answer, Refuse)
    assert reason in answer.reason


def test_a_client_that_stops_in_the_middle_is_forgotten(pair: Pair) -> None:
    """Twenty clients say hello and never come: more than may be set up at once, and the next one still links."""
    for number in range(20):
        ask(pair.port, encode(hello(cluster_id=100 + number, timeout_ms=500)), wait_ms=200 if number >= 16 else 2000)
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == (OK, [OK])
    assert pair.decoder.call(dd.link, PROMPT, pair.port, 5000) == (OK, [OK])
    assert_healthy(pair)


def test_strangers_on_the_unix_socket(pair: Pair) -> None:
    accept = decode(ask(pair.port, encode(hello())) or b"")
    assert isinstance(accept, Accept)
    for token in (b"x" * 16, b"short"):
        with rendezvous.connect(accept.rendezvous, 2) as stranger:
            stranger.sendall(token)
            stranger.shutdown(socket.SHUT_WR)  # or the rest is waited for
            assert stranger.recv(1) == b"", "a stranger gets nothing"
    with rendezvous.connect(accept.rendezvous, 2) as client:
        client.sendall(accept.token)
        received = rendezvous.receive_descriptors(client, rendezvous.GRANTED, 4)
        for descriptor in received:
            os.close(descriptor)
        client.sendall(b"?")  # not what comes next
        assert client.recv(1) == b""
    with rendezvous.connect(accept.rendezvous, 2) as late:
        late.sendall(accept.token)  # the token is used up
        assert late.recv(1) == b""
    assert_healthy(pair)


def test_the_listen_port_is_taken(members: Members, free_port: Callable[[], int]) -> None:
    port = free_port()
    start_prompt(members("first"), port)
    second = members("second")
    with pytest.raises(LLMException, match="cannot listen on 127.0.0.1") as caught:
        second.call(dd.init_datadist, LLMRole.PROMPT, 2, port=port)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    start_prompt(second, free_port(), cluster_id=2)  # the failed init left nothing in the way


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"L",
        b"GET / HTTP/1.1\r\nHost: prompt\r\n\r\n",
        b"LLMDTCP1" + bytes(16) + b"L",
        b"LLMDTCP1" + bytes(16) + b"F",
        b"LLMDTCP1" + bytes(16) + b"?",
        bytes(range(256)) * 64,
    ],
)
def test_strangers_on_the_data_port(pair: Pair, data: bytes) -> None:
    accept = decode(ask(pair.port, encode(hello(transports=["tcp"]))) or b"")
    assert isinstance(accept, Accept)
    for end in (data, data[:5]):
        with socket.create_connection(("127.0.0.1", accept.data_port)) as connection:
            connection.settimeout(5)
            connection.sendall(end)
            with contextlib.suppress(OSError):  # closed before we are through
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    assert_healthy(pair)


def test_the_token_of_a_set_up_is_good_for_one_connection(pair: Pair) -> None:
    accept = decode(ask(pair.port, encode(hello(transports=["tcp"]))) or b"")
    assert isinstance(accept, Accept)
    address = ("127.0.0.1", accept.data_port)
    first = tcp.connect(address, accept.token, tcp.LINK, time.monotonic() + 5)
    with first:
        tcp.expect(first, rendezvous.GRANTED, time.monotonic() + 5)
        with tcp.connect(address, accept.token, tcp.LINK, time.monotonic() + 5) as second:
            assert second.recv(1) == b""
    assert_healthy(pair)
