"""Members of a communicator that die, stop, or say what no member says: the others hear of it in time, and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.control.messages import MemberAccept, MemberHello, Message, Probe, Refuse, decode
from llm_datadist.control.stream import MAX_FRAME_BYTES, send_message
from llm_datadist.engine.communicator import MemberStatus
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.membership import Membership
from llm_datadist.engine.network import TRANSPORT
from llm_datadist.engine.rank_table import read_rank_table
from llm_datadist.transports import rendezvous, tcp
from tests import peer_engine as peer
from tests.member_ports import HOST
from tests.peer_engine import BROKEN, LINKED, assert_pulls, joined, make_engine, own, rank_table
from tests.processes import Member

Members = Callable[[str], Member]
Code = LLMStatusCode

OK, PREPARING, FAILED = MemberStatus.OK, MemberStatus.PREPARING, MemberStatus.FAILED
A, B, C = 11, 12, 13  # cluster ids
PAIR = own("pair")
SECONDS = 2  # for a set-up


@pytest.fixture(params=["shared_memory", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the engines of a test are told about the transport, in all of its processes."""
    monkeypatch.setenv(TRANSPORT, request.param)
    return str(request.param)


@pytest.fixture
def start(members: Members) -> Callable[..., Member]:
    """Start a process with an engine."""

    def start_one(name: str, cluster_id: int, **options: int) -> Member:
        member = members(name)
        member.call(peer.open_peer, cluster_id, **options)
        return member

    return start_one


Start = Callable[..., Member]


def wait_until_failed(member: Member, communicator: int, seconds: float = SECONDS + 2) -> float:
    found, passed = member.call(peer.wait_for_status, communicator, seconds)
    assert found is FAILED
    return passed


# ---- processes


@pytest.mark.parametrize("dying", [A, B])
def test_a_member_is_killed_before_the_other_joins(dying: int, start: Start) -> None:
    pair = {number: start(f"member-{number}", number, link_total_time_s=SECONDS) for number in (A, B)}
    living = A + B - dying
    ranks = {A: 0, B: 1}
    pair[dying].call(peer.join, PAIR, ranks)
    pair[dying].kill()
    communicator = pair[living].call(peer.join, PAIR, ranks)
    assert wait_until_failed(pair[living], communicator) > SECONDS - 0.5, "it may have come back"
    assert pair[living].call(peer.member_links) == []


@pytest.mark.parametrize("dying", [A, B])
def test_a_killed_member_comes_back_while_the_other_waits(dying: int, start: Start) -> None:
    ranks = {A: 0, B: 1}
    pair = {number: start(f"member-{number}", number) for number in (A, B)}
    living = A + B - dying
    pair[dying].call(peer.join, PAIR, ranks)
    pair[dying].kill()
    communicator = pair[living].call(peer.join, PAIR, ranks)
    pair[dying] = start("member again", dying)
    again = pair[dying].call(peer.join, PAIR, ranks)
    assert pair[dying].call(peer.wait_for_status, again)[0] is OK
    assert pair[living].call(peer.wait_for_status, communicator)[0] is OK
    assert_pulls(pair[living], pair[dying], dying, 1)


@pytest.mark.parametrize("stopped", [A, B])
def test_a_member_is_stopped_while_preparing(stopped: int, start: Start) -> None:
    """Its socket stands and nobody answers; when it goes on, nothing of the past disturbs a new start."""
    ranks = {A: 0, B: 1}
    pair = {number: start(f"member-{number}", number, link_total_time_s=SECONDS) for number in (A, B)}
    running = A + B - stopped
    waiting = pair[stopped].call(peer.join, PAIR, ranks)
    pair[stopped].stop()
    communicator = pair[running].call(peer.join, PAIR, ranks)
    assert pair[running].call(peer.status, communicator) is PREPARING
    assert wait_until_failed(pair[running], communicator) > SECONDS - 0.5
    pair[running].call(peer.leave, communicator)
    pair[stopped].cont()
    wait_until_failed(pair[stopped], waiting)
    pair[stopped].call(peer.leave, waiting)
    joined(pair, PAIR)
    assert_pulls(pair[running], pair[stopped], stopped, 1)


def test_a_member_that_leaves_while_the_other_is_stopped_and_comes_again(start: Start) -> None:
    """The stopped one finds the first visit, which is over, before the second one."""
    ranks = {A: 0, B: 1}
    pair = {number: start(f"member-{number}", number) for number in (A, B)}
    waiting = pair[A].call(peer.join, PAIR, ranks)
    pair[A].stop()
    pair[B].call(peer.leave, pair[B].call(peer.join, PAIR, ranks))
    communicator = pair[B].call(peer.join, PAIR, ranks)
    pair[A].cont()
    assert pair[A].call(peer.wait_for_status, waiting)[0] is OK
    assert pair[B].call(peer.wait_for_status, communicator)[0] is OK


