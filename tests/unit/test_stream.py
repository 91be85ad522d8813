"""Messages on a stream socket: in whatever pieces they come, and not a byte beyond them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from llm_datadist.control.messages import MessageError, Probe
from llm_datadist.control.stream import MAX_FRAME_BYTES, receive_message, send_message

PROBE = Probe(7, b"t" * 16)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    mine, other = socket.socketpair()
    mine.setblocking(False)
    with mine, other:
        yield mine, other


def test_nothing_beyond_the_message_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    mine, other = pair
    send_message(other, PROBE)
    other.send(b"rest")
    with pytest.raises(StopIteration) as end:
        next(receive_message(mine))
    assert end.value.value == PROBE
    assert mine.recv(10) == b"rest"


def test_a_message_may_come_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    mine, other = pair
    source, sink = socket.socketpair()
    with source, sink:
        send_message(source, PROBE)
        data = sink.recv(1000)
    reading = receive_message(mine)
    for number in range(len(data)):
        next(reading)
        other.send(data[number : number + 1])
    with pytest.raises(StopIteration) as end:
        next(reading)
    assert end.value.value == PROBE


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"", ConnectionError, "closed"),
        (b"\0\0", ConnectionError, "closed"),
        (struct.pack("!I", 10) + b"half", ConnectionError, "closed"),
        (struct.pack("!I", MAX_FRAME_BYTES + 1), MessageError, f"{MAX_FRAME_BYTES + 1} bytes"),
        (b"\xff" * 100, MessageError, "4294967295 bytes"),
        (struct.pack("!I", 0), MessageError, "not readable"),
        (struct.pack("!I", 5) + b"noise", MessageError, "not readable"),
    ],
)
def test_what_is_no_message(
    pair: tuple[socket.socket, socket.socket], data: bytes, error: type[Exception], text: str
) -> None:
    mine, other = pair
    other.send(data)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(error, match=text):
        next(receive_message(mine))
