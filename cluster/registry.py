"""The registry: one place where the processes of a cluster find each other.

It keeps nothing on disk. When it is started again, its clients notice and announce themselves again.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from types import TracebackType
from typing import NamedTuple

import zmq

from llm_datadist.cluster.registry_address import bracketed
from llm_datadist.cluster.registry_locks import ROLE_SWITCH, RegistryLocks, Waiter
from llm_datadist.cluster.registry_messages import (
    INSTANCE_BYTES,
    MAX_REQUEST_BYTES,
    REFUSED_FENCED,
    REFUSED_FULL,
    REFUSED_HELD,
    REFUSED_MALFORMED,
    REFUSED_TAKEN,
    REFUSED_UNKNOWN,
    REFUSED_UNREACHABLE,
    REQUEST_ID_BYTES,
    UNASKED,
    Announce,
    Done,
    Drained,
    Granted,
    Lock,
    Locked,
    Look,
    Message,
    Order,
    OrderDone,
    Probe,
    Refused,
    RegistryMessageError,
    Renew,
    Status,
    StatusReply,
    Switch,
    Unlock,
    Withdraw,
    check_announce,
    decode,
    encode,
)
from llm_datadist.cluster.registry_orders import RegistryOrders
from llm_datadist.cluster.registry_table import RegistryTable, TableFull
from llm_datadist.cluster.registry_watches import RegistryWatches
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.cluster.registry")

_MESSAGES_A_ROUND = 512  # between two looks at the clock
_HEARTBEAT_MS = 5_000  # of ZeroMQ, by which connections to hosts that vanished are closed
_HANDSHAKE_MS = 10_000  # for who connects and says nothing
_LEAST_WAIT_MS = 50  # for a lock: it is granted in the round that follows
_RETURN_S = 5.0  # after a start, in which members of a former life announce themselves again
_MOST_WAIT_MS = 60_000
_QUEUED_REPLIES = 64  # to a client that does not read; further ones are dropped, and it asks again


class Limits(NamedTuple):
    """What clients may ask for.

    Attributes
    ----------
    least_lease_ms, most_lease_ms : int
        Milliseconds of a member's lease; what is asked for is moved into this range.
    most_lock_ms : int
        Milliseconds of the lease of a lock, and after the start the time in which no lock is granted.
    max_members : int
        Members at a time.
    """

    least_lease_ms: int = 500
    most_lease_ms: int = 300_000
    most_lock_ms: int = 5_000
    max_members: int = 20_000


DEFAULT_LIMITS = Limits()


class Registry:
    """A registry that listens from now on and answers while `serve` runs; a context manager.

    Parameters
    ----------
    bind : str
        Address of this host to listen at: IPv4, IPv6, a host name, or ``"*"`` for all IPv4 addresses.
    port : int
        TCP port; 0 takes a free one.
    limits : Limits
        What clients may ask for.

    Attributes
    ----------
    host : str
        Address that it listens at, as a number.
    port : int
        Port that it listens at.

    Raises
    ------
    ValueError
        `port` is out of range, or a limit cannot be.
    LLMException
        LLM_FAILED: the address cannot be listened at.
    """

    def __init__(self, bind: str = "127.0.0.1", port: int = 0, limits: Limits = DEFAULT_LIMITS) -> None:
        _check(port, limits)
        self._limits = limits
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._stopping = False
        try:
            self._router = self._context.socket(zmq.ROUTER)
            self.host, self.port = _listen(self._router, bind, port)
        except BaseException:
            self.close()
            raise
        self._started = time.monotonic()
        self._table = RegistryTable(secrets.token_bytes(INSTANCE_BYTES), limits.max_members)
        self._locks = RegistryLocks(self._started, limits.most_lock_ms / 1000)
        self._watches = RegistryWatches(self._table, self._send_bytes)
        self._orders = RegistryOrders()
        self._requests = self._unreadable = 0

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Where it listens, as clients write it."""
        return f"tcp://{bracketed(self.host)}:{self.port}"

    def serve(self) -> None:
        """Answer until `stop`; in the thread that calls."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_out.fileno(), zmq.POLLIN)
        while not self._stopping:
            poller.poll(self._wait_ms())
            self._receive()
            self._look_at_the_clock(time.monotonic())

    def stop(self) -> None:
        """Let `serve` return; from any thread or a signal handler."""
        self._stopping = True
        try:
            self._wake_in.send(b"\0")
        except OSError:
            pass  # a wake-up is under way already, or it is closed

    def close(self) -> None:
        """Stop listening; not while `serve` runs. May be called twice."""
        self._context.destroy(linger=0)
        self._wake_in.close()
        self._wake_out.close()

    # ---- the loop

    def _wait_ms(self) -> int | None:
        times = (self._table.next_expiry(), self._locks.next_due(), self._watches.next_due(), self._orders.next_due())
        due = [moment for moment in times if moment is not None]
        if not due:
            return None
        return max(0, min(int((min(due) - time.monotonic()) * 1000) + 1, _MOST_WAIT_MS))

    def _receive(self) -> None:
        for _ in range(_MESSAGES_A_ROUND):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._requests += 1
            if len(frames) != 3 or len(frames[1]) != REQUEST_ID_BYTES:
                self._unreadable += 1
                _log.warning("a client sent %d frames, dropped", len(frames))
                continue
            peer, request, data = frames
            try:
                reply = self._answer(peer, request, data)
            except Exception:  # whatever one client does, the others go on
                _log.exception("a request failed")
                reply = Refused(REFUSED_MALFORMED, "the registry failed on this request, its log says why")
            if reply is not None:
                self._send(peer, request, reply)

    def _look_at_the_clock(self, now: float) -> None:
        for cluster_id, instance in self._table.expire(now):
            _log.info("the lease of cluster %d has ended", cluster_id)
            self._forget(cluster_id, instance)
        granted, late = self._locks.serve(now)
        for waiter, holder in granted:
            lease_ms = waiter.lease_ms
            if not self._send(waiter.peer, waiter.request, Locked(holder.token, lease_ms, sorted(holder.drained))):
                self._locks.forget(waiter.instance)  # it is gone: the next one's turn comes at once
        for waiter in late:
            self._send(waiter.peer, waiter.request, Refused(REFUSED_HELD, "the lock is held by another member"))
        self._orders.expire(now)
        self._watches.flush(now)

    def _send(self, peer: bytes, request: bytes, message: Message) -> bool:
        return self._send_bytes(peer, request, encode(message))

    def _send_bytes(self, peer: bytes, request: bytes, data: bytes) -> bool:
        """Send a message; False if the client is gone or does not read."""
        try:
            self._router.send_multipart([peer, request, data], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            _log.debug("cannot answer a client: %s", error)
            return False
        return True

    # ---- requests; each gives the reply, or None if it comes later

    def _answer(self, peer: bytes, request: bytes, data: bytes) -> Message | None:
        try:
            message = decode(data)
            return self._dispatch(peer, request, message)
        except RegistryMessageError as error:
            self._unreadable += 1
            return Refused(REFUSED_MALFORMED, str(error)[:1000])

    def _dispatch(self, peer: bytes, request: bytes, message: Message) -> Message | None:
        now = time.monotonic()
        if isinstance(message, Renew):
            return self._renew(peer, message, now)
        if isinstance(message, Look):
            return self._watches.look(peer, request, message, now)
        if isinstance(message, Announce):
            return self._announce(peer, message, now)
        if isinstance(message, Withdraw):
            return self._withdraw(message)
        if isinstance(message, Lock):
            return self._lock(peer, request, message, now)
        if isinstance(message, Unlock):
            released = self._locks.release(message.name, message.instance, message.token, now)
            return Done() if released else Refused(REFUSED_FENCED, f"the lock is not held with token {message.token}")
        if isinstance(message, Drained):
            known = self._locks.acknowledge(message.name, message.token, message.cluster_id, now)
            return Done() if known else Refused(REFUSED_FENCED, f"the lock is not held with token {message.token}")
        if isinstance(message, Order):
            return self._order(peer, request, message, now)
        if isinstance(message, OrderDone):
            return self._order_done(message)
        if isinstance(message, Status):
            return self._status(now)
        raise RegistryMessageError(f"{type(message).__name__} is no request")

    def _announce(self, peer: bytes, message: Announce, now: float) -> Message:
        check_announce(message)
        self._locks.see(message.seen_token)
        known = self._table.instance_of(message.cluster_id)
        if known is not None and known != message.instance and not self._gives_way(message.cluster_id, known):
            reason = f"cluster id {message.cluster_id} belongs to another process, until it ends"
            return Refused(REFUSED_TAKEN, reason)
        if message.switch_token and not self._may_drain(message, now):
            return Refused(REFUSED_FENCED, f"the lock is not held with token {message.switch_token}")
        lease_ms = min(max(message.lease_ms, self._limits.least_lease_ms), self._limits.most_lease_ms)
        try:
            what = self._table.announce(message, lease_ms, peer, now)
        except TableFull as error:
            return Refused(REFUSED_FULL, str(error))
        _log.info("cluster %d, role %d, %s: %s", message.cluster_id, message.role, message.state, what)
        return Granted(self._table.epoch, self._table.revision, lease_ms)

    def _gives_way(self, cluster_id: int, instance: bytes) -> bool:
        """Whether a member's connection is gone, so that another process may have its id before its lease ends."""
        peer = self._table.peer_of(cluster_id)
        if peer is not None and self._send(peer, UNASKED, Probe(cluster_id)):
            return False
        _log.info("cluster %d is gone, and another process takes its id", cluster_id)
        self._table.remove(cluster_id, expired=True)
        self._forget(cluster_id, instance)
        return True

    def _may_drain(self, message: Announce, now: float) -> bool:
        holder = self._locks.keep(
            ROLE_SWITCH, message.cluster_id, message.instance, message.switch_token, self._limits.most_lock_ms, now
        )
        return holder is not None

    def _renew(self, peer: bytes, message: Renew, now: float) -> Message:
        lease_ms = self._table.renew(message.cluster_id, message.instance, peer, now)
        if lease_ms is None:
            return Refused(REFUSED_UNKNOWN, f"cluster {message.cluster_id} has not announced itself")
        return Granted(self._table.epoch, self._table.revision, lease_ms)

    def _withdraw(self, message: Withdraw) -> Message:
        if self._table.instance_of(message.cluster_id) != message.instance:
            return Refused(REFUSED_UNKNOWN, f"cluster {message.cluster_id} has not announced itself")
        self._table.remove(message.cluster_id, expired=False)
        self._forget(message.cluster_id, message.instance)
        _log.info("cluster %d has withdrawn", message.cluster_id)
        return Done()

    def _forget(self, cluster_id: int, instance: bytes) -> None:
        """Take away what else a member has here: it is gone."""
        self._locks.forget(instance)
        for order in self._orders.of_member(cluster_id):
            self._send(order.peer, order.request, Refused(REFUSED_UNREACHABLE, f"cluster {cluster_id} is gone"))

    def _lock(self, peer: bytes, request: bytes, message: Lock, now: float) -> Message | None:
        lease_ms = min(max(message.lease_ms, 1), self._limits.most_lock_ms)
        holder = self._locks.keep(message.name, message.cluster_id, message.instance, message.token, lease_ms, now)
        if holder is not None:
            return Locked(holder.token, lease_ms, sorted(holder.drained))
        if message.token:
            return Refused(REFUSED_FENCED, f"the lock is not held with token {message.token}")
        deadline = now + max(message.wait_ms, _LEAST_WAIT_MS) / 1000
        waiter = Waiter(message.cluster_id, message.instance, lease_ms, deadline, peer, request)
        if not self._locks.wait(message.name, waiter):
            return Refused(REFUSED_FULL, "too many locks, or too many wait for this one")
        return None

    def _order(self, peer: bytes, request: bytes, message: Order, now: float) -> Message | None:
        target = self._table.peer_of(message.cluster_id)
        if target is None and now < self._started + _RETURN_S:
            return None  # it may announce itself again; the order is sent again too
        if target is None:
            return Refused(REFUSED_UNKNOWN, f"there is no cluster {message.cluster_id}")
        if not self._orders.add(message, peer, request, now):
            return Refused(REFUSED_FULL, "too many orders are under way")
        told = Switch(message.order, message.role, message.listen_ip_info, message.timeout_ms)
        if self._send(target, UNASKED, told):
            return None
        self._orders.take(message.order)
        return Refused(REFUSED_UNREACHABLE, f"cluster {message.cluster_id} cannot be reached")

    def _order_done(self, message: OrderDone) -> Message:
        order = self._orders.take(message.order)
        if order is not None:
            self._send(order.peer, order.request, message)
        return Done()

    def _status(self, now: float) -> Message:
        uptime_ms = int((now - self._started) * 1000)
        return StatusReply(
            self._table.epoch, self._table.revision, len(self._table), uptime_ms, self._requests, self._unreadable
        )


