"""Native data connections: for peers on other hosts, and for all whose memory cannot be mapped.

Every connection of a link is made by its client to the data port of its server, so that one direction through a
firewall is enough; between two members of a communicator, by the one of higher rank to where the other one waits. Each
begins with a preamble: the token that the handshake gave out, and what the connection is for.
The first one is kept open as long as the link, and says when a process dies. Over the others one side asks and the
data server of the other side answers; there is one for each direction from the beginning, and more when transfers run
at the same time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Callable

from llm_datadist._directory import Claims, Directory
from llm_datadist._segment import Memory, Segment
from llm_datadist._tcp_end import TcpPeer
from llm_datadist._tcp_server import TcpServer
from llm_datadist.transports import rendezvous
from llm_datadist.transports.serving_threads import ServingThreads

NAME = "tcp"

PREAMBLE_BYTES = 8 + rendezvous.TOKEN_BYTES + 1
_MAGIC = b"LLMDTCP1"

# What a connection is for.
LINK = b"L"  # words about the link, and word of a death
FORWARD = b"F"  # the client asks, the server answers
REVERSE = b"R"  # the server asks, the client answers
MEMBER = b"M"  # a member of a communicator, whose digest stands for the token, says hello; becomes that of their link

READY = b"Y"  # server: a connection is taken

# A peer that the network has swallowed is noticed after about so many seconds (tcp(7)); one that is only slow answers.
_IDLE_S, _INTERVAL_S, _PROBES = 5, 2, 3
_LOST_MS = 1000 * (_IDLE_S + _INTERVAL_S * _PROBES)

MAX_STREAMS = 8  # that one peer may have open to the data server; MAX_CHANNELS of _link_end.pxd


def preamble(token: bytes, purpose: bytes) -> bytes:
    """Make the first bytes of a connection."""
    return _MAGIC + token + purpose


def read_preamble(data: bytes) -> tuple[bytes, bytes] | None:
    """Give token and purpose; None if it is no preamble."""
    if len(data) != PREAMBLE_BYTES or not data.startswith(_MAGIC):
        return None
    return data[len(_MAGIC) : -1], data[-1:]


def listen(host: str, ports: tuple[int, int] | None) -> socket.socket:
    """Open a non-blocking listener on an address of this host.

    Parameters
    ----------
    host : str
        Address or name to bind.
    ports : (int, int) or None
        First and last port to try; None = one that the system chooses.

    Raises
    ------
    OSError
        The host cannot be resolved or bound, or every port is in use.
    """
    family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    first, last = ports or (0, 0)
    for port in range(first, last + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.listen(128)
            listener.setblocking(False)
            return listener
        except BaseException as error:
            listener.close()
            if not isinstance(error, OSError) or port == last:
                raise
    raise ValueError(f"{ports} is no range of ports")


def accept(listener: socket.socket) -> socket.socket:
    """Take the next connection, non-blocking."""
    connection, _ = listener.accept()
    connection.setblocking(False)
    return connection


def new_socket(address: tuple[str, int]) -> socket.socket:
    """Make a socket for a connection to an address, non-blocking and not connected yet."""
    connection = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    return connection


def peer_name(connection: socket.socket) -> str:
    """Tell the address at the other end, for messages."""
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return "somebody who is gone"


def tune(connection: socket.socket) -> None:
    """Let small messages go at once, and the kernel notice a peer that is gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_MS)


