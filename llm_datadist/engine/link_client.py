"""The client's half of link messages: set a link up, ask the server to take it down, probe it."""

from __future__ import annotations

import logging
import os
import socket
import struct
import time

from llm_datadist.control.client import NoAnswer, Unreachable, request
from llm_datadist.control.loop import ControlLoop
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
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import ClusterAddress, Identity, Link
from llm_datadist.engine.link_state import LinkEvent
from llm_datadist.engine.network import Network
from llm_datadist.engine.tcp_join import Joined, join
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode, code_2_status
from llm_datadist.transports import hccl, rendezvous, shared_memory, tcp

_log = logging.getLogger("llm_datadist.link")


class _NotMapped(Exception):
    """The memory of a peer on this host cannot be mapped; says why."""


class LinkRefused(Exception):
    """A link was not made; carries the status for the caller, and whether the server itself has said so."""

    def __init__(self, code: LLMStatusCode, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.is_final = is_final


def address_text(ip: int | str) -> str:
    """Text of an address: dotted if it is in its little-endian integer form; IPv6 is text already."""
    return socket.inet_ntoa(struct.pack("<I", ip)) if isinstance(ip, int) else ip


class LinkClient:
    """Speaks to servers over ZeroMQ and, once accepted, over their Unix socket or their data port.

    Parameters
    ----------
    loop : ControlLoop
        Has the context of requests; makes further data connections later.
    identity : Identity
        Of this process.
    grants : Grants
        Makes what the server may reach.
    network : Network
        Which transports may be used.

    Notes
    -----
    Every method blocks its thread until the answer or the deadline (clock of ``time.monotonic``), and holds no state:
    it may be used from several threads.
    """

    def __init__(self, loop: ControlLoop, identity: Identity, grants: Grants, network: Network) -> None:
        self._loop = loop
        self._identity = identity
        self._grants = grants
        self._network = network

    def set_up(self, cluster: ClusterAddress, role: LLMRole, deadline: float) -> Link:
        """Make a link.

        Raises
        ------
        LinkRefused
            LLM_LINK_FAILED, LLM_WAIT_PROCESS_TIMEOUT, or what the server says; LLM_PROCESSING_LINK: it is linking to
            this process at the same moment, and its link comes first. Nothing is left open.
        """
        offers, reason = list(self._network.transports), self._network.reason
        while True:
            try:
                accept = self._introduce(cluster, role, offers, reason, deadline)
                return self._join(cluster, accept, deadline)
            except (NoAnswer, socket.timeout) as error:
                raise LinkRefused(LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, str(error)) from error
            except _NotMapped as error:
                if tcp.NAME not in offers:
                    raise LinkRefused(LLMStatusCode.LLM_LINK_FAILED, str(error)) from error
                offers, reason = [tcp.NAME], str(error)
            except (Unreachable, MessageError, OSError, ValueError) as error:
                raise LinkRefused(LLMStatusCode.LLM_LINK_FAILED, str(error)) from error

    def _introduce(
        self, cluster: ClusterAddress, role: LLMRole, offers: list[str], reason: str, deadline: float
    ) -> Accept:
        hello = Hello(
            cluster_id=self._identity.cluster_id,
            remote_cluster_id=cluster.remote_cluster_id,
            role=int(role),
            instance=self._identity.instance,
            host=self._identity.host,
            transports=offers,
            reason=reason,
            timeout_ms=max(1, int((deadline - time.monotonic()) * 1000)),
            cache_manager=self._identity.cache_manager,
        )
        answer = self._ask(cluster, hello, deadline)
        if isinstance(answer, Refuse):
            raise LinkRefused(code_2_status(answer.code), answer.reason, is_final=True)
        if not isinstance(answer, Accept) or len(answer.token) != rendezvous.TOKEN_BYTES:
            raise MessageError(f"unexpected answer {answer!r}")
        if answer.transport not in offers:
            raise MessageError(f"the server chose {answer.transport!r}, the offers were {offers}")
        return answer

    def _join(self, cluster: ClusterAddress, accept: Accept, deadline: float) -> Link:
        if accept.transport == shared_memory.NAME:
            joined = self._join_shared_memory(accept, deadline)
        else:
            joined = self._join_data_port(cluster, accept, deadline)
        end, grant, connection = joined
        try:
            connection.settimeout(_left(deadline))
            word = connection.recv(1)
            if word == rendezvous.CROSSED:
                raise LinkRefused(LLMStatusCode.LLM_PROCESSING_LINK, "the server is linking to this process")
            if word != rendezvous.LINKED:
                raise ConnectionError("the server gave the link up during the handshake")
            connection.setblocking(False)
        except BaseException:
            _discard(joined)
            raise
        number = cluster.remote_cluster_id
        link = Link(number, accept.token, accept.instance, end, grant, connection, cluster, reason=accept.reason)
        link.status.handle(LinkEvent.MADE)
        return link

    def _join_shared_memory(self, accept: Accept, deadline: float) -> Joined:
        """Exchange what both sides map; raises `_NotMapped` if it cannot be mapped."""
        try:
            connection = rendezvous.connect(accept.rendezvous, _left(deadline))
        except rendezvous.ForeignProcess as error:
            raise _NotMapped(str(error)) from error
        puller = grant = None
        try:
            connection.sendall(accept.token)
            connection.settimeout(_left(deadline))
            granted = rendezvous.receive_descriptors(connection, rendezvous.GRANTED, shared_memory.NUM_DESCRIPTORS)
            private = connection if self._identity.cache_manager else None
            puller = _attach(granted, self._identity.cache_manager, private)
            grant = self._grants.shared_memory(True)
            grant.send(connection, rendezvous.MAPPED)
            return Joined(puller, grant, connection)
        except BaseException:
            if puller is not None:
                puller.close(time.monotonic_ns())
            if grant is not None:
                grant.revoke()
            connection.close()
            raise

    def _join_data_port(self, cluster: ClusterAddress, accept: Accept, deadline: float) -> Joined:
        host = accept.data_host or address_text(cluster.remote[0][0])
        one_sided = accept.transport == hccl.ONE_SIDED
        return join(self._loop, (host, accept.data_port), accept.token, self._grants, deadline, one_sided=one_sided)

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
        return request(self._loop.context, address_text(ip), port, message, deadline)


def new_instance() -> bytes:
    """Random name of this run of the process."""
    return os.urandom(16)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise NoAnswer("the handshake did not end in time")
    return left


def _attach(granted: list[int], both_ways: bool, private: socket.socket | None) -> shared_memory.SharedMemoryEnd:
    try:
        return shared_memory.attach(granted, pool_writable=both_ways, connection=private)
    except OSError as error:
        raise _NotMapped(f"the memory of the peer cannot be mapped: {error}") from error


def _discard(joined: Joined) -> None:
    joined.end.close(time.monotonic_ns())
    joined.grant.revoke()
    joined.connection.close()
