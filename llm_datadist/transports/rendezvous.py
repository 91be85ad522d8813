"""A Unix socket between two linked processes of one host: credentials, descriptors, and word of the other's death.

The name is abstract (it vanishes with its process) and random; the token that the handshake gave out says which link a
connection belongs to. The connection stays open as long as the link: the kernel closes it when a process dies.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct

TOKEN_BYTES = 16

# One byte each, in this order, on a connection that has sent its token.
GRANTED = b"G"  # server: its descriptors come with this byte
MAPPED = b"M"  # client: everything is mapped and checked; its own descriptors come with this byte
LINKED = b"L"  # server: everything is mapped and checked, the link is in its table
CHANNEL = b"D"  # either, at any time after that: a stream socket comes with it, for the data server of the other
CROSSED = b"X"  # server, instead of LINKED: this process is linking to the client itself, and its link comes first

# One byte each, at any time later, on the connection of a link in cache-manager mode.
UNLINK = b"U"  # please take the link down; answered by one of the following
BUSY = b"B"  # no: a transfer uses it
GONE = b"G"  # this side has given the link up; also without being asked

_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


class ForeignProcess(Exception):
    """The process at the other end runs as another user."""


def new_token() -> bytes:
    """Make a token that cannot be guessed."""
    return secrets.token_bytes(TOKEN_BYTES)


def host_identity() -> str:
    """Name of the host and network name space: equal in two processes exactly if they can meet on an abstract name."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot_id:
        return f"{boot_id.read().strip()}:{os.stat('/proc/self/ns/net').st_ino}"


def listen() -> tuple[socket.socket, str]:
    """Open a non-blocking listener on a fresh abstract name; returns it and the name without the leading null byte."""
    name = f"llm_datadist.{secrets.token_hex(16)}"
    return listen_at(name), name


def listen_at(name: str) -> socket.socket:
    """Open a non-blocking listener on an abstract name; OSError (EADDRINUSE) if somebody listens there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
        listener.listen(128)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(name: str, timeout_s: float) -> socket.socket:
    """Connect to a peer's abstract name; the socket keeps the timeout (0: it does not block, as the connect does not).

    Raises
    ------
    OSError
        Nobody listens there, or the timeout passed.
    ForeignProcess
        The listener runs as another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(f"\0{name}")
        require_same_user(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def accept(listener: socket.socket) -> socket.socket:
    """Take the next connection, non-blocking; raises `ForeignProcess` if another user has made it."""
    connection, _ = listener.accept()
    try:
        connection.setblocking(False)
        require_same_user(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def require_same_user(connection: socket.socket) -> None:
    """Check with the kernel who is at the other end; raises `ForeignProcess` unless it is our own user."""
    pid, uid = _credentials(connection)
    if uid != os.geteuid():
        raise ForeignProcess(f"process {pid} runs as user {uid}, memory is shared with user {os.geteuid()} only")


def open_process(connection: socket.socket) -> tuple[int, int]:
    """Give the number of the process at the other end, and a descriptor that tells when it has ended.

    0 and -1 where the kernel does not tell: the process is in a name space that this one does not see, or the kernel is
    older than Linux 5.3.
    """
    pid, _ = _credentials(connection)
    if pid <= 0:
        return 0, -1
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        return pid, -1


def _credentials(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end when the connection was made."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def send_descriptors(connection: socket.socket, step: bytes, descriptors: list[int]) -> None:
    """Send the byte of a step together with open descriptors."""
    socket.send_fds(connection, [step], descriptors)


def receive_descriptors(connection: socket.socket, step: bytes, count: int) -> list[int]:
    """Receive the byte of a step and exactly `count` descriptors, which the caller owns then.

    Raises
    ------
    OSError
        The timeout of the socket passed, or the peer closed it or sent something else.
    """
    data, descriptors, _, _ = socket.recv_fds(connection, 1, count, socket.MSG_CMSG_CLOEXEC)
    if data != step or len(descriptors) != count:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConnectionError(f"peer sent {data!r} with {len(descriptors)} descriptors, expected {count}")
    return list(descriptors)
