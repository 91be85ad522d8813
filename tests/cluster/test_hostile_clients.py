"""Whatever arrives at the port of a registry, it goes on, and what it keeps stays bounded."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember, RegistryClient
from llm_datadist.cluster.registry_messages import (
    MAX_REQUEST_BYTES,
    Announce,
    Changes,
    Lock,
    Look,
    Message,
    Refused,
    RegistryMessageError,
    Status,
    StatusReply,
    decode,
    encode,
)
from tests.cluster.conftest import Announce as AnnounceHere
from tests.cluster.registry_process import RegistryProcess, wait_until

WAIT_MS = 5000
REQUEST = b"request1"


def announcement(**changes: object) -> Announce:
    fields = {
        "cluster_id": 5,
        "instance": b"i" * 16,
        "version": 1,
        "role": 1,
        "listen_ip_info": "",
        "devices": [0],
        "state": "ready",
        "labels": {},
        "host": "h",
        "pid": 1,
        "lease_ms": 10_000,
        "follows": False,
        "switch_token": 0,
        "seen_token": 0,
        **changes,
    }
    return Announce(**fields)  # type: ignore[arg-type]


class RawClient:
    """A DEALER that sends what it is given."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.dealer = self._context.socket(zmq.DEALER)
        self.dealer.linger = 0
        self.dealer.connect(address)

    def ask(self, data: bytes, request: bytes = REQUEST) -> Message:
        self.dealer.send_multipart([request, data])
        assert self.dealer.poll(WAIT_MS), "no answer"
        name, reply = self.dealer.recv_multipart()
        assert name == request
        return decode(reply, 1 << 20)

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def raw(registry: RegistryProcess) -> Iterator[RawClient]:
    client = RawClient(registry.address)
    yield client
    client.close()


def packed(**fields: object) -> bytes:
    data: bytes = msgpack.packb(fields)
    return data


HOSTILE = {
    "nothing": b"",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(60_000),
    "a number": msgpack.packb(7),
    "another version": packed(v=2, t="status"),
    "no version": packed(t="status"),
    "an unknown message": packed(v=1, t="format_disk"),
    "a name that is no text": packed(v=1, t=["status"]),
    "a message of the registry": packed(v=1, t="done"),
    "half an announcement": packed(v=1, t="announce", cluster_id=1),
    "a deep list": b"\x91" * 60_000,
    "a list that is not there": b"\xdd\xff\xff\xff\xff",
    "a map that is not there": b"\xdf\xff\xff\xff\xff",
    "a text that is not there": b"\xdb\xff\xff\xff\xff",
    "keys that are no text": msgpack.packb({1: 2}),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"x" * 100)),
    "a negative id": packed(v=1, t="renew", cluster_id=-1, instance=b""),
    "an id that is true": packed(v=1, t="renew", cluster_id=True, instance=b""),
    "a long instance": packed(v=1, t="renew", cluster_id=1, instance=b"x" * 17),
    "a short instance": encode(announcement(instance=b"x")),
    "an unknown role": encode(announcement(role=9)),
    "a long state": encode(announcement(state="x" * 65)),
    "no state": encode(announcement(state="")),
    "many devices": encode(announcement(devices=[0] * 65)),
    "a long label": encode(announcement(labels={"a": "x" * 257})),
    "labels that are no text": packed(v=1, t="look", epoch=b"", since=0, hold_ms=0, role=0, labels={"a": 1}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_cannot_be_read_is_refused(raw: RawClient, client: RegistryClient, data: bytes) -> None:
    reply = raw.ask(data)
    assert isinstance(reply, Refused)
    assert reply.code == "malformed"
    assert client.members() == []
    assert client.status().unreadable == 1


def test_fields_that_are_not_known_are_ignored(raw: RawClient) -> None:
    fields = msgpack.unpackb(encode(Status()))
    assert isinstance(raw.ask(packed(**fields, tomorrow={"x": [1, 2]})), StatusReply)


def test_what_is_too_long_is_not_even_read(registry: RegistryProcess, raw: RawClient, client: RegistryClient) -> None:
    raw.dealer.send_multipart([REQUEST, bytes(MAX_REQUEST_BYTES + 1)])
    assert not raw.dealer.poll(300)
    assert client.members() == []
    before = registry.resident_kib()
    for _ in range(50):
        raw.dealer.send_multipart([REQUEST, bytes(10 << 20)])
    assert client.members() == []
    assert registry.resident_kib() - before < 64 << 10


@pytest.mark.parametrize("frames", [[b""], [b"", b""], [b"x"], [REQUEST] * 3, [b"short", b"x"], [b"x" * 9, b""]])
def test_wrong_frames_are_dropped(raw: RawClient, client: RegistryClient, frames: list[bytes]) -> None:
    raw.dealer.send_multipart(frames)
    wait_until(lambda: client.status().unreadable == 1)
    assert isinstance(raw.ask(encode(Status())), StatusReply)


def test_bytes_that_are_no_zeromq(registry: RegistryProcess, client: RegistryClient) -> None:
    choose = random.Random(7)
    for size in (0, 1, 9, 10, 64, 1000, 100_000):
        with socket.create_connection(("127.0.0.1", registry.port), timeout=5) as stream:
            stream.sendall(choose.randbytes(size))
    with socket.create_connection(("127.0.0.1", registry.port), timeout=5) as stream:
        stream.sendall(b"\xff" + struct.pack("!Q", 2**63) + b"\x7f\x03\x00NULL")
    with socket.create_connection(("127.0.0.1", registry.port), timeout=5):  # says nothing
        assert client.members() == []


NAMES = ["announce", "renew", "look", "lock", "unlock", "drained", "order", "order_done", "withdraw"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(
            st.sampled_from(
                ["announce", "renew", "look", "lock", "unlock", "drained", "order", "order_done", "withdraw"]
            ),
            st.dictionaries(st.text(max_size=12), st.one_of(st.integers(-2, 2**64 - 1), st.binary(), st.text())),
        ).map(lambda pair: packed(**{**pair[1], "v": 1, "t": pair[0]})),
    )
)
def test_noise(raw: RawClient, data: bytes) -> None:
    assert isinstance(raw.ask(data), Refused)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_message_that_was_changed_is_read_or_refused(data: st.DataObject) -> None:
    good = bytearray(encode(announcement(labels={"a": "b"})))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(good[: data.draw(st.integers(0, len(good)))]))
    except RegistryMessageError:
        return