@pytest.mark.parametrize("dying", [A, B])
def test_a_member_is_killed_when_all_is_well(dying: int, start: Start) -> None:
    pair = {number: start(f"member-{number}", number) for number in (A, B)}
    living = A + B - dying
    ids = joined(pair, PAIR)
    pair[dying].kill()
    peer.wait_for_links(pair[living], [(dying, BROKEN)])
    assert pair[living].call(peer.status, ids[living]) is FAILED
    started = time.monotonic()
    with pytest.raises(LLMException):
        pair[living].call(peer.pull, dying, 1)
    assert time.monotonic() - started < 1
    pair[living].call(peer.leave, ids[living])
    assert pair[living].call(peer.member_links) == []
    pair[dying] = start("member again", dying)
    joined(pair, PAIR)
    assert_pulls(pair[living], pair[dying], dying, 1)


def test_a_member_is_stopped_when_all_is_well(start: Start, transport: str) -> None:
    """Its memory may be read meanwhile, or it has to answer."""
    pair = {number: start(f"member-{number}", number) for number in (A, B)}
    ids = joined(pair, PAIR)
    pair[B].call(peer.offer, 1, 1)
    pair[B].stop()
    if transport == tcp.NAME:
        with pytest.raises(LLMException) as caught:
            pair[A].call(peer.pull, B, 1)
        assert caught.value.status_code is Code.LLM_TIMEOUT
    else:
        assert pair[A].call(peer.pull, B, 1) == bytes([1]) * peer.TENSOR_BYTES
    assert pair[A].call(peer.status, ids[A]) is OK, "the other one lives"
    started = time.monotonic()
    pair[A].call(peer.leave, ids[A])
    assert time.monotonic() - started < 1, "leaving asks nobody"
    pair[B].cont()
    peer.wait_for_links(pair[B], [])
    assert pair[B].call(peer.status, ids[B]) is FAILED


def test_one_of_three_is_killed(start: Start) -> None:
    """Before it has come: the others wait for it. Afterwards: what links them stays usable."""
    three = {number: start(f"member-{number}", number) for number in (A, B, C)}
    ids = joined(three, own("three"))
    three[C].kill()
    for number in (A, B):
        other = A + B - number
        peer.wait_for_links(three[number], [(other, LINKED), (C, BROKEN)])
        assert three[number].call(peer.status, ids[number]) is FAILED
    assert_pulls(three[A], three[B], B, 1)


def test_a_member_is_killed_before_the_third_has_come(start: Start) -> None:
    ranks = {A: 0, B: 1, C: 2}
    a, b = start("a", A), start("b", B)
    ids = [member.call(peer.join, own("three"), ranks) for member in (a, b)]
    peer.wait_for_links(a, [(B, LINKED)])
    assert a.call(peer.status, ids[0]) is PREPARING
    b.kill()
    assert wait_until_failed(a, ids[0], 5) < 2, "long before the deadline"
    peer.wait_for_links(a, [])
    a.call(peer.leave, ids[0])


def test_members_are_killed_in_the_middle_again_and_again(start: Start) -> None:
    """Many communicators at once, and a kill at some moment of their set-ups: all of them end."""
    ranks = {A: 0, B: 1}
    communicators = [(own(f"communicator {number}"), ranks) for number in range(30)]
    living = start("living", A, link_total_time_s=SECONDS)
    for turn in range(6):
        dying = start(f"dying {turn}", B)
        ids = living.call(peer.join_from_threads, communicators)
        dying.start(peer.join_from_threads, communicators)
        if turn:
            living.call(wait_for_a_link)
        dying.kill()
        for communicator in ids.values():
            living.call(wait_until_none_is_left, communicator)
            living.call(peer.leave, communicator)
        assert living.call(peer.member_links) == []


def wait_until_none_is_left(state: peer.State, communicator: int) -> None:
    """Wait for a failure; a communicator may have been complete for a moment."""
    deadline = time.monotonic() + SECONDS + 2
    while peer.status(state, communicator) is not FAILED:
        assert time.monotonic() < deadline


def wait_for_a_link(state: peer.State) -> None:
    deadline = time.monotonic() + 5
    while not peer.links(state):
        assert time.monotonic() < deadline


