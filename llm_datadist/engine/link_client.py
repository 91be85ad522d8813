"""The client's half of link messages: set a link up, ask the server to take it down, probe it."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from typing import Callable

import zmq

from llm_datadist.control.client import NoAnswer, Unreachable, request
from llm_datadist.control.messages import (
    Accept,
    Hello,
    Message,
    MessageError,
    Probe,
    ProbeAnswer,
    Refuse,
    Unlink,
    Unlinked,
)
from llm_datadist.engine.link import ClusterAddress, Identity, Link
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode, code_2_status
from llm_datadist.transports import rendezvous, shared_memory

_log = logging.getLogger("llm_datadist.link")


# Makes this side's grant for one link; the argument says whether the peer will push into the pool.
MakeGrant = Callable[[bool], shared_memory.SharedMemoryGrant]


class LinkRefused(Exception):
    """A link was not made; carries the status for the caller, and whether the server itself has said so."""

    def __init__(self, code: LLMStatusCode, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.is_final = is_final


def address_text(ip: int) -> str:
    """Dotted text of an address in its little-endian integer form."""
    return socket.inet_ntoa(struct.pack("<I", ip))


class LinkClient:
    """Speaks to servers over ZeroMQ and, once accepted, over their Unix socket.

    Parameters
    ----------
    context : zmq.Context
        Makes the sockets of requests.
    identity : Identity
        Of this process.
    make_grant : callable
        Makes what the server may reach.

    Notes
    -----
    Every method blocks its thread until the answer or the deadline (clock of ``time.monotonic``), and holds no state:
    it may be used from several threads.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], identity: Identity, make_grant: MakeGrant) -> None:
        self._context = context
        self._identity = identity
        self._make_grant = make_grant

    def set_up(self, cluster: ClusterAddress, role: LLMRole, deadline: float) -> Link:
        """Make a link.

        Raises
        ------
        LinkRefused
            LLM_LINK_FAILED, LLM_WAIT_PROCESS_TIMEOUT, or what the server says; LLM_PROCESSING_LINK: it is linking to
            this process at the same moment, and its link comes first. Nothing is left open.
        """
        try:
            accept = self._introduce(cluster, role, deadline)
            return self._join(cluster, accept, deadline)
        except (NoAnswer, socket.timeout) as error:
            raise LinkRefused(LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, str(error)) from error
        except (Unreachable, MessageError, OSError, ValueError, rendezvous.ForeignProcess) as error:
            raise LinkRefused(LLMStatusCode.LLM_LINK_FAILED, str(error)) from error

    def _introduce(self, cluster: ClusterAddress, role: LLMRole, deadline: float) -> Accept:
        hello = Hello(
            cluster_id=self._identity.cluster_id,
            remote_cluster_id=cluster.remote_cluster_id,
            role=int(role),
            instance=self._identity.instance,
            host=self._identity.host,
            transports=[shared_memory.NAME],
            timeout_ms=max(1, int((deadline - time.monotonic()) * 1000)),
            cache_manager=self._identity.cache_manager,
        )
        answer = self._ask(cluster, hello, deadline)
        if isinstance(answer, Refuse):
            raise LinkRefused(code_2_status(answer.code), answer.reason, is_final=True)
        if not isinstance(answer, Accept) or len(answer.token) != rendezvous.TOKEN_BYTES:
            raise MessageError(f"unexpected answer {answer!r}")
        return answer

    def _join(self, cluster: ClusterAddress, accept: Accept, deadline: float) -> Link:
        connection = rendezvous.connect(accept.rendezvous, _left(deadline))
        puller = grant = None
        try:
            connection.sendall(accept.token)
            connection.settimeout(_left(deadline))
            granted = rendezvous.receive_descriptors(connection, rendezvous.GRANTED, shared_memory.NUM_DESCRIPTORS)
            private = connection if self._identity.cache_manager else None
            puller = shared_memory.attach(granted, pool_writable=self._identity.cache_manager, connection=private)
            grant = self._make_grant(True)
            grant.send(connection, rendezvous.MAPPED)
            connection.settimeout(_left(deadline))
            word = connection.recv(1)
            if word == rendezvous.CROSSED:
                raise LinkRefused(LLMStatusCode.LLM_PROCESSING_LINK, "the server is linking to this process")
            if word != rendezvous.LINKED:
                raise ConnectionError("the server gave the link up during the handshake")
            connection.setblocking(False)
        except BaseException:
            if puller is not None:
                puller.close(time.monotonic_ns())
            if grant is not None:
                grant.revoke()
            connection.close()
            raise
        link = Link(cluster.remote_cluster_id, accept.token, accept.instance, puller, grant, connection, cluster)
        link.status.handle(LinkEvent.MADE)
        return link

    def unlink(self, link: Link, deadline: float) -> LLMStatusCode:
        """Ask the server to take its side down, and tell what came of it.

        LLM_SUCCESS, LLM_LINK_BUSY, LLM_WAIT_PROCESS_TIMEOUT, or LLM_NOTIFY_PROMPT_UNLINK_FAILED when the server cannot
        be reached.
        """
        assert link.address is not None
        try:
            answer = self._ask(link.address, Unlink(self._identity.cluster_id, link.token), deadline)
        except NoAnswer as error:
            _log.warning("unlink of cluster %d: %s", link.cluster_id, error)
            return LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
        except (Unreachable, MessageError) as error:
            _log.warning("unlink of cluster %d: %s", link.cluster_id, error)
            return LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED
        if isinstance(answer, Unlinked):
            return code_2_status(answer.code)
        return LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED

    def probe(self, link: Link, deadline: float) -> bool:
        """Ask whether the server knows the link; raises `NoAnswer` or `Unreachable`."""
        assert link.address is not None
        answer = self._ask(link.address, Probe(self._identity.cluster_id, link.token), deadline)
        return isinstance(answer, ProbeAnswer) and answer.linked

    def _ask(self, cluster: ClusterAddress, message: Message, deadline: float) -> Message:
        ip, port = cluster.remote[0]
        return request(self._context, address_text(ip), port, message, deadline)


def new_instance() -> bytes:
    """Random name of this run of the process."""
    return os.urandom(16)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoAnswer("the handshake did not end in time")
    return left