def test_a_stranger_cannot_renew_or_withdraw_for_a_member(
    announce: AnnounceHere, raw: RawClient, client: RegistryClient
) -> None:
    announce(5)
    for name in ("renew", "withdraw"):
        reply = raw.ask(packed(v=1, t=name, cluster_id=5, instance=b"x" * 16))
        assert isinstance(reply, Refused)
        assert reply.code == "unknown"
    assert [one.cluster_id for one in client.members()] == [5]


def test_the_number_of_members_is_bounded(free_port: object) -> None:
    process = RegistryProcess("--max-members", "2")
    process.start()
    raw = RawClient(process.address)
    try:
        for cluster_id in (1, 2):
            assert not isinstance(raw.ask(encode(announcement(cluster_id=cluster_id))), Refused)
        reply = raw.ask(encode(announcement(cluster_id=3)))
        assert isinstance(reply, Refused)
        assert reply.code == "full"
        assert not isinstance(raw.ask(encode(announcement(cluster_id=2, version=2, state="busy"))), Refused)
    finally:
        raw.close()
        process.close()


def test_the_number_of_locks_is_bounded(raw: RawClient) -> None:
    """Each is held by somebody; the grace after the start is over when the first one is granted."""
    codes = []
    for number in range(70):
        reply = raw.ask(encode(Lock(f"lock {number}", 5, b"i" * 16, 0, 60_000, WAIT_MS)))
        codes.append(reply.code if isinstance(reply, Refused) else "granted")
    assert codes.count("granted") == 64
    assert set(codes[64:]) == {"full"}


def test_a_client_that_does_not_read_is_no_burden(
    registry: RegistryProcess, announce: AnnounceHere, raw: RawClient, client: RegistryClient
) -> None:
    for cluster_id in range(20):
        announce(cluster_id, labels={str(number): "x" * 250 for number in range(30)})
    before = registry.resident_kib()
    question = encode(Look(b"", 0, 0, 0, {}))
    for number in range(5000):  # 150 KiB each, if all were answered: 750 MiB
        raw.dealer.send_multipart([number.to_bytes(8, "big"), question], zmq.NOBLOCK if number > 900 else 0)
        if number > 900 and not raw.dealer.poll(0, zmq.POLLOUT):
            break
    assert len(client.members()) == 20
    assert registry.resident_kib() - before < 128 << 10
    answers = 0
    while raw.dealer.poll(500):
        _, data = raw.dealer.recv_multipart()
        assert isinstance(decode(data, 1 << 20), Changes)
        answers += 1
    assert answers > 0


def test_labels_cannot_hide_in_the_listing(announce: AnnounceHere, driver: ClusterMember) -> None:
    announce(5, LLMRole.PROMPT, labels={"[red]": "\x1b[2J"})
    (found,) = driver.wait_for(count=1, timeout_s=5)
    assert found.labels == {"[red]": "\x1b[2J"}
