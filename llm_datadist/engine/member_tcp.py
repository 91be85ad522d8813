"""How two members that share no memory make their link, with data connections over TCP.

The connection on which the member of higher rank says hello becomes that of the link. When it is accepted, it makes a
data connection for each direction to the same address, and says so; the other one has taken them then and answers that
the link stands.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Callable

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import MemberHello, MessageError
from llm_datadist.control.stream import send_message
from llm_datadist.engine.dialer import Dialer
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Link
from llm_datadist.engine.meeting_places import Address
from llm_datadist.engine.meeting_points import MeetingPoints
from llm_datadist.engine.member_handshake import NobodyThere, Place, answer_of, expect_word, introduce
from llm_datadist.engine.set_ups import ask_for_channel, take_stream
from llm_datadist.engine.steps import WRITABLE, Steps
from llm_datadist.transports import rendezvous, shared_memory, tcp
from llm_datadist.transports.base import End

_SECONDS = 5.0  # for one connection to be made


class ComeToUnixSocket(Exception):
    """The other member is on this host, and memory can be shared."""


class MemberTcp:
    """Makes the handshakes over TCP of all communicators of a process.

    Parameters
    ----------
    loop : ControlLoop
        Watches connections and the clock.
    grants : Grants
        Makes what a member may reach.
    points : MeetingPoints
        Take the connections of others.
    """

    def __init__(self, loop: ControlLoop, grants: Grants, points: MeetingPoints) -> None:
        self.points = points
        self._loop = loop
        self._grants = grants

    def call(
        self, connection: socket.socket, address: Address, meeting: bytes, hello: MemberHello, wake: Callable[[], None]
    ) -> Steps[None]:
        """Let a member of higher rank know that this one is there; raises OSError if it is not."""
        yield from self._reach(connection, address, meeting, wake)
        send_message(connection, hello)

    def join(
        self,
        connection: socket.socket,
        address: Address,
        meeting: bytes,
        place: Place,
        hello: MemberHello,
        wake: Callable[[], None],
    ) -> Steps[Link]:
        """Make a link with a member of lower rank.

        Parameters
        ----------
        connection : socket
            A new one that does not block.
        address : (str, int)
            Where the other member waits.
        meeting : bytes
            Names the communicator.
        place : Place
            Of the link.
        hello : MemberHello
            To be said.
        wake : callable
            Resumes the steps.

        Raises
        ------
        ComeToUnixSocket
            There, a link is possible and a better one.
        NobodyThere, MemberRefused
            As `llm_datadist.engine.member_handshake.introduce`.
        OSError, ValueError
            The other member was lost, or is none of ours.
        """
        try:
            yield from self._reach(connection, address, meeting, wake)
        except OSError as error:
            raise NobodyThere(error.strerror or str(error)) from error
        answer = yield from introduce(connection, place, hello)
        if answer.transport == shared_memory.NAME:
            raise ComeToUnixSocket
        dialer = Dialer(self._loop, address, answer.token)
        end, grant = self._grants.data_link(dialer.dial_forward, dialer.close, peer_writes=True)
        grant.offer_by(dialer.dial_reverse)
        dialer.serve(end, grant)
        try:
            yield from _both_ways(connection, dialer, wake)
            yield from self._prepare(connection, end, wake)
            connection.send(rendezvous.MAPPED)
            yield from expect_word(connection, rendezvous.LINKED)
        except BaseException:
            end.close(time.monotonic_ns())
            grant.revoke()
            raise
        return place.made(answer.token, answer.instance, end, grant, connection, answer.reason)

    def accept(
        self, connection: socket.socket, place: Place, hello: MemberHello, mine: MemberHello, reason: str
    ) -> Steps[Link]:
        """Make a link with the member of higher rank that has said `hello`; `mine` is what this process would say.

        Raises
        ------
        OSError, ValueError
            The other member was lost, or is none of ours.
        """
        answer = answer_of(mine, self._grants.data_transport, reason)
        end, grant = self._grants.data_link(lambda: ask_for_channel(connection), peer_writes=True)
        taken = set()

        def on_stream(stream: socket.socket, purpose: bytes) -> None:
            take_stream(stream, purpose, end, grant)
            taken.add(purpose)

        try:
            tcp.tune(connection)
            with self.points.expecting(answer.token, on_stream):
                send_message(connection, answer)
                yield from expect_word(connection, rendezvous.MAPPED)
            if len(taken) < 2:
                raise ConnectionError("the other member has not made its data connections")
            connection.send(rendezvous.LINKED)
        except BaseException:
            end.close(time.monotonic_ns())
            grant.revoke()
            raise
        return place.made(answer.token, hello.instance, end, grant, connection, answer.reason)

    def _prepare(self, connection: socket.socket, end: End, wake: Callable[[], None]) -> Steps[None]:
        """Have everything that transfers need; raises OSError if that is not to be had."""
        ended: list[bool] = []

        def on_end() -> None:
            ended.append(True)
            self._loop.call(wake)

        end.begin_preparing(on_end)
        while not ended:
            yield None
            _require_silence(connection)
        end.prepare(time.monotonic_ns())

    def _reach(
        self, connection: socket.socket, address: Address, meeting: bytes, wake: Callable[[], None]
    ) -> Steps[None]:
        """Connect, and say whom this is for; raises OSError."""
        give_up = time.monotonic() + _SECONDS
        code = connection.connect_ex(address)
        if code == errno.EINPROGRESS:
            self._loop.at(give_up, wake)
            yield WRITABLE
            code = _outcome(connection)
            while code == errno.ENOTCONN and time.monotonic() < give_up:
                yield WRITABLE
                code = _outcome(connection)
        if code == errno.ENOTCONN:
            raise socket.timeout(f"no answer within {_SECONDS:g} s")
        if code:
            raise OSError(code, os.strerror(code))
        if connection.getsockname() == connection.getpeername():
            # The system gave this end the very port at which nobody listens now, and so it has reached itself.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        tcp.tune(connection)
        connection.send(tcp.preamble(meeting, tcp.MEMBER))


def _outcome(connection: socket.socket) -> int:
    """Tell whether a connection is made: 0, ENOTCONN = not yet, or what went wrong."""
    code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return code
    try:
        connection.getpeername()
    except OSError as error:
        return error.errno or errno.ENOTCONN
    return 0


def _both_ways(connection: socket.socket, dialer: Dialer, wake: Callable[[], None]) -> Steps[None]:
    """Make a data connection for each direction; raises OSError if that fails."""
    ended: list[OSError | None] = []

    def on_end(error: OSError | None) -> None:
        ended.append(error)
        wake()

    dialer.dial_both(on_end)
    while not ended:
        yield None
        _require_silence(connection)
    if ended[0] is not None:
        raise ended[0]


def _require_silence(connection: socket.socket) -> None:
    """Raise unless the other side waits, as it should."""
    try:
        said = connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return
    if said:
        raise MessageError(f"the other member said {said!r} before its turn")
    raise ConnectionError("the other member gave the link up during the handshake")
