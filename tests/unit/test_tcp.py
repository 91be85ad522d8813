"""Data connections without the rest of a link: a peer asks over a socket pair, a server answers from its memory."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist._directory import Claims, Directory
from llm_datadist._local import LocalCache, block_pairs
from llm_datadist._outcome import Outcome, TransferFault
from llm_datadist._segment import Segment
from llm_datadist._stream import checksum
from llm_datadist._tcp_end import TcpPeer
from llm_datadist._tcp_server import TcpServer

POOL = 1 << 22
STRIDE = 1 << 16  # more than one call moves
SLOTS = 8
TENSORS = 2
STEP = STRIDE * SLOTS
ORDINARY, PREFIX, BLOCKS, CACHE = 1, 2, 3, 4  # kinds of keys

# Layout of `_tcp.pxd`.
MAGIC = 0x4C4C4D4453545231
PULL_RANGE, PULL_BLOCKS, PUSH_TO_ADDRESSES, PUSH_TO_KEY = 1, 2, 3, 4
BY_BLOCKS = 8
REQUEST = struct.Struct("<20Q")
REPLY = struct.Struct("<6Q")
VERDICT = struct.Struct("<5Q")
FIELDS = ["magic", "operation", "flags", "timeout_ns", "kind", "key_id", "model_id", "slot", "first", "count"]
FIELDS += ["tensors", "block", "offset", "nbytes", "blocks"]


def request(*table: int, **fields: int) -> bytes:
    """Make a request; what is not given is 0, but for the magic number and a timeout of 5 s."""
    values = {"magic": MAGIC, "timeout_ns": 5 * 10**9, **fields}
    words = [values.get(field, 0) for field in FIELDS] + [0, 0, 0, 0]
    rest = struct.pack(f"<{len(table)}Q", *table)
    return REQUEST.pack(*words, checksum(REQUEST.pack(*words, 0) + rest)) + rest


class Owner:
    """Memory, a directory, and a server that a peer reaches over a socket pair."""

    def __init__(self, *, peer_writes: bool = True, summed: bool = False) -> None:
        self.pool = Segment.create("test:pool", POOL, peers_may_write=True)
        self.directory = Directory(POOL, self.pool.address, 64)
        self.claims = Claims(by_threads=True)
        self.directory.add_claims(self.claims)
        self.server = TcpServer(
            self.pool, self.directory.segment, self.directory.ledger, self.claims.segment, peer_writes
        )
        self.memory = Segment.create("test:local", POOL, peers_may_write=False)
        self.local = LocalCache(1, self.memory.address, STEP, STEP, STRIDE, TENSORS, SLOTS)
        self.peer = TcpPeer(summed)
        self.threads: list[threading.Thread] = []
        self.sockets: list[socket.socket] = []
        view = memoryview(self.pool)
        for tensor, slot in itertools.product(range(TENSORS), range(SLOTS)):
            at = tensor * STEP + slot * STRIDE
            view[at : at + STRIDE] = bytes([16 * tensor + slot + 1]) * STRIDE

    def publish(self, cache_id: int = 7, **flags: Any) -> int:
        return self.directory.publish_cache(cache_id, 0, STEP, STEP, STRIDE, TENSORS, SLOTS, **flags)

    def connect(self) -> socket.socket:
        """Open a connection whose other end is served; gives the asking end."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)

        def serve() -> None:
            with theirs:
                self.server.serve(theirs.fileno())

        thread = threading.Thread(target=serve)
        thread.start()
        self.threads.append(thread)
        self.sockets.append(ours)
        return ours

    def add_channel(self) -> socket.socket:
        ours = self.connect()
        ours.setblocking(False)
        self.peer.add_channel(ours.dup().detach())
        return ours

    def pull(self, kind: int = CACHE, key: int = 7, slot: int = 0, consume: bool = False, **changes: Any) -> None:
        values = {"nbytes": STRIDE, "count": -1, "tensors": TENSORS, "offset": 0, "timeout_s": 5.0, **changes}
        deadline = time.monotonic_ns() + int(values["timeout_s"] * 1e9)
        self.peer.pull_cache(
            self.local, kind, key, 0, slot, 0, values["nbytes"], 0, values["count"], 0, values["tensors"],
            values["offset"], 0, consume, deadline,
        )  # fmt: skip

    def local_byte(self, tensor: int, slot: int) -> set[int]:
        at = tensor * STEP + slot * STRIDE
        return set(memoryview(self.memory)[at : at + STRIDE])

    def pool_byte(self, tensor: int, slot: int) -> set[int]:
        at = tensor * STEP + slot * STRIDE
        return set(memoryview(self.pool)[at : at + STRIDE])

    def close(self) -> None:
        self.peer.close(time.monotonic_ns())
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()
        for one in self.sockets:
            one.close()
        assert not self.claims.busy
        for part in (self.claims, self.directory, self.pool, self.memory):
            part.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    one = Owner()
    one.publish()
    yield one
    one.close()


