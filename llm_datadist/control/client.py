"""One question to a server and its answer, under a deadline."""

from __future__ import annotations

import math
import socket
import time

import zmq

from llm_datadist.control.messages import Message, decode, encode


class Unreachable(Exception):
    """Nobody listens at the address."""


class NoAnswer(Exception):
    """The deadline passed before an answer came."""


def request(
    context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, message: Message, deadline: float
) -> Message:
    """Send a message and wait for the reply.

    Parameters
    ----------
    context : zmq.Context
        Makes the DEALER socket, which lives for this one call.
    host, port : str, int
        Address of the server.
    message : Message
        What to send.
    deadline : float
        On the clock of ``time.monotonic``.

    Raises
    ------
    Unreachable
        The connection is refused, or the address has no route: known at once, long before the deadline. Or this
        process finalizes.
    NoAnswer
        The deadline passed.
    MessageError
        The answer is no message.
    """
    _probe(host, port, deadline)
    try:
        return _exchange(context, host, port, message, deadline)
    except zmq.ZMQError as error:
        # The context is terminated under a call that runs while its process finalizes.
        raise Unreachable(f"cannot ask {host}:{port}: {error.strerror}") from error


def endpoint(host: str, port: int) -> str:
    """Give the name that ZeroMQ has for an address; IPv6 stands in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _exchange(
    context: zmq.Context[zmq.Socket[bytes]], host: str, port: int, message: Message, deadline: float
) -> Message:
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.linger = 0
        dealer.ipv6 = ":" in host
        dealer.connect(endpoint(host, port))
        dealer.send(encode(message))
        left_ms = math.ceil((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not dealer.poll(left_ms, zmq.POLLIN):
            raise NoAnswer(f"no answer from {host}:{port} in time")
        return decode(dealer.recv())
    finally:
        dealer.close()


def _probe(host: str, port: int, deadline: float) -> None:
    """Connect and close again: ZeroMQ itself would go on trying an address that refuses."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoAnswer(f"no time left to connect to {host}:{port}")
    try:
        socket.create_connection((host, port), timeout=left).close()
    except socket.timeout as error:
        raise NoAnswer(f"no connection to {host}:{port} in time") from error
    except OSError as error:
        raise Unreachable(f"cannot connect to {host}:{port}: {error.strerror or error}") from error
