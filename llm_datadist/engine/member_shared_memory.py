"""How two members of one host make their link, on a Unix socket: each sends the other what it maps."""

from __future__ import annotations

import socket
import time

from llm_datadist.control.messages import MemberHello
from llm_datadist.control.stream import send_message
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Link
from llm_datadist.engine.member_handshake import Place, answer_of, expect_word, introduce
from llm_datadist.engine.steps import Steps
from llm_datadist.engine.transport_choice import SAME_HOST
from llm_datadist.transports import rendezvous, shared_memory


def join(connection: socket.socket, place: Place, hello: MemberHello, grants: Grants) -> Steps[Link]:
    """Make a link with the member of lower rank at the other end.

    Raises
    ------
    NobodyThere, MemberRefused
        As `llm_datadist.engine.member_handshake.introduce`.
    OSError, ValueError
        The other member was lost, or is none of ours.
    """
    answer = yield from introduce(connection, place, hello)
    granted = yield from _descriptors(connection, rendezvous.GRANTED)
    end = shared_memory.attach(granted, pool_writable=True, connection=connection)
    grant = None
    try:
        grant = grants.shared_memory(True)
        grant.send(connection, rendezvous.MAPPED)
        yield from expect_word(connection, rendezvous.LINKED)
    except BaseException:
        end.close(time.monotonic_ns())
        if grant is not None:
            grant.revoke()
        raise
    return place.made(answer.token, answer.instance, end, grant, connection, answer.reason)


def accept(
    connection: socket.socket, place: Place, hello: MemberHello, mine: MemberHello, grants: Grants
) -> Steps[Link]:
    """Make a link with the member of higher rank that has said `hello`; `mine` is what this process would say.

    Raises
    ------
    OSError, ValueError
        The other member was lost, or is none of ours.
    """
    answer = answer_of(mine, shared_memory.NAME, SAME_HOST)
    send_message(connection, answer)
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
    return place.made(answer.token, hello.instance, end, grant, connection, answer.reason)


def _descriptors(connection: socket.socket, step: bytes) -> Steps[list[int]]:
    while True:
        try:
            return rendezvous.receive_descriptors(connection, step, shared_memory.NUM_DESCRIPTORS)
        except BlockingIOError:
            yield None