def fails(call: Any, *args: Any, **kwargs: Any) -> Outcome:
    with pytest.raises(TransferFault) as caught:
        call(*args, **kwargs)
    return caught.value.outcome


def test_the_checksum_is_crc32c() -> None:
    """Check value and vectors of RFC 3720, B.4; and pieces of any size sum to the whole."""
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(bytes(32)) == 0x8A9136AA
    assert checksum(b"\xff" * 32) == 0x62A8AB43
    data = bytes(range(256)) * 257
    for size in (1, 7, 8, 4096, 12288, 12289, 40000):
        crc = 0
        for at in range(0, len(data), size):
            crc = checksum(data[at : at + size], crc)
        assert crc == checksum(data)


@pytest.mark.parametrize("summed", [False, True])
def test_pulls_and_pushes(summed: bool) -> None:
    owner = Owner(summed=summed)
    try:
        owner.publish()
        owner.add_channel()
        owner.pull(slot=3)
        assert [owner.local_byte(tensor, 0) for tensor in range(TENSORS)] == [{4}, {20}]
        pairs = block_pairs([5, 1, 2], [2, 3, 6])
        cache = owner.directory.publish_key(0, BLOCKS, 0, 0, 0)
        assert cache
        deadline = time.monotonic_ns() + 5 * 10**9
        owner.peer.pull_blocks(owner.local, BLOCKS, 0, 0, 0, pairs, 0, -1, 0, TENSORS, None, deadline)
        assert [owner.local_byte(0, slot) for slot in (2, 3, 6)] == [{6}, {2}, {3}]
        owner.peer.push(owner.local, 0, [owner.pool.address, owner.pool.address + STEP], 0, None, 0, deadline)
        assert [owner.pool_byte(tensor, 0) for tensor in range(TENSORS)] == [{4}, {20}]
        owner.peer.push_to_key(owner.local, 0, TENSORS, 0, BLOCKS, 0, 0, 0, 0, block_pairs([2], [7]), 0, deadline)
        assert [owner.pool_byte(tensor, 7) for tensor in range(TENSORS)] == [{6}, {22}]
    finally:
        owner.close()


def test_outcomes_tell_what_the_owner_has(owner: Owner) -> None:
    owner.add_channel()
    assert fails(owner.pull, key=8) is Outcome.KEY_UNKNOWN
    assert fails(owner.pull, slot=SLOTS) is Outcome.SLOT_UNKNOWN
    assert fails(owner.pull, tensors=1) is Outcome.TENSOR_COUNT
    assert fails(owner.pull, offset=1) is Outcome.SOURCE_RANGE
    with pytest.raises(TransferFault) as caught:
        owner.pull(count=3, tensors=3)
    assert (caught.value.remote_tensors, caught.value.remote_slots) == (TENSORS, SLOTS)
    owner.pull()  # the connection is as good as before
    assert owner.peer.channels == 1


