"""The control thread: one a process, waits for everything that peers send, and for the clock.

ZeroMQ sockets belong to this thread alone. Other threads hand it functions with `call`; handlers run in it one after
the other, so what only handlers touch needs no lock. A handler that raises is logged and does not end the loop.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import select
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Callable, TypeVar

import zmq

from llm_datadist.control.client import endpoint

_log = logging.getLogger("llm_datadist.control")

_JOIN_SECONDS = 5.0

# A peer that floods the listener must not keep the loop from noticing deaths and deadlines.
_MESSAGES_A_ROUND = 64

_Answer = TypeVar("_Answer")


class ControlLoop:
    """Runs handlers for a listening ROUTER, for plain sockets and for timers; starts with its first user.

    Attributes
    ----------
    context : zmq.Context
        Of this process; also for the client's sockets, which live in the threads of their callers.
    """

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._epoll.register(self._wake_out, select.EPOLLIN)
        self._router: zmq.Socket[bytes] | None = None
        self._retired: list[zmq.Socket[bytes]] = []  # former listeners, to be closed
        self._on_message: Callable[[bytes, bytes], None] | None = None
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._stopping = False

    # ---- from any thread

    def start(self) -> None:
        """Start the thread unless it runs already."""
        with self._start_lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="llm_datadist-control", daemon=True)
                self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Have the control thread run a function soon."""
        self._calls.append(function)
        try:
            self._wake_in.send(b"\0")
        except BlockingIOError:
            pass  # a wake-up is under way already
        except OSError:
            _log.debug("the control loop is closed, a late call is dropped")

    def ask(self, function: Callable[[], _Answer], seconds: float = 5.0) -> _Answer:
        """Have the control thread run a function, wait for it, and give its result or raise what it raised.

        Raises
        ------
        TimeoutError
            The thread did not come to it in time; the function may still run later.
        """
        answer: Future[_Answer] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        if self._epoll.closed:
            raise TimeoutError("the control thread has ended")
        self.start()
        self.call(run)
        try:
            return answer.result(seconds)
        except FutureTimeoutError:
            raise TimeoutError(f"the control thread did not answer within {seconds} s") from None

    def listen(self, host: str, port: int, on_message: Callable[[bytes, bytes], None]) -> None:
        """Bind a ROUTER and serve it; see `bind` and `adopt`."""
        router = self.bind(host, port)
        self.call(lambda: self.adopt(router, on_message))
        self.start()

    def bind(self, host: str, port: int) -> zmq.Socket[bytes]:
        """Bind a ROUTER, which the caller hands to `adopt` or closes.

        Raises
        ------
        zmq.ZMQError
            The address cannot be bound.
        """
        router = self.context.socket(zmq.ROUTER)
        try:
            router.linger = 0
            router.setsockopt(zmq.MAXMSGSIZE, 64 * 1024)
            router.ipv6 = ":" in host
            router.bind(endpoint(host, port))
        except BaseException:
            router.close()
            raise
        return router

    def stop(self) -> None:
        """End the thread and close every socket; may be called twice, not from a handler."""
        self._stopping = True
        self.call(lambda: None)
        with self._start_lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                _log.error("the control thread did not end within %s s", _JOIN_SECONDS)
                return
        if self._epoll.closed:
            return
        while self._calls:  # adopt sockets that were handed over too late to be served
            self._guarded(self._calls.popleft())
        self.unlisten()
        self._close_retired()
        self._epoll.close()
        self._wake_in.close()
        self._wake_out.close()
        self._end_context()

    def _end_context(self) -> None:
        """Terminate the context: client calls in other threads end with an error now, and close their own sockets.

        Termination waits for these sockets, without a deadline of its own.
        """
        ending = threading.Thread(target=self.context.term, name="llm_datadist-term", daemon=True)
        try:
            ending.start()
        except RuntimeError:  # the interpreter ends: no client call can be running any more
            self.context.term()
            return
        ending.join(_JOIN_SECONDS)
        if ending.is_alive():
            _log.error("a ZeroMQ socket of another thread was not closed within %s s", _JOIN_SECONDS)

    # ---- from the control thread

    def watch(self, connection: socket.socket, on_readable: Callable[[], None]) -> None:
        """Run a handler whenever the socket can be read or was closed by its peer."""
        self._readers[connection.fileno()] = on_readable
        self._epoll.register(connection, select.EPOLLIN | select.EPOLLRDHUP)

    def watch_writable(self, connection: socket.socket, on_writable: Callable[[], None]) -> None:
        """Run a handler when the socket can be written to: when its connection was made, or has failed."""
        self._readers[connection.fileno()] = on_writable
        self._epoll.register(connection, select.EPOLLOUT)

    def unwatch(self, connection: socket.socket) -> None:
        """Forget a socket; call before it is closed."""
        if self._readers.pop(connection.fileno(), None) is not None and not self._epoll.closed:
            self._epoll.unregister(connection)

    def adopt(self, router: zmq.Socket[bytes], on_message: Callable[[bytes, bytes], None]) -> None:
        """Take over a bound ROUTER: `on_message(peer, data)` runs for each message. The one before it is closed."""
        self.unlisten()
        self._router, self._on_message = router, on_message

    def unlisten(self) -> None:
        """Close the listener; the loop does so before it waits again."""
        if self._router is not None:
            self._retired.append(self._router)
        self._router = self._on_message = None

    def at(self, deadline: float, function: Callable[[], None]) -> None:
        """Run a function once ``time.monotonic()`` has passed `deadline`."""
        heapq.heappush(self._timers, (deadline, next(self._order), function))

    def reply(self, peer: bytes, data: bytes) -> None:
        """Answer a message that came in through the ROUTER; an answer to a peer that is gone is dropped."""
        if self._router is not None:
            try:
                self._router.send_multipart([peer, data], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                _log.warning("cannot answer a peer: %s", error)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        polled: zmq.Socket[bytes] | None = None
        while not self._stopping:
            if self._router is not polled:
                if polled is not None:
                    poller.unregister(polled)
                polled = self._router
                if polled is not None:
                    poller.register(polled, zmq.POLLIN)
            self._close_retired()
            poller.poll(self._wait_ms())
            for descriptor, _ in self._epoll.poll(0):
                self._handle(descriptor)
            while self._calls:
                self._guarded(self._calls.popleft())
            if self._router is not None:
                self._receive(self._router)
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._guarded(heapq.heappop(self._timers)[2])

    def _close_retired(self) -> None:
        while self._retired:
            self._retired.pop().close()

    def _wait_ms(self) -> int | None:
        if self._calls:
            return 0
        if not self._timers:
            return None
        return max(0, int((self._timers[0][0] - time.monotonic()) * 1000) + 1)

    def _handle(self, descriptor: int) -> None:
        if descriptor == self._wake_out.fileno():
            try:
                while self._wake_out.recv(4096):
                    pass
            except BlockingIOError:
                return
        handler = self._readers.get(descriptor)
        if handler is not None:
            self._guarded(handler)

    def _receive(self, router: zmq.Socket[bytes]) -> None:
        for _ in range(_MESSAGES_A_ROUND):
            try:
                frames = router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2 or self._on_message is None:
                _log.warning("a peer sent a message of %d frames, dropped", len(frames))
                continue
            self._guarded(functools.partial(self._on_message, *frames))

    @staticmethod
    def _guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            _log.exception("a control handler failed")
