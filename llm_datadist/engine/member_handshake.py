"""How two members of a communicator make their link, on a Unix socket between them.

The member of higher rank connects to the one of lower rank and says hello. That one accepts, and then each sends the
other the descriptors of what it may reach, as a client and a server do. Both halves are generators that run in the
control thread: they yield whenever they wait for the other side, and return the finished link.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Generator
from typing import NamedTuple, TypeVar

from llm_datadist.control.messages import MemberAccept, MemberHello, MessageError, Refuse
from llm_datadist.control.stream import receive_message, send_message
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Link
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.transports import rendezvous, shared_memory

_Result = TypeVar("_Result")

Steps = Generator[None, None, _Result]


class Place(NamedTuple):
    """What a link of a communicator belongs to.

    Attributes
    ----------
    communicator : int
        Its id in this process.
    cluster_id, rank : int
        Of the other member.
    """

    communicator: int
    cluster_id: int
    rank: int


class NobodyThere(Exception):
    """The other member closed the connection before it said anything: it is not ready, or not there any more."""


class MemberRefused(Exception):
    """The two members do not agree; the text is for both."""


def join(connection: socket.socket, place: Place, hello: MemberHello, grants: Grants) -> Steps[Link]:
    """Make a link with the member of lower rank at the other end.

    Raises
    ------
    NobodyThere
        Nothing was said, nothing is lost.
    MemberRefused
        Trying again is of no use.
    OSError, ValueError
        The other member was lost, or is none of ours.
    """
    try:
        send_message(connection, hello)
        answer = yield from receive_message(connection)
    except OSError as error:
        raise NobodyThere(str(error)) from error
    if isinstance(answer, Refuse):
        raise MemberRefused(answer.reason)
    if not isinstance(answer, MemberAccept):
        raise MessageError(f"unexpected answer {answer!r}")
    if (answer.cluster_id, answer.rank) != (place.cluster_id, place.rank):
        raise MessageError(f"cluster {answer.cluster_id} answers as rank {answer.rank}")
    granted = yield from _descriptors(connection, rendezvous.GRANTED)
    end = shared_memory.attach(granted, pool_writable=True, connection=connection)
    grant = None
    try:
        grant = grants.shared_memory(True)
        grant.send(connection, rendezvous.MAPPED)
        if (yield from _word(connection)) != rendezvous.LINKED:
            raise ConnectionError("the other member gave the link up during the handshake")
    except BaseException:
        end.close(time.monotonic_ns())
        if grant is not None:
            grant.revoke()
        raise
    return _made(place, answer.token, answer.instance, end, grant, connection)


def accept(
    connection: socket.socket, place: Place, hello: MemberHello, mine: MemberHello, grants: Grants
) -> Steps[Link]:
    """Make a link with the member of higher rank that has said `hello`; `mine` is what this process would say.

    Raises
    ------
    OSError, ValueError
        The other member was lost, or is none of ours.
    """
    token = rendezvous.new_token()
    send_message(connection, MemberAccept(mine.cluster_id, mine.rank, mine.instance, token))
    grant = grants.shared_memory(True)
    try:
        grant.send(connection, rendezvous.GRANTED)
        granted = yield from _descriptors(connection, rendezvous.MAPPED)
        end = shared_memory.attach(granted, pool_writable=True, connection=connection)
    except BaseException:
        grant.revoke()
        raise
    try:
        connection.send(rendezvous.LINKED)
    except BaseException:
        end.close(time.monotonic_ns())
        grant.revoke()
        raise
    return _made(place, token, hello.instance, end, grant, connection)


def _made(
    place: Place,
    token: bytes,
    instance: bytes,
    end: shared_memory.SharedMemoryEnd,
    grant: shared_memory.SharedMemoryGrant,
    connection: socket.socket,
) -> Link:
    link = Link(place.cluster_id, token, instance, end, grant, connection, communicator=place.communicator)
    link.status.handle(LinkEvent.MADE)
    return link


def _descriptors(connection: socket.socket, step: bytes) -> Steps[list[int]]:
    while True:
        try:
            return rendezvous.receive_descriptors(connection, step, shared_memory.NUM_DESCRIPTORS)
        except BlockingIOError:
            yield


def _word(connection: socket.socket) -> Steps[bytes]:
    while True:
        try:
            return connection.recv(1)
        except BlockingIOError:
            yield
