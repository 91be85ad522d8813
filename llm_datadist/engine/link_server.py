"""The server's half of link messages: answers clients in the control thread.

A set-up goes through four steps, each under the client's deadline: the Hello is answered with a token, the client comes
to the Unix socket with it, gets the descriptors, and says that it has mapped them. At most 16 set-ups are under way at
one time; further ones wait in line.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque

import zmq

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import (
    Accept,
    Hello,
    Message,
    MessageError,
    Probe,
    ProbeAnswer,
    Refuse,
    Unlink,
    Unlinked,
    decode,
    encode,
)
from llm_datadist.engine.failures import failure
from llm_datadist.engine.link import Identity, Link
from llm_datadist.engine.link_client import MakeGrant
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous, shared_memory

_log = logging.getLogger("llm_datadist.link")

MAX_SET_UPS = 16  # at one time on a server, documented
_MAX_WAITING = 1024  # Hellos in line; more is no engine that links but a mistake or an attack
_MAX_SET_UP_SECONDS = 60.0  # whatever a client claims: it holds one of few places
_STRANGER_SECONDS = 5.0  # for a connection to present its token
_CLOSE_SECONDS = 1.0  # for the listener to be gone


class _SetUp:
    """A link that a client is making, from the accepted Hello on."""

    def __init__(self, hello: Hello, token: bytes, deadline: float) -> None:
        self.hello = hello
        self.token = token
        self.deadline = deadline
        self.connection: socket.socket | None = None
        self.grant: shared_memory.SharedMemoryGrant | None = None


class LinkServer:
    """Accepts links at one address. Everything in here runs in the control thread, unless it says otherwise.

    Parameters
    ----------
    loop : ControlLoop
        Carries the messages; not started yet or running.
    identity : Identity
        Of this process.
    make_grant : callable
        Makes the server's end of the shared-memory transport.
    table : LinkTable
        Takes finished links, says who must be refused.
    """

    def __init__(
        self,
        loop: ControlLoop,
        identity: Identity,
        make_grant: MakeGrant,
        table: LinkTable,
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._make_grant = make_grant
        self._table = table
        self._set_ups: dict[bytes, _SetUp] = {}
        self._waiting: deque[tuple[bytes, Hello, float]] = deque()
        self._strangers: set[socket.socket] = set()
        self._address: tuple[str, int] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._listener, self._name = rendezvous.listen()

    def start(self, host: str, port: int) -> None:
        """Listen on the given address. In any thread.

        Raises
        ------
        LLMException
            LLM_FAILED: the address cannot be bound; nothing is left open.
        """
        self.bind(host, port)
        self._loop.call(self.serve)
        self._loop.start()

    def bind(self, host: str, port: int) -> None:
        """Take the address, to be served or discarded; raises as `start` does. In any thread."""
        try:
            self._router = self._loop.bind(host, port)
        except zmq.ZMQError as error:
            self._listener.close()
            reason = f"cannot listen on {host}:{port} ({error.strerror}), choose a free port"
            raise failure("listening", LLMStatusCode.LLM_FAILED, reason) from error
        self._address = (host, port)

    def discard(self) -> None:
        """Give up an address that was never served. In any thread."""
        assert self._router is not None
        self._router.close()
        self._listener.close()

    def serve(self) -> None:
        """Answer clients from now on."""
        assert self._router is not None
        self._loop.adopt(self._router, self.on_message)
        self._loop.watch(self._listener, self._on_connection)

    def close(self) -> None:
        """Stop listening and give up what is under way; in the control thread, or when it has ended."""
        self._loop.unlisten()
        self._loop.unwatch(self._listener)
        self._listener.close()
        for connection in list(self._strangers):
            self._forget_stranger(connection)
        self._waiting.clear()  # first, or they would take the places that come free
        for set_up in list(self._set_ups.values()):
            self._abandon(set_up, "the server stops")

    def wait_until_closed(self) -> None:
        """Wait until nobody is accepted at the address any more: ZeroMQ closes a listener in a thread of its own.

        In any thread but the control thread.
        """
        give_up = time.monotonic() + _CLOSE_SECONDS
        while self._address is not None and not _is_free(self._address):
            if time.monotonic() > give_up:
                _log.warning("%s:%d still accepts connections", *self._address)
                return
            time.sleep(0.001)

    # ---- messages

    def on_message(self, peer: bytes, data: bytes) -> None:
        """Answer one message."""
        try:
            message = decode(data)
        except MessageError as error:
            _log.warning("refused a message: %s", error)
            self._reply(peer, Refuse(LLMStatusCode.LLM_LINK_FAILED, str(error)[:1000]))
            return
        if isinstance(message, Hello):
            self._on_hello(peer, message)
        elif isinstance(message, Unlink):
            self._reply(peer, Unlinked(self._table.drop(message.cluster_id, message.token)))
        elif isinstance(message, Probe):
            self._reply(peer, ProbeAnswer(self._table.knows(message.cluster_id, message.token)))
        else:
            _log.warning("a client sent %s, which is for clients", type(message).__name__)

    def _reply(self, peer: bytes, message: Message) -> None:
        self._loop.reply(peer, encode(message))

    def _on_hello(self, peer: bytes, hello: Hello) -> None:
        deadline = time.monotonic() + min(max(hello.timeout_ms, 1) / 1000, _MAX_SET_UP_SECONDS)
        if not self._has_place():
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append((peer, hello, deadline))
            return
        self._start(peer, hello, deadline)

    def _has_place(self) -> bool:
        """Whether a set-up may start: every one under way must be able to end in a link, so that none fails late."""
        return not self._set_ups or len(self._set_ups) < min(MAX_SET_UPS, self._table.room())

    def _start(self, peer: bytes, hello: Hello, deadline: float) -> None:
        refusal = self._check(hello)
        if refusal is not None:
            level = logging.DEBUG if refusal.code == LLMStatusCode.LLM_PROCESSING_LINK else logging.WARNING
            _log.log(level, "refused cluster %d: %s", hello.cluster_id, refusal.reason)
            self._reply(peer, refusal)
            return
        set_up = _SetUp(hello, rendezvous.new_token(), deadline)
        self._set_ups[set_up.token] = set_up
        self._loop.at(deadline, lambda: self._expire(set_up))
        accept = Accept(
            self._identity.cluster_id, self._identity.instance, set_up.token, shared_memory.NAME, self._name
        )
        self._reply(peer, accept)

    def _check(self, hello: Hello) -> Refuse | None:
        failed = LLMStatusCode.LLM_LINK_FAILED
        if hello.remote_cluster_id != self._identity.cluster_id:
            return Refuse(
                failed,
                f"cluster {self._identity.cluster_id} listens here, the client expects {hello.remote_cluster_id}:"
                " set remote_cluster_id to the id that the prompt was made with",
            )
        if hello.cache_manager != self._identity.cache_manager:
            modes = ("in cache-manager mode", "not in cache-manager mode")
            mine, other = modes if self._identity.cache_manager else modes[::-1]
            return Refuse(
                failed,
                f"this process is {mine}, the client is {other}: set llm.EnableCacheManager alike at both",
            )
        if hello.instance == self._identity.instance:
            return Refuse(failed, "the client is this very process")
        if shared_memory.NAME not in hello.transports or hello.host != self._identity.host:
            return Refuse(failed, f"no transport in common: the client offers {hello.transports} on host {hello.host}")
        return self._table.admit(hello)

    # ---- set-ups

    def _on_connection(self) -> None:
        try:
            connection = rendezvous.accept(self._listener)
        except BlockingIOError:
            return  # the client has gone again
        except rendezvous.ForeignProcess as error:
            _log.warning("refused a connection: %s", error)
            return
        self._strangers.add(connection)
        self._loop.watch(connection, lambda: self._on_token(connection))
        self._loop.at(time.monotonic() + _STRANGER_SECONDS, lambda: self._forget_stranger(connection))

    def _on_token(self, connection: socket.socket) -> None:
        try:
            token = connection.recv(rendezvous.TOKEN_BYTES)
        except BlockingIOError:
            return
        except OSError:
            token = b""
        set_up = self._set_ups.get(token)
        if set_up is None or set_up.connection is not None:
            if token:
                _log.warning("refused a connection with an unknown token")
            self._forget_stranger(connection)
            return
        self._strangers.discard(connection)
        self._loop.unwatch(connection)
        set_up.connection = connection
        try:
            set_up.grant = self._make_grant(self._identity.cache_manager)
            set_up.grant.send(connection, rendezvous.GRANTED)
        except OSError as error:
            self._abandon(set_up, f"cannot send descriptors: {error}")
            return
        self._loop.watch(connection, lambda: self._on_mapped(set_up))

    def _forget_stranger(self, connection: socket.socket) -> None:
        if connection in self._strangers:
            self._strangers.discard(connection)
            self._loop.unwatch(connection)
            connection.close()

    def _on_mapped(self, set_up: _SetUp) -> None:
        connection, grant = set_up.connection, set_up.grant
        assert connection is not None
        assert grant is not None
        try:
            granted = rendezvous.receive_descriptors(connection, rendezvous.MAPPED, shared_memory.NUM_DESCRIPTORS)
            private = connection if self._identity.cache_manager else None
            pusher = shared_memory.attach(granted, pool_writable=True, connection=private)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._abandon(set_up, f"the client gave up or is no peer of ours: {error}")
            return
        hello = set_up.hello
        link = Link(hello.cluster_id, set_up.token, hello.instance, pusher, grant, connection)
        link.status.handle(LinkEvent.MADE)
        self._loop.unwatch(connection)
        # In the table before the client hears of it: its first pull or unlink may come at once.
        refusal = self._table.add_accepted(hello, link)
        if refusal is not None:  # another link of the same cluster was quicker
            pusher.close(time.monotonic_ns())
            if refusal.code == LLMStatusCode.LLM_PROCESSING_LINK:
                self._send(set_up, rendezvous.CROSSED)
            self._abandon(set_up, refusal.reason)
            return
        self._end(set_up)
        self._send(set_up, rendezvous.LINKED)

    @staticmethod
    def _send(set_up: _SetUp, word: bytes) -> None:
        assert set_up.connection is not None
        try:
            set_up.connection.send(word)
        except OSError:  # the loop sees it close
            _log.info("cluster %d is gone before its link was finished", set_up.hello.cluster_id)

    def _expire(self, set_up: _SetUp) -> None:
        if set_up.token in self._set_ups:
            self._abandon(set_up, "the client's timeout passed")

    def _abandon(self, set_up: _SetUp, reason: str) -> None:
        _log.warning("link set-up of cluster %d ended: %s", set_up.hello.cluster_id, reason)
        if set_up.connection is not None:
            self._loop.unwatch(set_up.connection)
            set_up.connection.close()
        if set_up.grant is not None:
            set_up.grant.revoke()
        self._end(set_up)

    def _end(self, set_up: _SetUp) -> None:
        del self._set_ups[set_up.token]
        while self._waiting and self._has_place():
            peer, hello, deadline = self._waiting.popleft()
            if deadline > time.monotonic():
                self._start(peer, hello, deadline)


def _is_free(address: tuple[str, int]) -> bool:
    """Tell whether nobody listens at an address of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