# ---- a member that is none, played by the test


RANKS = {A: 0, B: 1}
TABLE = read_rank_table(rank_table(2)).digest()


MEETING = Membership(1, PAIR, {0: A, 1: B}, 0, TABLE, 0.0, 1)


@pytest.fixture
def listening(transport: str) -> Iterator[Engine]:
    """An engine of rank 0, to which others come."""
    with contextlib.closing(make_engine(A)) as engine:
        engine.link_members(PAIR, RANKS, rank_table(2))
        yield engine


class Place(NamedTuple):
    """Where the member of rank 0 is met: on its Unix socket, or at its port."""

    transport: str
    port: int

    def come(self, preamble: bytes | None = None) -> socket.socket:
        """Connect to the member, as soon as it listens, and say over TCP whom this is for."""
        deadline = time.monotonic() + 5
        while True:
            try:
                return self._connect(tcp.preamble(MEETING.digest(), tcp.MEMBER) if preamble is None else preamble)
            except OSError:
                assert time.monotonic() < deadline

    def _connect(self, preamble: bytes) -> socket.socket:
        if self.transport != tcp.NAME:
            return rendezvous.connect(MEETING.meeting_name(0), 5.0)
        connection = socket.create_connection((HOST, self.port), 5.0)
        connection.sendall(preamble)
        return connection

    def take(self) -> socket.socket:
        """Listen in the place of the member."""
        if self.transport != tcp.NAME:
            return rendezvous.listen_at(MEETING.meeting_name(0))
        return tcp.listen(HOST, (self.port, self.port))

    def accept(self, listener: socket.socket) -> socket.socket:
        """Wait for a member of higher rank, and hear whom it is for."""
        listener.settimeout(5)
        connection, _ = listener.accept()
        connection.settimeout(5)
        if self.transport == tcp.NAME:
            said = connection.recv(tcp.PREAMBLE_BYTES, socket.MSG_WAITALL)
            assert tcp.read_preamble(said) == (MEETING.digest(), tcp.MEMBER)
        return connection

    def hello(self, **changes: object) -> MemberHello:
        fields = {
            "cluster_id": B,
            "rank": 1,
            "instance": b"i" * 16,
            "rank_table": TABLE,
            "host": rendezvous.host_identity(),
            "transports": [self.transport],
            "reason": "",
            **changes,
        }
        return MemberHello(**fields)  # type: ignore[arg-type]

    def say_hello(self, connection: socket.socket) -> MemberAccept:
        """Say hello, and hear that the link is going to be made."""
        send_message(connection, self.hello())
        answer = receive(connection)
        assert isinstance(answer, MemberAccept)
        assert (answer.cluster_id, answer.rank, answer.transport) == (A, 0, self.transport)
        if self.transport != tcp.NAME:
            for descriptor in rendezvous.receive_descriptors(connection, rendezvous.GRANTED, 4):
                os.close(descriptor)
        return answer


@pytest.fixture
def place(transport: str, member_base_port: int) -> Place:
    return Place(transport, member_base_port)


def receive(connection: socket.socket) -> Message:
    (length,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
    return decode(connection.recv(length, socket.MSG_WAITALL))


def assert_hangs_up(connection: socket.socket) -> None:
    """Say no more, and expect that the other side closes."""
    code: int | None = 0
    try:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    except OSError as error:
        code = error.errno
    assert code in (0, errno.ECONNRESET, errno.ENOTCONN), "a reset says that it did not read to the end"


def status_of(engine: Engine) -> MemberStatus:
    return MemberStatus(engine.member_status(1))


def assert_still_joins(engine: Engine) -> None:
    """The real member comes, and all is well."""
    assert status_of(engine) is PREPARING
    with contextlib.closing(make_engine(B)) as other:
        communicator = other.link_members(PAIR, RANKS, rank_table(2))
        assert peer.wait_for_status({"engine": other}, communicator)[0] is OK
        assert peer.wait_for_status({"engine": engine}, 1)[0] is OK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"noise, and quite a lot of it" * 100,
        struct.pack("!I", MAX_FRAME_BYTES + 1),
        struct.pack("!I", 2**32 - 1) + bytes(10_000),
        struct.pack("!I", 100) + b"half a message",
        struct.pack("!I", 5) + b"\x81\xa1v\x01\x00",
    ],
    ids=["nothing", "a byte", "text", "too long", "much too long", "half", "no hello"],
)
def test_noise_on_the_socket_of_a_member(data: bytes, listening: Engine, place: Place) -> None:
    with place.come() as noisy:
        noisy.sendall(data)
        assert_hangs_up(noisy)
    assert_still_joins(listening)


