"""What one process says about itself at the registry, and the lease that keeps it there.

The lease is renewed at a third of its time. A registry that has been started again does not know the member any more,
and is told again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

from llm_datadist.cluster.registry_client import RegistryRefused
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_messages import (
    REFUSED_TAKEN,
    REFUSED_UNKNOWN,
    Announce,
    Granted,
    Message,
    Refused,
    Renew,
    Withdraw,
)
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.cluster")

_TRY_AGAIN_S = 0.25


class Announcement:
    """A place in the registry.

    Parameters
    ----------
    connection : RegistryConnection
        To the registry.
    first : Announce
        What to say; nothing is said before `put`.
    """

    def __init__(self, connection: RegistryConnection, first: Announce) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # guards the three below
        self._said = first
        self._is_out = False
        self._renewing = False
        self._lease_s = first.lease_ms / 1000
        connection.on_connected(self._renew)

    @property
    def said(self) -> Announce:
        """What was said last."""
        with self._lock:
            return self._said

    @property
    def is_out(self) -> bool:
        """Whether the process has announced itself and has not withdrawn."""
        with self._lock:
            return self._is_out

    def put(self, changes: Mapping[str, object], timeout_s: float, keep: bool = False) -> None:
        """Say something else and wait until the registry knows it; it is said again by itself from now on.

        While another process has the cluster id, it is tried again. With `keep` a refusal changes nothing about what is
        to be said: it is a fact.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: no answer in time; it will be said when the registry is there. LLM_FAILED: the registry
            refused, or the cluster id belongs to another process; then it is not said any more.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            before, was_out = self._said, self._is_out
            self._said = replace(before, version=before.version + 1, **changes)  # type: ignore[arg-type]
            self._is_out = True
            said = self._said
        while True:
            try:
                reply = self._connection.ask(said, max(0.0, deadline - time.monotonic()))
            except LLMException:
                self._keep_renewing()
                raise
            if isinstance(reply, Granted):
                self._lease_s = reply.lease_ms / 1000
                self._keep_renewing()
                return
            if not isinstance(reply, Refused):
                raise LLMException(f"unexpected answer: {reply!r:.200}", status_code=LLMStatusCode.LLM_FAILED)
            if reply.code != REFUSED_TAKEN or time.monotonic() + _TRY_AGAIN_S >= deadline:
                if not keep:  # take it back; the version still grows
                    with self._lock:
                        self._said = replace(before, version=self._said.version)
                        self._is_out = was_out
                raise RegistryRefused(reply)
            threading.Event().wait(_TRY_AGAIN_S)

    def see_token(self, token: int) -> None:
        """Remember the highest fencing token, so that a registry that is started again goes on above it."""
        with self._lock:
            if token > self._said.seen_token:
                self._said = replace(self._said, seen_token=token)

    def withdraw(self, timeout_s: float) -> None:
        """Leave; without an answer of the registry the lease ends by itself."""
        with self._lock:
            said, was_out = self._said, self._is_out
            self._is_out = False
        if not was_out:
            return
        try:
            self._connection.ask(Withdraw(said.cluster_id, said.instance), timeout_s)
        except LLMException as error:
            _log.warning("cluster %d could not withdraw, its lease will end: %s", said.cluster_id, error)

    # ---- in the thread of the connection

    def _keep_renewing(self) -> None:
        with self._lock:
            if self._renewing:
                return
            self._renewing = True
        self._next()

    def _next(self) -> None:
        self._connection.at(time.monotonic() + self._lease_s / 3, self._renew_and_go_on)

    def _renew_and_go_on(self) -> None:
        with self._lock:
            self._renewing = self._is_out
        if self._renewing:
            self._renew()
            self._next()

    def _renew(self) -> None:
        with self._lock:
            said = self._said
            if not self._is_out:
                return
        # An answer that comes after the lease has ended is of no use.
        answer = self._connection.request(Renew(said.cluster_id, said.instance), self._lease_s)
        answer.add_done_callback(self._renewed)

    def _renewed(self, answer: Future[Message]) -> None:
        reply = _reply(answer)
        if isinstance(reply, Refused) and reply.code == REFUSED_UNKNOWN and self.is_out:
            said = self.said
            _log.info("the registry does not know cluster %d any more, announcing it again", said.cluster_id)
            self._connection.request(said, self._lease_s).add_done_callback(self._announced)

    def _announced(self, answer: Future[Message]) -> None:
        reply = _reply(answer)
        if isinstance(reply, Granted):
            self._lease_s = reply.lease_ms / 1000
        elif isinstance(reply, Refused):  # tried again with the next renewal
            _log.error("cluster %d cannot be announced again: %s", self.said.cluster_id, reply.reason)


def _reply(answer: Future[Message]) -> Message | None:
    error = answer.exception()
    if error is not None:
        _log.warning("a lease could not be renewed: %s", error)
        return None
    return answer.result()