def test_a_key_goes_when_the_puller_has_every_byte(owner: Owner) -> None:
    key = owner.directory.publish_key(0, ORDINARY, 5, 0, 2)
    asking = owner.connect()
    asking.settimeout(5)
    wanted = request(
        operation=PULL_RANGE, flags=1, kind=ORDINARY, key_id=5, count=2**64 - 1, tensors=TENSORS, nbytes=STRIDE
    )
    asking.sendall(wanted)
    assert len(receive(asking, REPLY.size + TENSORS * STRIDE)) == REPLY.size + TENSORS * STRIDE
    _, outcome, _, confirm, _ = VERDICT.unpack(receive(asking, VERDICT.size))
    assert (outcome, confirm) == (Outcome.DONE, 1)
    assert not owner.directory.is_consumed(key)  # nobody has said that the bytes have come
    asking.shutdown(socket.SHUT_RDWR)
    owner.threads[0].join(5)
    assert not owner.directory.is_consumed(key)
    owner.add_channel()
    owner.pull(ORDINARY, 5, consume=True)
    assert owner.directory.is_consumed(key)
    assert owner.directory.take_consumed() == [key]
    assert owner.local_byte(0, 0) == {3}


def test_a_push_that_may_not_be(owner: Owner) -> None:
    deadline = time.monotonic_ns() + 5 * 10**9
    owner.add_channel()
    push = owner.peer.push
    assert fails(push, owner.local, 0, [owner.pool.address - 1], 0, None, 0, deadline) is Outcome.TARGET_ADDRESS
    assert fails(push, owner.local, 0, [owner.pool.address + 2 * STEP], 0, None, 0, deadline) is Outcome.TARGET_ADDRESS
    push(owner.local, 0, [owner.pool.address], 0, None, 0, deadline)


def test_a_peer_that_may_only_pull() -> None:
    owner = Owner(peer_writes=False)
    try:
        owner.publish()
        owner.add_channel()
        deadline = time.monotonic_ns() + 5 * 10**9
        outcome = fails(owner.peer.push, owner.local, 0, [owner.pool.address], 0, None, 0, deadline)
        assert outcome is Outcome.TARGET_READ_ONLY
        assert owner.pool_byte(0, 0) == {1}
        owner.pull()
    finally:
        owner.close()


def test_hidden_caches() -> None:
    owner = Owner()
    try:
        owner.publish(hidden=True)
        owner.add_channel()
        assert fails(owner.pull) is Outcome.KEY_UNKNOWN
        deadline = time.monotonic_ns() + 5 * 10**9
        outcome = fails(owner.peer.push, owner.local, 0, [owner.pool.address], 0, None, 0, deadline)
        assert outcome is Outcome.TARGET_ADDRESS
    finally:
        owner.close()


def test_memory_that_is_not_mapped_is_an_error_and_no_crash() -> None:
    owner = Owner()
    try:
        addresses = [owner.pool.address, 4096]
        owner.directory.publish_cache(7, 0, 0, STEP, STRIDE, TENSORS, SLOTS, addresses, private=True)
        owner.add_channel()
        assert fails(owner.pull) is Outcome.MEMORY_FAULT
        deadline = time.monotonic_ns() + 5 * 10**9
        assert fails(owner.peer.push, owner.local, 0, [4096], 0, None, 0, deadline) is Outcome.MEMORY_FAULT
        owner.pull(count=1, tensors=1)  # on the same connection
        assert owner.local_byte(0, 0) == {1}
        nowhere = LocalCache(2, 0, 0, STEP, STRIDE, 1, SLOTS, [4096])
        outcome = fails(owner.peer.push, nowhere, 0, [owner.pool.address], 0, None, 0, deadline)
        assert outcome is Outcome.MEMORY_FAULT
    finally:
        owner.close()


