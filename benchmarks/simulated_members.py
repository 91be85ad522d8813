"""Many simulated members of a cluster in one process: a socket and a place in the registry each, and nothing else.

They speak the protocol of the registry, but have no instance, no thread and no links of their own, so that thousands of
them fit on a small machine beside the registry that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

import zmq

from llm_datadist.cluster.registry_messages import (
    INSTANCE_BYTES,
    MAX_REPLY_BYTES,
    Announce,
    Changes,
    Granted,
    Look,
    Message,
    Renew,
    Withdraw,
    decode,
    encode,
)

from .many_instances import allow_many_descriptors

ANNOUNCE, ANNOUNCE_ON_AND_ON, RENEW, DISCOVER, HEAR, WITHDRAW = range(6)

_LEASE_MS = 300_000  # none ends while something is measured
_HOLD_MS = 30_000
_WAIT_MS = 60_000
_RENEWAL_S = 10.0 / 3  # of the default lease
_REQUEST = b"simulate"


class _Simulated:
    """One member: its socket, and what it says."""

    def __init__(self, socket: zmq.Socket[bytes], cluster_id: int) -> None:
        self.socket = socket
        self.cluster_id = cluster_id
        self.instance = cluster_id.to_bytes(INSTANCE_BYTES, "big")
        self.version = 0
        self.epoch, self.since, self.known = b"", 0, 0

    def send(self, message: Message) -> None:
        self.socket.send_multipart([_REQUEST, encode(message)])

    def receive(self) -> Message:
        return decode(self.socket.recv_multipart()[1], MAX_REPLY_BYTES)

    def announce(self) -> None:
        self.version += 1
        port = 20_000 + self.cluster_id % 40_000
        self.send(
            Announce(
                cluster_id=self.cluster_id,
                instance=self.instance,
                version=self.version,
                role=1 + self.cluster_id % 2,
                listen_ip_info=f"10.0.{self.cluster_id // 250 % 250}.{self.cluster_id % 250}:{port}",
                devices=[0],
                state=f"ready {self.version}",
                labels={"name": f"member-{self.cluster_id}", "model": "simulated"},
                host=f"host-{self.cluster_id // 8}",
                pid=1000 + self.cluster_id,
                lease_ms=_LEASE_MS,
                follows=True,
                switch_token=0,
                seen_token=0,
            )
        )

    def look(self, hold_ms: int) -> None:
        self.send(Look(self.epoch, self.since, hold_ms, 0, {}))

    def take(self, changes: Changes) -> None:
        self.known = len(changes.members) if changes.reset else self.known + len(changes.members)
        self.epoch, self.since = changes.epoch, changes.revision


class _Crowd:
    """The members of this process."""

    def __init__(self, sockets: Sequence[zmq.Socket[bytes]], cluster_ids: Sequence[int]) -> None:
        self._members = [_Simulated(socket, cluster_id) for socket, cluster_id in zip(sockets, cluster_ids)]
        self._by_socket = {member.socket: member for member in self._members}
        self._poller = zmq.Poller()
        for member in self._members:
            self._poller.register(member.socket, zmq.POLLIN)

    def announce(self) -> float:
        """Let all announce at the same time; gives the seconds until all are known."""
        started = time.perf_counter()
        for member in self._members:
            member.announce()
        self._answers(len(self._members), Granted)
        return time.perf_counter() - started

    def announce_on_and_on(self, seconds: float) -> float:
        """Let each announce again as soon as it has its answer; gives announcements a second."""
        started = time.perf_counter()
        for member in self._members:
            member.announce()
        count, left = 0, len(self._members)
        while left:
            for member in self._ready():
                _expect(member.receive(), Granted)
                count += 1
                if time.perf_counter() - started < seconds:
                    member.announce()
                else:
                    left -= 1
        return count / (time.perf_counter() - started)

    def renew(self, seconds: float) -> float:
        """Renew all leases as members do, spread evenly over the time; gives renewals a second."""
        started = time.perf_counter()
        step, count = _RENEWAL_S / len(self._members), 0
        while (now := time.perf_counter() - started) < seconds:
            if count * step > now:
                time.sleep(min(count * step - now, seconds))
            member = self._members[count % len(self._members)]
            member.send(Renew(member.cluster_id, member.instance))
            _expect(member.receive(), Granted)
            count += 1
        return count / seconds

    def discover(self, everyone: int) -> float:
        """Let all announce and look until each has seen as many members; gives the seconds."""
        started = time.perf_counter()
        for member in self._members:
            member.epoch, member.since, member.known = b"", 0, 0
            member.announce()
        unaware = set(self._members)
        while unaware:
            for member in self._ready():
                reply = member.receive()
                if isinstance(reply, Changes):
                    member.take(reply)
                if member.known >= everyone:
                    unaware.discard(member)
                else:
                    member.look(_HOLD_MS)
        return time.perf_counter() - started

    def hear(self, connection: Connection) -> float:
        """Let all wait for a change, say so, and give the moment in which the last one has heard of it."""
        for member in self._members:
            member.look(0)
            self._catch_up(member)
            member.look(_HOLD_MS)
        connection.send(0.0)
        self._answers(len(self._members), Changes)
        return time.monotonic()

    def withdraw(self) -> float:
        """Let all leave."""
        for member in self._members:
            member.send(Withdraw(member.cluster_id, member.instance))
        for member in self._members:
            member.receive()
        return 0.0

    @staticmethod
    def _catch_up(member: _Simulated) -> None:
        while True:
            reply = member.receive()
            assert isinstance(reply, Changes)
            member.take(reply)
            if not reply.more:
                return
            member.look(0)

    def _answers(self, count: int, kind: type[Message]) -> None:
        while count:
            for member in self._ready():
                reply = member.receive()
                _expect(reply, kind)
                if isinstance(reply, Changes):
                    member.take(reply)
                count -= 1

    def _ready(self) -> Iterator[_Simulated]:
        found = self._poller.poll(_WAIT_MS)
        if not found:
            raise TimeoutError(f"no answer of the registry in {_WAIT_MS} ms")
        for socket, _ in found:
            yield self._by_socket[socket]


def simulate(connection: Connection, address: str, cluster_ids: Sequence[int]) -> None:
    """Body of a process: one member an id. Sends 0.0 when all are connected, then the answer to each order."""
    allow_many_descriptors()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        context.set(zmq.MAX_SOCKETS, len(cluster_ids) + 16)
        sockets = [context.socket(zmq.DEALER) for _ in cluster_ids]
        for socket in sockets:
            socket.connect(address)
        crowd = _Crowd(sockets, cluster_ids)
        orders: dict[int, Callable[..., float]] = {
            ANNOUNCE: crowd.announce,
            ANNOUNCE_ON_AND_ON: crowd.announce_on_and_on,
            RENEW: crowd.renew,
            DISCOVER: crowd.discover,
            HEAR: lambda: crowd.hear(connection),
            WITHDRAW: crowd.withdraw,
        }
        connection.send(0.0)
        while (order := connection.recv()) is not None:
            number, *arguments = order
            connection.send(orders[number](*arguments))
    finally:
        context.destroy(linger=0)


def _expect(reply: Message, kind: type[Message]) -> None:
    if not isinstance(reply, kind):
        raise RuntimeError(f"the registry answered {reply!r:.200}")