def connect(address: tuple[str, int], token: bytes, purpose: bytes, deadline: float) -> socket.socket:
    """Make a connection to a data port and introduce it; the socket keeps a timeout.

    Raises
    ------
    OSError
        It is refused, or the deadline (clock of ``time.monotonic``) passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout(f"no time left to connect to the data port {address[0]}:{address[1]}")
    connection = socket.create_connection(address, timeout=left)
    try:
        tune(connection)
        connection.sendall(preamble(token, purpose))
    except BaseException:
        connection.close()
        raise
    return connection


def expect(connection: socket.socket, word: bytes, deadline: float) -> None:
    """Wait until the server says a word.

    Raises
    ------
    OSError
        It says another one or closes the connection, or the deadline passed.
    """
    connection.settimeout(max(0.001, deadline - time.monotonic()))
    heard = connection.recv(1)
    if heard != word:
        raise ConnectionError(f"the server said {heard!r}, expected {word!r}: it has given the link up")


class TcpEnd(TcpPeer):
    """One end of a link over data connections.

    Parameters
    ----------
    want_channel : callable
        See to it that there will be another connection; must not block.
    on_close : callable or None
        Called when the end is closed.
    summed : bool
        Whether bytes are summed and compared.
    private_memory : str or None
        What the description of the link says about registered memory.
    """

    name = NAME

    def __init__(
        self,
        want_channel: Callable[[], None],
        on_close: Callable[[], None] | None = None,
        *,
        summed: bool,
        private_memory: str | None,
    ) -> None:
        super().__init__(summed)
        self._want = want_channel
        self._on_close = on_close
        self.private_memory = private_memory

    def close(self, deadline_ns: int) -> bool:
        if self._on_close is not None:
            self._on_close()
        return super().close(deadline_ns)

    def _want_channel(self) -> None:
        self._want()

    def begin_preparing(self, on_end: Callable[[], None]) -> None:
        """Nothing is missing once there are connections."""
        on_end()

    def prepare(self, deadline_ns: int) -> None:
        """Do nothing."""

    def open_channel(self, connection: socket.socket) -> None:
        """See to it that there is a connection; `connection`, that of the link, is not needed for it."""
        if not self.channels:
            self._want()


class TcpGrant:
    """What one peer may reach: its requests are served from the directory and the memory of this process.

    Parameters
    ----------
    pool : Memory
        The device's pool.
    directory : Directory
        Caches and keys.
    lock : threading.Lock
        Guards the directory.
    threads : ServingThreads
        Of the engine.
    peer_writes : bool
        Whether the peer may push.
    """

    name = NAME

    def __init__(
        self, pool: Memory, directory: Directory, lock: threading.Lock, threads: ServingThreads, *, peer_writes: bool
    ) -> None:
        self._directory = directory
        self._lock = lock
        self._threads = threads
        self._claims = Claims(by_threads=True)
        self._server = self._new_server(pool, directory.ledger, self._claims.segment, peer_writes=peer_writes)
        self._streams: list[socket.socket] = []
        self._revoked = False
        self._offer = _no_offer
        with lock:
            directory.add_claims(self._claims)

    def _new_server(self, pool: Memory, ledger: Segment, claims: Segment, *, peer_writes: bool) -> TcpServer:
        return TcpServer(pool, self._directory.segment, ledger, claims, peer_writes)

    def _begin_serving(self) -> None:
        """Count a thread that is about to serve; the lock is held."""
        self._claims.enter()

    def _end_serving(self) -> None:
        """Count a thread that serves nothing any more."""
        self._claims.leave()

    def serve(self, descriptor: int) -> None:
        stream = socket.socket(fileno=descriptor)
        with self._lock:
            self._streams = [other for other in self._streams if other.fileno() >= 0]
            refused = self._revoked or len(self._streams) >= MAX_STREAMS
            if not refused:
                self._streams.append(stream)
                self._begin_serving()
        if refused:
            stream.close()
            return
        stream.setblocking(False)
        self._threads.start(stream, self._server.serve, self._end_serving)

    def offer_by(self, offer: Callable[[], None]) -> None:
        self._offer = offer

    def offer_channel(self) -> None:
        self._offer()

    @property
    def busy(self) -> bool:
        return not self._revoked and self._claims.busy

    def revoke(self) -> None:
        with self._lock:
            if self._revoked:
                return
            self._revoked = True
            streams, self._streams = self._streams, []
            self._directory.drop_claims(self._claims)  # and closes them, once no thread touches anything any more
        for stream in streams:
            self._threads.stop(stream)


def _no_offer() -> None:
    """Do nothing: only the client of a link makes connections."""


def detached(connection: socket.socket) -> int:
    """Give the descriptor of a connection, which the caller owns then."""
    connection.setblocking(False)
    return connection.detach()


def close_all(connections: list[socket.socket]) -> None:
    """Close connections of a set-up that failed."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.close()