def _check(port: int, limits: Limits) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}, should be in [0, 65535]")
    if not 0 < limits.least_lease_ms <= limits.most_lease_ms:
        raise ValueError(f"leases from {limits.least_lease_ms} to {limits.most_lease_ms} ms: there are none")
    if limits.most_lock_ms <= 0 or limits.max_members <= 0:
        raise ValueError(f"{limits} should have positive numbers")


def _listen(router: zmq.Socket[bytes], bind: str, port: int) -> tuple[str, int]:
    """Bind a ROUTER; gives the address and the port."""
    router.linger = 0
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
    router.setsockopt(zmq.SNDHWM, _QUEUED_REPLIES)
    router.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
    router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    router.setsockopt(zmq.BACKLOG, 1024)  # thousands may come in one second
    try:
        host = _numeric("0.0.0.0" if bind == "*" else bind)
        router.setsockopt(zmq.IPV6, int(":" in host))
        router.bind(f"tcp://{bracketed(host)}:{port}")
    except (OSError, zmq.ZMQError) as error:
        # pyzmq puts the address behind the text of the system.
        text = zmq.strerror(error.errno or 0) if isinstance(error, zmq.ZMQError) else error.strerror
        reason = f"cannot listen on {bind} port {port}: {text}"
        raise LLMException(reason, status_code=LLMStatusCode.LLM_FAILED) from error
    endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
    return host, int(endpoint.rpartition(":")[2])


def _numeric(host: str) -> str:
    """Give the first address of a host name; ZeroMQ binds to numbers only."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
