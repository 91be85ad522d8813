"""Messages on a stream socket that does not block: the length, then the message.

Reading is a generator that yields whenever nothing more has arrived, and takes not one byte beyond its message: what
follows may carry descriptors, which are lost when their byte is read in another way.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Generator

from llm_datadist.control.messages import Message, MessageError, decode, encode

MAX_FRAME_BYTES = 8192

_LENGTH = struct.Struct("!I")


def send_message(connection: socket.socket, message: Message) -> None:
    """Send a message; OSError (also BlockingIOError: the peer reads nothing) if it cannot be sent whole."""
    data = encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_message(connection: socket.socket) -> Generator[None, None, Message]:
    """Receive a message.

    Raises
    ------
    MessageError
        It is too long or not readable.
    OSError
        The peer closed the connection.
    """
    (length,) = _LENGTH.unpack((yield from _receive_exactly(connection, _LENGTH.size)))
    if length > MAX_FRAME_BYTES:
        raise MessageError(f"a message of {length} bytes is announced, at most {MAX_FRAME_BYTES} are read")
    return decode((yield from _receive_exactly(connection, length)))


def _receive_exactly(connection: socket.socket, count: int) -> Generator[None, None, bytes]:
    data = b""
    while len(data) < count:
        try:
            piece = connection.recv(count - len(data))
        except BlockingIOError:
            yield
            continue
        if not piece:
            raise ConnectionError("the peer closed the connection")
        data += piece
    return data
