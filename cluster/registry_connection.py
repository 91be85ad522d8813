"""A connection to a registry: requests and their replies, kept alive over restarts of the registry.

One thread owns the socket. A request is sent again until it is answered or its time is over; all requests may be
repeated, see `registry_messages`. Callbacks run in that thread, one after the other, and must not wait.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from llm_datadist.cluster.registry_address import RegistryAddress
from llm_datadist.cluster.registry_messages import (
    MAX_REPLY_BYTES,
    REQUEST_ID_BYTES,
    UNASKED,
    Look,
    Message,
    RegistryMessageError,
    decode,
    encode,
)
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.cluster")

_AGAIN_S = 2.0  # after which a request without an answer is sent again
_JOIN_S = 5.0
_RECONNECT_MS = 50
_MOST_RECONNECT_MS = 1_000
_HEARTBEAT_MS = 5_000
_MOST_WAIT_MS = 60_000

Unasked = Callable[[Message], None]


@dataclass
class _Pending:
    data: bytes
    answer: Future[Message]
    deadline: float
    again_s: float
    send_at: float


class RegistryConnection:
    """Requests to a registry, from any thread; it starts with the first one.

    Parameters
    ----------
    address : RegistryAddress
        Where the registry is. It need not be there yet.
    on_unasked : callable, optional
        Gets what the registry sends by itself.
    """

    def __init__(self, address: RegistryAddress, on_unasked: Unasked | None = None) -> None:
        self.address = address
        self._on_unasked = on_unasked
        self._on_connected: list[Callable[[], None]] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pending: dict[bytes, _Pending] = {}
        self._next_id = int.from_bytes(secrets.token_bytes(4), "big") + 1
        self._ids = threading.Lock()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._stopping = False

    # ---- from any thread

    def request(self, message: Message, timeout_s: float) -> Future[Message]:
        """Send a request; the future gets the reply, or an LLMException with LLM_TIMEOUT when the time is over."""
        with self._ids:
            self._next_id += 1
            name = self._next_id.to_bytes(REQUEST_ID_BYTES, "big")
        now = time.monotonic()
        # The registry keeps a look for a while; it is not lost before.
        again_s = _AGAIN_S + message.hold_ms / 1000 if isinstance(message, Look) else _AGAIN_S
        pending = _Pending(encode(message), Future(), now + timeout_s, again_s, now)
        self.call(lambda: self._pending.__setitem__(name, pending))
        if self._stopping:
            self._fail(pending, "the connection is closed")
        return pending.answer

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Send a request and wait for the reply; not from the connection's own thread.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: no answer in time.
        """
        try:
            return self.request(message, timeout_s).result(timeout_s + 1.0)
        except FutureTimeoutError:
            raise _no_answer(self.address, "its thread is busy") from None

    def call(self, function: Callable[[], None]) -> None:
        """Have the thread run a function soon."""
        self._start()
        self._calls.append(function)
        self._wake()

    def at(self, moment: float, function: Callable[[], None]) -> None:
        """Have the thread run a function once ``time.monotonic()`` has passed a moment."""
        self.call(lambda: heapq.heappush(self._timers, (moment, next(self._order), function)))

    def on_connected(self, function: Callable[[], None]) -> None:
        """Have the thread run a function whenever the connection is there, again or for the first time."""
        self._on_connected.append(function)

    def close(self) -> None:
        """End the thread; requests that are under way fail. May be called twice."""
        self._stopping = True
        self._wake()
        with self._start_lock:
            thread, self._thread = self._thread, None
        if thread is threading.current_thread():
            _log.error("a connection to a registry cannot be closed by its own callback")
            return
        if thread is not None:
            thread.join(_JOIN_S)
            if thread.is_alive():
                _log.error("the thread of a connection to a registry did not end within %s s", _JOIN_S)
                return
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:
            pass  # a wake-up is under way already, or it is closed

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="llm_datadist-registry", daemon=True)
                self._thread.start()

    # ---- in the thread

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            dealer = context.socket(zmq.DEALER)
            monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            self._connect(dealer)
            poller = zmq.Poller()
            poller.register(monitor, zmq.POLLIN)
            poller.register(self._wake_out.fileno(), zmq.POLLIN)
            while not self._stopping:
                unsent = any(pending.send_at <= time.monotonic() for pending in self._pending.values())
                # Writable means connected here (ZMQ_IMMEDIATE): nothing is queued while the registry is away.
                poller.register(dealer, zmq.POLLIN | (zmq.POLLOUT if unsent else 0))
                poller.poll(self._wait_ms())
                self._drain_wake()
                while self._calls:
                    self._guarded(self._calls.popleft())
                self._receive(dealer)
                self._notice(monitor)
                self._look_at_the_clock(dealer, time.monotonic())
        finally:
            context.destroy(linger=0)
            while self._calls:  # requests that came too late
                self._guarded(self._calls.popleft())
            for pending in self._pending.values():
                self._fail(pending, "the connection is closed")

    def _connect(self, dealer: zmq.Socket[bytes]) -> None:
        dealer.linger = 0
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        dealer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _MOST_RECONNECT_MS)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
        # With IPv6 switched on ZeroMQ tries the first address of a name only, often one that nobody listens at.
        dealer.setsockopt(zmq.IPV6, int(not _has_ipv4(self.address.host)))
        dealer.connect(self.address.endpoint)

    def _wait_ms(self) -> int:
        if self._calls or self._stopping:
            return 0
        now = time.monotonic()
        times = [min(pending.deadline, pending.send_at) for pending in self._pending.values() if pending.send_at > now]
        times += [pending.deadline for pending in self._pending.values()]
        if self._timers:
            times.append(self._timers[0][0])
        return max(0, min(int((min(times, default=now + 60) - now) * 1000) + 1, _MOST_WAIT_MS))

    def _drain_wake(self) -> None:
        try:
            while self._wake_out.recv(4096):
                pass
        except BlockingIOError:
            return

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                _log.warning("the registry sent %d frames, dropped", len(frames))
                continue
            self._guarded(lambda frames=frames: self._take(*frames))  # type: ignore[misc]

    def _notice(self, monitor: zmq.Socket[bytes]) -> None:
        """Notice that the registry has gone, or is there again."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                for pending in self._pending.values():  # what it was asked is lost
                    pending.send_at = time.monotonic()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                for function in self._on_connected:
                    self._guarded(function)

    def _take(self, name: bytes, data: bytes) -> None:
        try:
            message = decode(data, MAX_REPLY_BYTES)
        except RegistryMessageError as error:
            _log.warning("the registry at %s sent what cannot be read: %s", self.address.endpoint, error)
            return
        if name == UNASKED:
            if self._on_unasked is not None:
                self._on_unasked(message)
            return
        pending = self._pending.pop(name, None)
        if pending is not None:  # else the answer to a request that was sent twice
            pending.answer.set_result(message)

    def _look_at_the_clock(self, dealer: zmq.Socket[bytes], now: float) -> None:
        for name, pending in list(self._pending.items()):
            if pending.deadline <= now:
                del self._pending[name]
                self._fail(pending, "no answer in time")
            elif pending.send_at <= now:
                try:
                    dealer.send_multipart([name, pending.data], zmq.NOBLOCK)
                except zmq.Again:
                    continue  # not connected: it stays due
                pending.send_at = now + pending.again_s
        while self._timers and self._timers[0][0] <= now:
            self._guarded(heapq.heappop(self._timers)[2])

    def _fail(self, pending: _Pending, reason: str) -> None:
        if not pending.answer.done():
            try:
                pending.answer.set_exception(_no_answer(self.address, reason))
            except Exception:  # done meanwhile by another thread
                _log.debug("a request was answered while its connection closed")

    @staticmethod
    def _guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            _log.exception("a callback of a connection to a registry failed")


def _no_answer(address: RegistryAddress, reason: str) -> LLMException:
    return LLMException(f"registry {address.endpoint}: {reason}", status_code=LLMStatusCode.LLM_TIMEOUT)


def _has_ipv4(host: str) -> bool:
    """Whether a host has an IPv4 address, or is not known now: it may be later."""
    try:
        kinds = {entry[0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return ":" not in host
    return socket.AF_INET in kinds