def test_a_connection_that_broke_while_nobody_used_it(owner: Owner) -> None:
    broken = owner.add_channel()
    owner.add_channel()
    broken.shutdown(socket.SHUT_RDWR)
    owner.threads[0].join(5)
    owner.pull(slot=1)
    assert owner.local_byte(0, 0) == {2}
    assert owner.peer.channels == 1


def test_without_a_connection_a_transfer_asks_for_one() -> None:
    owner = Owner()

    class Asking(TcpPeer):
        asked = 0

        def _want_channel(self) -> None:
            self.asked += 1
            threading.Thread(target=owner.add_channel).start()

    owner.peer = Asking(False)
    try:
        owner.publish()
        owner.pull(slot=1)
        owner.pull(slot=2)
        assert owner.peer.asked == 1
    finally:
        owner.close()


def test_without_a_connection_a_transfer_ends_in_time(owner: Owner) -> None:
    start = time.monotonic()
    assert fails(owner.pull, timeout_s=0.2) is Outcome.TIMED_OUT
    assert 0.15 < time.monotonic() - start < 2


def test_an_owner_that_does_not_answer(owner: Owner) -> None:
    ours, theirs = socket.socketpair()
    owner.sockets += [ours, theirs]
    ours.setblocking(False)
    owner.peer.add_channel(ours.dup().detach())
    start = time.monotonic()
    assert fails(owner.pull, timeout_s=0.2) is Outcome.TIMED_OUT
    assert 0.15 < time.monotonic() - start < 2
    assert owner.peer.channels == 0  # it stands in the middle of an answer
    owner.add_channel()
    owner.pull()


@pytest.mark.parametrize("at", [8, 24, REPLY.size + STRIDE + 5, REPLY.size + TENSORS * STRIDE + 8])
def test_bytes_that_changed_on_the_way(at: int) -> None:
    """Between the two ends somebody turns one bit of the reply, the payload, or the verdict."""
    owner = Owner(summed=True)
    try:
        owner.publish()
        asking = owner.connect()
        ours, theirs = socket.socketpair()
        owner.sockets.append(theirs)
        ours.setblocking(False)
        owner.peer.add_channel(ours.detach())

        def relay() -> None:
            asking.sendall(receive(theirs, REQUEST.size))
            answer = bytearray(receive(asking, REPLY.size + TENSORS * STRIDE + VERDICT.size))
            answer[at] ^= 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # given up at the first wrong bit
                theirs.sendall(answer)

        thread = threading.Thread(target=relay)
        thread.start()
        assert fails(owner.pull) is Outcome.CORRUPTED
        thread.join(5)
    finally:
        owner.close()


def receive(connection: socket.socket, nbytes: int) -> bytes:
    connection.settimeout(5)
    data = b""
    while len(data) < nbytes:
        try:
            more = connection.recv(nbytes - len(data))
        except ConnectionResetError:  # closed with words of ours unread
            more = b""
        if not more:
            break
        data += more
    return data


