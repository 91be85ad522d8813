"""How two members of a communicator begin a link, and what it is when it is finished, over whatever transport.

The member of higher rank connects to the one of lower rank and says hello. That one accepts and says which transport
the link gets; `member_shared_memory` and `member_tcp` have what follows. All halves are generators that run in the
control thread: they yield whenever they wait for the other side, and return the finished link.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

from llm_datadist.control.messages import MemberAccept, MemberHello, MessageError, Refuse
from llm_datadist.control.stream import receive_message, send_message
from llm_datadist.engine.link import Link
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.engine.steps import Steps
from llm_datadist.transports import rendezvous
from llm_datadist.transports.base import End, Grant


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

    def made(
        self, token: bytes, instance: bytes, end: End, grant: Grant, connection: socket.socket, reason: str
    ) -> Link:
        """Put a link together; the instance is that of the other member."""
        link = Link(
            self.cluster_id, token, instance, end, grant, connection, communicator=self.communicator, reason=reason
        )
        link.status.handle(LinkEvent.MADE)
        return link


class NobodyThere(Exception):
    """The other member said nothing before the connection ended, if there was one: it is not ready, or gone again."""


class MemberRefused(Exception):
    """The two members do not agree; the text is for both."""


def introduce(connection: socket.socket, place: Place, hello: MemberHello) -> Steps[MemberAccept]:
    """Say hello to the member of lower rank, and give its answer.

    Raises
    ------
    NobodyThere
        Nothing was said, nothing is lost.
    MemberRefused
        Trying again is of no use.
    MessageError
        The other side is none of ours.
    """
    try:
        send_message(connection, hello)
        answer = yield from receive_message(connection)
    except OSError as error:
        raise NobodyThere(str(error)) from error
    if isinstance(answer, Refuse):
        raise MemberRefused(answer.reason)
    if not isinstance(answer, MemberAccept) or len(answer.token) != rendezvous.TOKEN_BYTES:
        raise MessageError(f"unexpected answer {answer!r}")
    if (answer.cluster_id, answer.rank) != (place.cluster_id, place.rank):
        raise MessageError(f"cluster {answer.cluster_id} answers as rank {answer.rank}")
    if answer.transport not in hello.transports:
        raise MessageError(f"rank {answer.rank} chose {answer.transport!r}, the offers were {hello.transports}")
    return answer


def answer_of(mine: MemberHello, transport: str, reason: str) -> MemberAccept:
    """Make the answer of this process, which would say `mine`, to a member that has said hello; with a new token."""
    return MemberAccept(mine.cluster_id, mine.rank, mine.instance, rendezvous.new_token(), transport, reason)


def expect_word(connection: socket.socket, word: bytes) -> Steps[None]:
    """Wait for a word of the other member; raises OSError if it says another one, or is lost."""
    while True:
        try:
            heard = connection.recv(1)
        except BlockingIOError:
            yield None
            continue
        if heard != word:
            raise ConnectionError("the other member gave the link up during the handshake")
        return