def test_another_message_on_the_socket_of_a_member(listening: Engine, place: Place) -> None:
    with place.come() as confused:
        send_message(confused, Probe(1, b"t" * 16))
        assert confused.recv(1) == b""
    assert_still_joins(listening)


def test_half_open_connections_keep_nobody_out(listening: Engine, place: Place) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(100):
            silent.enter_context(place.come())
        assert_still_joins(listening)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank_table": b"other"}, "ranks 0 and 1 were given different rank tables"),
        ({"cluster_id": 99}, "cluster 99 comes as rank 1, which is cluster 12 to rank 0"),
        ({"rank": 7}, "cluster 12 comes as rank 7, which is nobody else to rank 0"),
        ({"rank": 0}, "cluster 12 comes as rank 0, which is nobody else to rank 0"),
    ],
)
def test_members_that_do_not_agree_are_told(
    changes: dict[str, object], reason: str, listening: Engine, place: Place
) -> None:
    with place.come() as stranger:
        send_message(stranger, place.hello(**changes))
        answer = receive(stranger)
    assert answer == Refuse(Code.LLM_LINK_FAILED, reason)
    assert peer.wait_for_status({"engine": listening}, 1, 1)[0] is FAILED


def test_a_member_that_is_lost_before_it_has_what_it_needs(
    listening: Engine, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with place.come() as member:
        place.say_hello(member)
        assert status_of(listening) is PREPARING
    assert peer.wait_for_status({"engine": listening}, 1, 1)[0] is FAILED
    assert "cluster 12 (rank 1) was lost during the set-up" in caplog.text
    listening.unlink_members(1)


def test_attempts_are_counted(place: Place) -> None:
    with contextlib.closing(make_engine(A, link_retry_count=3)) as engine:
        engine.link_members(PAIR, RANKS, rank_table(2))
        for _ in range(2):
            with place.come() as member:
                place.say_hello(member)
        assert_still_joins(engine)


@pytest.mark.parametrize("transport", ["shared_memory"], indirect=True)
@pytest.mark.parametrize("descriptors", [0, 1, 4, 5])
def test_descriptors_that_are_none_of_ours(descriptors: int, listening: Engine, place: Place) -> None:
    reading, writing = os.pipe()
    try:
        with place.come() as member:
            place.say_hello(member)
            if descriptors:
                rendezvous.send_descriptors(member, rendezvous.MAPPED, [reading] * descriptors)
            else:
                member.sendall(rendezvous.MAPPED)
            assert peer.wait_for_status({"engine": listening}, 1, 1)[0] is FAILED
    finally:
        os.close(reading)
        os.close(writing)


def test_a_member_that_stops_in_the_middle(place: Place) -> None:
    with contextlib.closing(make_engine(A, link_total_time_s=1)) as engine:
        engine.link_members(PAIR, RANKS, rank_table(2))
        with place.come() as member:
            place.say_hello(member)
            found, seconds = peer.wait_for_status({"engine": engine}, 1)
            assert found is FAILED
            assert seconds < 3


@pytest.mark.parametrize("leaves", [True, False])
def test_giving_up_in_the_middle(leaves: bool, listening: Engine, place: Place) -> None:
    with place.come() as member:
        place.say_hello(member)
        if leaves:
            listening.unlink_members(1)
        else:
            listening.close()
        assert member.recv(1) == b""


def test_a_member_that_begins_again(listening: Engine, place: Place) -> None:
    """The second connection counts, though the first one is still open."""
    with place.come() as first:
        place.say_hello(first)
        assert_still_joins(listening)
        assert first.recv(1) == b""


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Refuse(1, "no"), FAILED),
        (Probe(1, b"t" * 16), FAILED),
        (MemberAccept(99, 0, b"i" * 16, b"t" * 16, "", ""), FAILED),
        (MemberAccept(A, 0, b"i" * 16, b"t" * 16, "pigeon", ""), FAILED),
        (MemberAccept(A, 0, b"i" * 16, b"short", "", ""), FAILED),
        (None, PREPARING),
    ],
    ids=["refuses", "says something else", "is another", "another transport", "no token", "closes"],
)
def test_what_a_member_of_lower_rank_may_answer(answer: Message | None, status: MemberStatus, place: Place) -> None:
    if isinstance(answer, MemberAccept) and not answer.transport:
        answer = dataclasses.replace(answer, transport=place.transport)
    with place.take() as listener, contextlib.closing(make_engine(B)) as engine:
        engine.link_members(PAIR, RANKS, rank_table(2))
        with place.accept(listener) as connection:
            assert isinstance(receive(connection), MemberHello)
            if answer is not None:
                send_message(connection, answer)
        if status is FAILED:
            assert peer.wait_for_status({"engine": engine}, 1, 2)[0] is FAILED
        else:
            place.accept(listener).close()  # it tries again
            assert MemberStatus(engine.member_status(1)) is PREPARING