def flipped(data: bytes, at: int) -> bytes:
    """Turn one bit."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


HUGE = 2**64 - 1
STRANGE = {
    "nothing": b"",
    "half a request": request(operation=PULL_RANGE)[:40],
    "noise": bytes(range(256)) * 4,
    "another magic": request(magic=1, operation=PULL_RANGE),
    "unknown operation": request(operation=9, tensors=1),
    "too many tensors": request(operation=PULL_RANGE, tensors=2**40),
    "too many blocks": request(operation=PULL_BLOCKS, tensors=1, blocks=2**40, block=STRIDE),
    "a table that does not come": request(operation=PULL_BLOCKS, tensors=1, blocks=1000, block=STRIDE),
    "blocks without end": request(HUGE, operation=PULL_BLOCKS, tensors=1, blocks=1, block=HUGE),
    "one bit": flipped(request(3, operation=PULL_BLOCKS, kind=BLOCKS, count=1, tensors=1, blocks=1, block=STRIDE), -1),
    "one bit of the table": flipped(
        request(3, operation=PULL_BLOCKS, kind=BLOCKS, count=1, tensors=1, blocks=1, block=STRIDE), 40
    ),
    "a push of less than it says": request(
        operation=PUSH_TO_KEY, kind=CACHE, key_id=7, count=1, tensors=1, block=STRIDE, nbytes=1
    ),
    "a push whose size overflows": request(
        operation=PUSH_TO_KEY, flags=BY_BLOCKS, kind=CACHE, key_id=7, tensors=2**20, blocks=2**20, block=2**40, nbytes=0
    ),
    "a push that stops": request(
        operation=PUSH_TO_KEY, kind=CACHE, key_id=7, count=1, tensors=1, block=STRIDE, nbytes=STRIDE
    ),
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE.keys())
def test_strange_requests_end_their_connection_alone(owner: Owner, data: bytes) -> None:
    before = bytes(memoryview(owner.pool))
    asking = owner.connect()
    asking.sendall(data)
    asking.shutdown(socket.SHUT_WR)
    assert receive(asking, 1) == b""
    assert bytes(memoryview(owner.pool)) == before
    assert not owner.claims.busy
    owner.add_channel()
    owner.pull()


@pytest.mark.parametrize(
    ("fields", "table", "outcome"),
    [
        ({"operation": PULL_RANGE, "kind": CACHE, "key_id": 7, "first": HUGE, "count": 1}, [], Outcome.SOURCE_TENSORS),
        ({"operation": PULL_RANGE, "kind": CACHE, "key_id": 7, "count": 1, "slot": HUGE}, [], Outcome.SLOT_UNKNOWN),
        (
            {"operation": PULL_RANGE, "kind": CACHE, "key_id": 7, "count": 1, "offset": HUGE, "nbytes": 2},
            [],
            Outcome.SOURCE_RANGE,
        ),
        (
            {"operation": PULL_RANGE, "kind": CACHE, "key_id": 7, "count": 1, "offset": 2, "nbytes": HUGE},
            [],
            Outcome.SOURCE_RANGE,
        ),
        ({"operation": PULL_BLOCKS, "kind": BLOCKS, "count": 1, "block": STRIDE}, [HUGE], Outcome.SOURCE_BLOCK),
        ({"operation": PULL_BLOCKS, "kind": BLOCKS, "count": 1, "block": 1}, [0], Outcome.BLOCK_SIZE),
        ({"operation": PULL_BLOCKS, "kind": CACHE, "key_id": 7, "count": 1, "block": 0}, [0], Outcome.SOURCE_RANGE),
        ({"operation": PULL_RANGE, "kind": 99, "key_id": 7, "count": 1}, [], Outcome.KEY_UNKNOWN),
    ],
)
def test_numbers_that_cannot_be(owner: Owner, fields: dict[str, int], table: list[int], outcome: Outcome) -> None:
    owner.directory.publish_key(0, BLOCKS, 0, 0, 0)
    asking = owner.connect()
    asking.sendall(request(*table, tensors=1, blocks=len(table), **fields))
    assert REPLY.unpack(receive(asking, REPLY.size))[1] == outcome


def test_a_link_that_is_revoked_gives_nothing_any_more(owner: Owner) -> None:
    owner.add_channel()
    owner.pull()
    owner.claims.revoke()
    assert fails(owner.pull) in (Outcome.PEER_DEAD, Outcome.REVOKED)


def test_a_puller_that_goes_away_does_not_end_the_owner(owner: Owner) -> None:
    """Writing to a closed stream raises SIGPIPE; programs may have put its default back, which ends them."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        asking = owner.connect()
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wanted = request(operation=PULL_RANGE, kind=CACHE, key_id=7, count=2**64 - 1, tensors=TENSORS, nbytes=STRIDE)
        asking.sendall(wanted)
        receive(asking, REPLY.size)
        asking.close()
        owner.threads[0].join(5)
        assert not owner.threads[0].is_alive()
        owner.add_channel()
        owner.pull()
    finally:
        signal.signal(signal.SIGPIPE, before)
