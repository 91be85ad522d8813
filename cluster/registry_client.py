"""Questions to a registry."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from llm_datadist.cluster.cluster_view import ClusterView
from llm_datadist.cluster.member_info import Change, MemberInfo
from llm_datadist.cluster.registry_address import parse_registry_address
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_messages import (
    INSTANCE_BYTES,
    Changes,
    Message,
    Order,
    OrderDone,
    Refused,
    Status,
    StatusReply,
)
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode, code_2_status

_HOLD_MS = 10_000


class RegistryRefused(LLMException):
    """A registry did not do what it was asked for; LLM_FAILED.

    Attributes
    ----------
    code : str
        Why, as one of the words of the protocol, such as ``"taken"``.
    """

    def __init__(self, refused: Refused) -> None:
        super().__init__(
            f"the registry refused ({refused.code}): {refused.reason}", status_code=LLMStatusCode.LLM_FAILED
        )
        self.code = refused.code
        self._refused = refused

    def __reduce__(self) -> tuple[type[RegistryRefused], tuple[Refused]]:
        """Pickle it, so that one process can tell another."""
        return type(self), (self._refused,)


class RegistryStatus(NamedTuple):
    """What a registry says about itself.

    Attributes
    ----------
    members : int
        Members that it knows.
    revision : int
        Changes since it was started.
    uptime_s : float
        Seconds since then.
    requests, unreadable : int
        Messages that it got, and those among them that it could not read.
    """

    members: int
    revision: int
    uptime_s: float
    requests: int
    unreadable: int


class RegistryClient:
    """Looks at a cluster from outside; a context manager.

    The first call connects. The registry may be started later, or again: calls wait for it, up to their timeout.

    Parameters
    ----------
    address : str
        ``tcp://host:port``.

    Raises
    ------
    TypeError, ValueError
        `address` cannot be read.
    """

    def __init__(self, address: str) -> None:
        self._connection = RegistryConnection(parse_registry_address(address))

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._connection.close()

    def members(
        self, role: LLMRole | None = None, labels: dict[str, str] | None = None, timeout_s: float = 5.0
    ) -> list[MemberInfo]:
        """List the members, by cluster id.

        Parameters
        ----------
        role : LLMRole, optional
            Only those of this role.
        labels : dict of str to str, optional
            Only those with all of these labels.
        timeout_s : float
            Seconds for the whole call.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: no answer in time.
        """
        view, deadline = ClusterView(), time.monotonic() + timeout_s
        while not view.is_complete:
            self._look(view, role, labels, 0, deadline)
        return [view.members[cluster_id] for cluster_id in sorted(view.members)]

    def watch(
        self, role: LLMRole | None = None, labels: dict[str, str] | None = None, timeout_s: float = 60.0
    ) -> Iterator[Change]:
        """Give the members as changes of kind JOIN, then every change as it comes, until `timeout_s` is over.

        A member that does not have the role and the labels any more leaves. While the registry is away nothing comes.
        """
        view, deadline = ClusterView(), time.monotonic() + timeout_s
        while (now := time.monotonic()) < deadline:
            yield from view.expire(now)
            hold_s = min(deadline, view.next_expiry() or deadline, now + _HOLD_MS / 1000) - now
            try:
                changes = self._look(view, role, labels, max(1, int(hold_s * 1000)), deadline)
            except LLMException as error:
                if error.status_code is not LLMStatusCode.LLM_TIMEOUT:
                    raise
                return
            yield from changes

    def status(self, timeout_s: float = 5.0) -> RegistryStatus:
        """Ask the registry about itself.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: no answer in time.
        """
        reply = self._ask(Status(), timeout_s)
        if not isinstance(reply, StatusReply):
            raise _unexpected(reply)
        return RegistryStatus(reply.members, reply.revision, reply.uptime_ms / 1000, reply.requests, reply.unreadable)

    def switch_role(self, cluster_id: int, role: LLMRole, listen_ip_info: str = "", timeout_s: float = 60.0) -> str:
        """Have a member switch its role, and wait until it has.

        Parameters
        ----------
        cluster_id : int
            Who.
        role : LLMRole
            Its new role.
        listen_ip_info : str
            Where it listens as PROMPT, ``ip:port``; empty: where it was told to when it was made.
        timeout_s : float
            Seconds for the whole switch.

        Returns
        -------
        str
            What the member says about it.

        Raises
        ------
        LLMException
            The status code of `ClusterMember.switch_role` in the member. LLM_FAILED: there is no such member, or it has
            ended. LLM_TIMEOUT: no answer in time; the switch may still happen.
        """
        name = secrets.token_bytes(INSTANCE_BYTES)
        reply = self._ask(Order(name, cluster_id, int(role), listen_ip_info, int(timeout_s * 1000)), timeout_s)
        if not isinstance(reply, OrderDone):
            raise _unexpected(reply)
        if reply.code != LLMStatusCode.LLM_SUCCESS:
            raise LLMException(f"cluster {cluster_id}: {reply.reason}", status_code=code_2_status(reply.code))
        return reply.reason

    def _look(
        self, view: ClusterView, role: LLMRole | None, labels: dict[str, str] | None, hold_ms: int, deadline: float
    ) -> list[Change]:
        question = view.next_look(0 if role is None else int(role), labels or {}, hold_ms)
        reply = self._ask(question, max(0.0, deadline - time.monotonic()) + (0.5 if hold_ms else 0.0))
        if not isinstance(reply, Changes):
            raise _unexpected(reply)
        return view.apply(reply, time.monotonic())

    def _ask(self, message: Message, timeout_s: float) -> Message:
        reply = self._connection.ask(message, timeout_s)
        if isinstance(reply, Refused):
            raise RegistryRefused(reply)
        return reply


def _unexpected(reply: Message) -> LLMException:
    return LLMException(f"unexpected answer of the registry: {reply!r:.200}", status_code=LLMStatusCode.LLM_FAILED)