def test_a_place_that_is_taken_for_a_while(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A process that still listens there, perhaps one that is about to end: its successor waits for it."""
    caplog.set_level("WARNING", "llm_datadist")
    warning = f"port {place.port} of {HOST}, where this process should listen, is in use"
    if place.transport != tcp.NAME:
        warning = "another process waits as rank 0"
    with contextlib.closing(make_engine(A)) as engine, contextlib.closing(make_engine(B)) as other:
        with place.take():
            engine.link_members(PAIR, RANKS, rank_table(2))
            deadline = time.monotonic() + 5
            while warning not in caplog.text:
                assert time.monotonic() < deadline
        other.link_members(PAIR, RANKS, rank_table(2))
        assert peer.wait_for_status({"engine": engine}, 1)[0] is OK
        assert peer.wait_for_status({"engine": other}, 1)[0] is OK


# ---- over TCP


only_tcp = pytest.mark.parametrize("transport", ["tcp"], indirect=True)
UNKNOWN = b"u" * rendezvous.TOKEN_BYTES


@only_tcp
@pytest.mark.parametrize(
    "preamble",
    [
        b"",
        b"L",
        b"noise that is longer than a preamble",
        tcp.preamble(UNKNOWN, tcp.MEMBER),
        tcp.preamble(UNKNOWN, tcp.LINK),
        tcp.preamble(UNKNOWN, tcp.FORWARD),
        tcp.preamble(UNKNOWN, tcp.REVERSE),
        tcp.preamble(MEETING.digest(), tcp.FORWARD),
        tcp.preamble(MEETING.digest(), b"?"),
    ],
    ids=["nothing", "a byte", "noise", "other members", "link", "forward", "reverse", "no token", "no purpose"],
)
def test_strangers_at_the_port_of_a_member(preamble: bytes, listening: Engine, place: Place) -> None:
    with place.come(preamble) as stranger:
        assert_hangs_up(stranger)
    assert_still_joins(listening)


def come_with_data_connections(place: Place, member: socket.socket, purposes: bytes) -> list[socket.socket]:
    """Say hello and make data connections; the owner closes them."""
    token, streams = place.say_hello(member).token, []
    for purpose in purposes:
        streams.append(place.come(tcp.preamble(token, bytes([purpose]))))
        assert streams[-1].recv(1) == tcp.READY
    return streams


@only_tcp
@pytest.mark.parametrize("purposes", [b"", tcp.FORWARD, tcp.REVERSE, 2 * tcp.REVERSE])
def test_a_member_without_all_data_connections(purposes: bytes, listening: Engine, place: Place) -> None:
    with contextlib.ExitStack() as open_:
        member = open_.enter_context(place.come())
        for stream in come_with_data_connections(place, member, purposes):
            open_.enter_context(stream)
        member.sendall(rendezvous.MAPPED)
        assert peer.wait_for_status({"engine": listening}, 1, 1)[0] is FAILED
        assert member.recv(1) == b""


@only_tcp
def test_a_member_that_is_lost_between_its_data_connections(listening: Engine, place: Place) -> None:
    """What it has made is closed with it, and nothing is served to it any more."""
    with place.come() as member:
        (stream,) = come_with_data_connections(place, member, tcp.FORWARD)
    with stream:
        assert peer.wait_for_status({"engine": listening}, 1, 1)[0] is FAILED
        assert stream.recv(1) == b""


@only_tcp
def test_a_member_of_lower_rank_that_takes_no_data_connections(place: Place) -> None:
    token = b"t" * rendezvous.TOKEN_BYTES
    with place.take() as listener, contextlib.closing(make_engine(B)) as engine:
        engine.link_members(PAIR, RANKS, rank_table(2))
        with place.accept(listener) as connection:
            assert isinstance(receive(connection), MemberHello)
            send_message(connection, MemberAccept(A, 0, b"i" * 16, token, tcp.NAME, ""))
            stream, _ = listener.accept()
            stream.close()
            assert peer.wait_for_status({"engine": engine}, 1, 2)[0] is FAILED
            assert connection.recv(1) == b""
