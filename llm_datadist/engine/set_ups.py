"""The server's side of a link that a client is making: what each transport needs on the way.

Everything in here runs in the control thread. A set-up begins when the client comes with the token that it was given,
and is finished when the client says that it has what it needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time

from llm_datadist.control.messages import Hello
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity
from llm_datadist.engine.transport_choice import Choice
from llm_datadist.transports import hccl, rendezvous, shared_memory, tcp
from llm_datadist.transports.base import End, Grant

_log = logging.getLogger("llm_datadist.link")


class SetUp:
    """A link that a client is making, from the accepted Hello on.

    Parameters
    ----------
    hello : Hello
        What the client has said.
    token : bytes
        Names the link.
    choice : Choice
        Transport and why.
    deadline : float
        When it is given up, on the clock of ``time.monotonic``.
    """

    def __init__(self, hello: Hello, token: bytes, choice: Choice, deadline: float) -> None:
        self.hello = hello
        self.token = token
        self.choice = choice
        self.deadline = deadline
        self.connection: socket.socket | None = None
        self.grant: Grant | None = None

    def begin(self, connection: socket.socket, identity: Identity, grants: Grants) -> None:
        """Give the client what it may reach; raises OSError if it is gone."""
        raise NotImplementedError

    def finish(self, identity: Identity) -> End:
        """Take what the client grants.

        Raises
        ------
        BlockingIOError
            It has not come yet.
        OSError, ValueError
            The client gave up, or is none of ours.
        """
        raise NotImplementedError

    def say(self, word: bytes) -> None:
        """Say something to the client; it may be gone."""
        assert self.connection is not None
        try:
            self.connection.send(word)
        except OSError:  # the loop sees it close
            _log.info("cluster %d is gone before its link was finished", self.hello.cluster_id)

    def discard(self) -> None:
        """Give up what was given."""
        if self.connection is not None:
            self.connection.close()
        if self.grant is not None:
            self.grant.revoke()


class SharedMemorySetUp(SetUp):
    """Both sides send descriptors of what the other maps."""

    def begin(self, connection: socket.socket, identity: Identity, grants: Grants) -> None:
        self.connection = connection
        grant = grants.shared_memory(identity.cache_manager)
        self.grant = grant
        grant.send(connection, rendezvous.GRANTED)

    def finish(self, identity: Identity) -> End:
        assert self.connection is not None
        granted = rendezvous.receive_descriptors(self.connection, rendezvous.MAPPED, shared_memory.NUM_DESCRIPTORS)
        private = self.connection if identity.cache_manager else None
        return shared_memory.attach(granted, pool_writable=True, connection=private)


class DataSetUp(SetUp):
    """The client makes a data connection for each direction."""

    def __init__(self, hello: Hello, token: bytes, choice: Choice, deadline: float) -> None:
        super().__init__(hello, token, choice, deadline)
        self._end: End | None = None

    def begin(self, connection: socket.socket, identity: Identity, grants: Grants) -> None:
        self.connection = connection
        tcp.tune(connection)  # so that the kernel notices a client that vanishes while nothing moves
        self._end, self.grant = grants.data_link(
            lambda: ask_for_channel(connection),
            peer_writes=identity.cache_manager,
            one_sided=self.choice.transport == hccl.ONE_SIDED,
        )
        connection.send(rendezvous.GRANTED)

    def finish(self, identity: Identity) -> End:
        assert self.connection is not None
        assert self._end is not None
        word = self.connection.recv(1)
        if word != rendezvous.MAPPED:
            raise ConnectionError(f"it said {word!r}, expected {rendezvous.MAPPED!r}")
        return self._end

    def take(self, stream: socket.socket, purpose: bytes) -> None:
        """Take a data connection; closes it if there is no use for it."""
        if self._end is None or self.grant is None:
            stream.close()
        else:
            take_stream(stream, purpose, self._end, self.grant)

    def discard(self) -> None:
        super().discard()
        if self._end is not None:
            self._end.close(time.monotonic_ns())


def take_stream(stream: socket.socket, purpose: bytes, end: End, grant: Grant) -> None:
    """Take a data connection that a client has made; closes it if there is no use for it."""
    try:
        tcp.tune(stream)
        stream.send(tcp.READY)
    except OSError as error:
        _log.info("a data connection is gone already: %s", error)
        stream.close()
        return
    descriptor = stream.detach()
    if purpose == tcp.FORWARD:
        grant.serve(descriptor)
        return
    try:
        end.add_channel(descriptor)
    except ValueError as error:
        os.close(descriptor)
        _log.debug("a data connection is not needed: %s", error)


def ask_for_channel(connection: socket.socket) -> None:
    """Ask the side that makes data connections for another one."""
    with contextlib.suppress(OSError):  # the loop sees it close
        connection.send(rendezvous.CHANNEL)
