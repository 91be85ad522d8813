"""A driver's connection to one service: messages, and word of whether the service is there."""

from __future__ import annotations

import logging
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from llm_datadist import LLMRole
from llm_datadist.cluster import MemberInfo
from llm_datadist.tools.demo.network.heartbeat import set_heartbeat
from llm_datadist.tools.demo.network.labels import name_of
from llm_datadist.tools.demo.network.wire import MAX_MESSAGE_BYTES, WireError, decode, encode

_log = logging.getLogger("llm_datadist.demo")


class ServiceConnection:
    """A connection; its owner closes it.

    Parameters
    ----------
    context : zmq.Context
        Of the driver.
    member : MemberInfo
        What the service says about itself.
    endpoint : str
        Where it listens for drivers.

    Attributes
    ----------
    ready : bool
        Whether the service is connected.
    lost : bool
        Whether it was connected and is not any more; it stays so.
    """

    def __init__(self, context: zmq.Context[Any], member: MemberInfo, endpoint: str) -> None:
        self.member = member
        self.name = name_of(member)
        self.ready = False
        self.lost = False
        self.socket = context.socket(zmq.DEALER)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            set_heartbeat(self.socket)
            self.socket.linger = 0
            self.socket.maxmsgsize = MAX_MESSAGE_BYTES
            self.socket.immediate = True  # nothing waits in a queue for a service that is not there
            self.socket.ipv6 = "[" in endpoint
            self.socket.connect(endpoint)
        except BaseException:
            self.close()
            raise

    @property
    def role(self) -> LLMRole:
        """What the service does."""
        return self.member.role

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self.ready = False
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close()
            self.socket.close()

    def read_events(self) -> None:
        """Take note of whether the service is there."""
        while not self.lost and self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            self.ready = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self.lost = event == zmq.EVENT_DISCONNECTED

    def receive(self) -> list[Any]:
        """Give the messages that have arrived."""
        messages = []
        while self.socket.poll(0):
            data = self.socket.recv()
            try:
                messages.append(decode(data))
            except WireError as error:
                _log.warning("a message of %s that cannot be read was left out: %s", self.name, error)
        return messages

    def send(self, message: Any) -> bool:
        """Send a message; False if the service is not there or takes no more."""
        if self.socket.closed:
            return False
        try:
            self.socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True
