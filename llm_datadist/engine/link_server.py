"""The server's half of link messages: answers clients in the control thread.

A set-up goes through four steps, each under the client's deadline: the Hello is answered with a token, the client comes
to the Unix socket or the data port with it, gets what it may reach, and says that it has it. At most 16 set-ups are
under way at one time; further ones wait in line.
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
from llm_datadist.engine.entrance import Entrance
from llm_datadist.engine.failures import failure
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity, Link
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.network import Network
from llm_datadist.engine.set_ups import DataSetUp, SetUp, SharedMemorySetUp, take_stream
from llm_datadist.engine.transport_choice import Choice, choose
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous, shared_memory, tcp

_log = logging.getLogger("llm_datadist.link")

MAX_SET_UPS = 16  # at one time on a server, documented
_MAX_WAITING = 1024  # Hellos in line; more is no engine that links but a mistake or an attack
_MAX_SET_UP_SECONDS = 60.0  # whatever a client claims: it holds one of few places
_CLOSE_SECONDS = 1.0  # for the listener to be gone


class LinkServer:
    """Accepts links at one address. Everything in here runs in the control thread, unless it says otherwise.

    Parameters
    ----------
    loop : ControlLoop
        Carries the messages; not started yet or running.
    identity : Identity
        Of this process.
    grants : Grants
        Makes what a client may reach.
    table : LinkTable
        Takes finished links, says who must be refused.
    network : Network
        Which transports may be used, and where data connections are accepted.
    """

    def __init__(
        self, loop: ControlLoop, identity: Identity, grants: Grants, table: LinkTable, network: Network
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._grants = grants
        self._table = table
        self._network = network
        self._set_ups: dict[bytes, SetUp] = {}
        self._waiting: deque[tuple[bytes, Hello, float]] = deque()
        self._address: tuple[str, int] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._name = ""  # of the Unix socket
        self._data_address = ("", 0)
        self._entrances: list[Entrance] = []

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
            reason = f"cannot listen on {host}:{port} ({error.strerror}), choose a free port"
            raise failure("listening", LLMStatusCode.LLM_FAILED, reason) from error
        self._address = (host, port)
        try:
            self._make_entrances(host)
        except BaseException:
            self.discard()
            raise

    def _make_entrances(self, host: str) -> None:
        if shared_memory.NAME in self._network.transports:
            listener, self._name = rendezvous.listen()
            size = rendezvous.TOKEN_BYTES
            self._entrances.append(Entrance(self._loop, listener, rendezvous.accept, size, self._on_token))
        if self._grants.data_transport not in self._network.transports:
            return
        host, ports = self._network.data_address or host, self._network.data_ports
        try:
            listener = tcp.listen(host, ports)
        except OSError as error:
            where = "any port" if ports is None else f"ports {ports[0]} to {ports[1]}"
            reason = f"cannot accept data connections on {host}, {where} ({error.strerror or error})"
            raise failure("listening", LLMStatusCode.LLM_FAILED, reason) from error
        address = listener.getsockname()
        self._data_address = (address[0] if self._network.data_address else "", address[1])
        self._entrances.append(Entrance(self._loop, listener, tcp.accept, tcp.PREAMBLE_BYTES, self._on_preamble))

    def discard(self) -> None:
        """Give up an address that was never served. In any thread."""
        assert self._router is not None
        self._router.close()
        for entrance in self._entrances:
            entrance.listener.close()

    def serve(self) -> None:
        """Answer clients from now on."""
        assert self._router is not None
        self._loop.adopt(self._router, self.on_message)
        for entrance in self._entrances:
            entrance.open()

    def close(self) -> None:
        """Stop listening and give up what is under way; in the control thread, or when it has ended."""
        self._loop.unlisten()
        for entrance in self._entrances:
            entrance.close()
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
        choice = choose(hello, self._identity, self._network.transports, shortfall=self._network.reason)
        refusal = self._check(hello, choice)
        if refusal is not None:
            level = logging.DEBUG if refusal.code == LLMStatusCode.LLM_PROCESSING_LINK else logging.WARNING
            _log.log(level, "refused cluster %d: %s", hello.cluster_id, refusal.reason)
            self._reply(peer, refusal)
            return
        set_up = self._new_set_up(hello, choice, deadline)
        self._set_ups[set_up.token] = set_up
        token = set_up.token  # alone: a link must not stay in memory until the time to make it is over
        self._loop.at(deadline, lambda: self._expire(token))
        host, port = self._data_address
        accept = Accept(
            cluster_id=self._identity.cluster_id,
            instance=self._identity.instance,
            token=set_up.token,
            transport=choice.transport or "",
            reason=choice.reason,
            rendezvous=self._name,
            data_host=host,
            data_port=port,
        )
        self._reply(peer, accept)

    def _new_set_up(self, hello: Hello, choice: Choice, deadline: float) -> SetUp:
        token = rendezvous.new_token()
        if choice.transport == shared_memory.NAME:
            return SharedMemorySetUp(hello, token, choice, deadline)
        return DataSetUp(hello, token, choice, deadline)

    def _check(self, hello: Hello, choice: Choice) -> Refuse | None:
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
        if choice.transport is None:
            return Refuse(failed, f"no transport in common: {choice.reason}")
        return self._table.admit(hello)

    # ---- set-ups

    def _on_token(self, connection: socket.socket, token: bytes) -> None:
        """Take a client that has come to the Unix socket."""
        set_up = self._set_ups.get(token)
        if not isinstance(set_up, SharedMemorySetUp) or set_up.connection is not None:
            _log.warning("refused a connection with an unknown token")
            connection.close()
            return
        self._begin(set_up, connection)

    def _on_preamble(self, connection: socket.socket, preamble: bytes) -> None:
        """Take a client that has come to the data port."""
        said = tcp.read_preamble(preamble)
        token, purpose = said or (b"", b"")
        set_up = self._set_ups.get(token)
        if purpose == tcp.LINK and isinstance(set_up, DataSetUp) and set_up.connection is None:
            self._begin(set_up, connection)
        elif purpose in (tcp.FORWARD, tcp.REVERSE) and isinstance(set_up, DataSetUp):
            set_up.take(connection, purpose)
        else:
            link = self._table.accepted_with(token) if purpose in (tcp.FORWARD, tcp.REVERSE) else None
            if link is None:
                _log.warning("refused a data connection from %s", tcp.peer_name(connection))
                connection.close()
            else:
                take_stream(connection, purpose, link.end, link.grant)

    def _begin(self, set_up: SetUp, connection: socket.socket) -> None:
        try:
            set_up.begin(connection, self._identity, self._grants)
        except OSError as error:
            self._abandon(set_up, f"cannot answer it: {error}")
            return
        self._loop.watch(connection, lambda: self._on_mapped(set_up))

    def _on_mapped(self, set_up: SetUp) -> None:
        connection, grant = set_up.connection, set_up.grant
        assert connection is not None
        assert grant is not None
        try:
            end = set_up.finish(self._identity)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._abandon(set_up, f"the client gave up or is no peer of ours: {error}")
            return
        hello = set_up.hello
        link = Link(hello.cluster_id, set_up.token, hello.instance, end, grant, connection, reason=set_up.choice.reason)
        link.status.handle(LinkEvent.MADE)
        self._loop.unwatch(connection)
        # In the table before the client hears of it: its first pull or unlink may come at once.
        refusal = self._table.add_accepted(hello, link)
        if refusal is not None:  # another link of the same cluster was quicker
            end.close(time.monotonic_ns())
            if refusal.code == LLMStatusCode.LLM_PROCESSING_LINK:
                set_up.say(rendezvous.CROSSED)
            self._abandon(set_up, refusal.reason)
            return
        self._end(set_up)
        set_up.say(rendezvous.LINKED)

    def _expire(self, token: bytes) -> None:
        set_up = self._set_ups.get(token)
        if set_up is not None:
            self._abandon(set_up, "the client's timeout passed")

    def _abandon(self, set_up: SetUp, reason: str) -> None:
        _log.warning("link set-up of cluster %d ended: %s", set_up.hello.cluster_id, reason)
        if set_up.connection is not None:
            self._loop.unwatch(set_up.connection)
        set_up.discard()
        self._end(set_up)

    def _end(self, set_up: SetUp) -> None:
        del self._set_ups[set_up.token]
        while self._waiting and self._has_place():
            peer, hello, deadline = self._waiting.popleft()
            if deadline > time.monotonic():
                self._start(peer, hello, deadline)


def _is_free(address: tuple[str, int]) -> bool:
    """Tell whether nobody listens at an address of this host."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
    return True
