"""A role switch of one member, seen by the whole cluster.

1. WAITING    for the lock of the registry: one switch at a time, each with a fencing token.
2. DRAINING   is announced with the token. Peers let their transfers with this member end, begin no new ones, take down
              the links that they have opened, and say so. This member does the same with its own.
3. UNLINKING  takes down what is left, without force: a transfer is never cut off.
4. SWITCHING  calls ``LLMDataDist.switch_role``, if the lock is still held.
5. ANNOUNCING tells the new role and address; peers link again where it fits.
6. RELINKING  waits until this member has its own links again.

What fails before the role has changed is taken back: the member is announced as it was, and linked again. A member that
dies leaves nothing that a later switch would have to wait for longer than for its lease: its place in the registry and
the lock end with it, its peers open their gates, and a process that takes its id later begins afresh.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from enum import Enum

from llm_datadist.cluster.announcement import Announcement
from llm_datadist.cluster.cluster_watch import ClusterWatch
from llm_datadist.cluster.follower import Follower
from llm_datadist.cluster.member_info import DRAINING
from llm_datadist.cluster.peer_links import LINKED, PeerLinks
from llm_datadist.cluster.registry_client import RegistryRefused
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_locks import ROLE_SWITCH
from llm_datadist.cluster.registry_messages import REFUSED_HELD, Lock, Locked, Message, Refused, Unlock
from llm_datadist.cluster.transfer_gates import TransferGates
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.cluster")

_LOCK_MS = 5_000
_POLL_S = 0.02
_LOOK_S = 0.2  # between two looks whether the member closes
_ANSWER_S = 2.0
_PATIENCE = 0.5  # share of the time in which peers have to say that they have drained
_RELINK_S = 5.0


class SwitchPhase(Enum):
    """How far a role switch has come; see `role_switch`."""

    WAITING = "waiting"
    DRAINING = "draining"
    UNLINKING = "unlinking"
    SWITCHING = "switching"
    ANNOUNCING = "announcing"
    RELINKING = "relinking"


OnPhase = Callable[[SwitchPhase], None]


class SwitchLock:
    """The lock of the registry, kept by the thread of the connection until it is released."""

    def __init__(
        self, connection: RegistryConnection, cluster_id: int, instance: bytes, is_closing: threading.Event
    ) -> None:
        self._connection = connection
        self._is_closing = is_closing
        self._cluster_id = cluster_id
        self._instance = instance
        self._held = False
        self._drained: set[int] = set()  # also what a registry heard that was started again since then
        self.token = 0

    def take(self, deadline: float) -> None:
        """Wait for the lock; LLMException with LLM_TIMEOUT if it is not free in time."""
        while True:
            left_s = deadline - time.monotonic()
            question = self._question(max(0, int(left_s * 1000)))
            reply = self._wait(self._connection.request(question, max(left_s, 0.0) + _ANSWER_S))
            if isinstance(reply, Locked):
                self.token, self._held = reply.token, True
                self._keep_later(reply.lease_ms)
                return
            if not isinstance(reply, Refused):
                raise LLMException(f"unexpected answer: {reply!r:.200}", status_code=LLMStatusCode.LLM_FAILED)
            if reply.code != REFUSED_HELD:
                raise RegistryRefused(reply)
            if time.monotonic() >= deadline:
                reason = "another member was switching its role all the time, try again"
                raise LLMException(reason, status_code=LLMStatusCode.LLM_TIMEOUT)

    def _wait(self, answer: Future[Message]) -> Message:
        while not self._is_closing.is_set():
            try:
                return answer.result(_LOOK_S)
            except FutureTimeoutError:
                continue
        raise _closed()

    def drained(self, deadline: float) -> set[int]:
        """Give the ids of the members that have drained; the registry may be away until a deadline.

        Raises
        ------
        LLMException
            LLM_FAILED: the lock is lost. LLM_TIMEOUT: no answer.
        """
        reply = None
        if self._held:
            reply = self._wait(self._connection.request(self._question(0), max(_ANSWER_S, _left(deadline))))
        if not isinstance(reply, Locked):
            self._held = False
            reason = f"the lock with token {self.token} was lost: this process was held up for longer than its lease"
            raise LLMException(reason, status_code=LLMStatusCode.LLM_FAILED)
        self._drained.update(reply.drained)
        return self._drained

    def release(self) -> None:
        """Let the next one switch."""
        if not self._held:
            return
        self._held = False
        try:
            self._connection.ask(Unlock(ROLE_SWITCH, self._instance, self.token), _ANSWER_S)
        except LLMException as error:
            _log.warning("the lock could not be released, its lease will end: %s", error)

    def _question(self, wait_ms: int) -> Lock:
        return Lock(ROLE_SWITCH, self._cluster_id, self._instance, self.token, _LOCK_MS, wait_ms)

    def _keep_later(self, lease_ms: int) -> None:
        self._connection.at(time.monotonic() + lease_ms / 3000, lambda: self._keep(lease_ms))

    def _keep(self, lease_ms: int) -> None:
        if self._held:
            self._connection.request(self._question(0), lease_ms / 1000).add_done_callback(self._kept)
            self._keep_later(lease_ms)

    def _kept(self, answer: Future[Message]) -> None:
        if answer.exception() is None and isinstance(answer.result(), Refused) and self._held:
            _log.warning("the lock with token %d is lost: %s", self.token, answer.result())
            self._held = False


class RoleSwitch:
    """One switch.

    Parameters
    ----------
    connection, announcement, watch, gates, links, follower
        Of the member.
    change : callable
        Switches the role of the process, and gives what of its announcement is different then.
    on_phase : callable or None
        Told when a phase begins.
    is_closing : threading.Event
        Set when the member closes: a switch that has not changed the role yet is given up.
    """

    def __init__(
        self,
        connection: RegistryConnection,
        announcement: Announcement,
        watch: ClusterWatch,
        gates: TransferGates,
        links: PeerLinks,
        follower: Follower,
        change: Callable[[], dict[str, object]],
        on_phase: OnPhase | None,
        is_closing: threading.Event,
    ) -> None:
        self._announcement = announcement
        self._watch = watch
        self._gates = gates
        self._links = links
        self._follower = follower
        self._change = change
        self._on_phase = on_phase
        self._is_closing = is_closing
        said = announcement.said
        self._own_id = said.cluster_id
        self._lock = SwitchLock(connection, said.cluster_id, said.instance, is_closing)

    def run(self, timeout_s: float) -> None:
        """Switch; raises as ``ClusterMember.switch_role`` does."""
        deadline = time.monotonic() + timeout_s
        self._enter(SwitchPhase.WAITING)
        self._lock.take(deadline)
        try:
            self._run_locked(deadline)
        finally:
            self._lock.release()

    def _run_locked(self, deadline: float) -> None:
        before: dict[str, object] = {"state": self._announcement.said.state, "switch_token": 0}
        self._announcement.see_token(self._lock.token)
        self._gates.close_all()
        self._follower.pause()
        linked: set[int] = set()
        try:
            linked = set(self._links.states())
            self._enter(SwitchPhase.DRAINING)
            self._announcement.put({"state": DRAINING, "switch_token": self._lock.token}, _left(deadline))
            self._drain(deadline)
            self._enter(SwitchPhase.UNLINKING)
            self._unlink(deadline)
            self._enter(SwitchPhase.SWITCHING)
            self._lock.drained(deadline)  # raises if somebody else may be switching by now
            changes = self._change()
        except BaseException:
            self._go_on(linked)
            self._announce(before)
            raise
        try:
            self._enter(SwitchPhase.ANNOUNCING)
            self._announce({**before, **changes})
            self._enter(SwitchPhase.RELINKING)
        finally:
            self._go_on(linked)
        self._wait_for_links(deadline)

    def _enter(self, phase: SwitchPhase) -> None:
        _log.info("role switch of cluster %d, token %d: %s", self._own_id, self._lock.token, phase.value)
        if self._on_phase is not None:
            try:
                self._on_phase(phase)
            except Exception:  # half a switch is worse
                _log.exception("the callback of the program failed on %s", phase)

    def _drain(self, deadline: float) -> None:
        """Wait until own transfers have ended, and until linked peers have drained or cannot be expected to."""
        patience = time.monotonic() + _left(deadline) * _PATIENCE
        while not self._gates.wait_idle(min(deadline, time.monotonic() + _LOOK_S)):
            self._give_up_if_closing()
            if time.monotonic() >= deadline:
                reason = "transfers of this process did not end in time"
                raise LLMException(reason, status_code=LLMStatusCode.LLM_LINK_BUSY)
        while time.monotonic() < patience:
            drained = self._lock.drained(deadline)
            members = self._watch.members()
            waited_for = [
                cluster_id
                for cluster_id, link in self._links.states().items()
                if link.state == LINKED
                and cluster_id not in drained
                and cluster_id in members
                and members[cluster_id].follows
            ]
            if not waited_for:
                return
            self._give_up_if_closing()
            self._is_closing.wait(_POLL_S)
        _log.warning("cluster %d goes on with its switch though not all peers have drained", self._own_id)

    def _unlink(self, deadline: float) -> None:
        left = list(self._links.states())
        while left:
            # In short steps: the lock may be lost meanwhile.
            left = self._links.unlink_all(left, min(deadline, time.monotonic() + 1.0))
            self._give_up_if_closing()
            if left and time.monotonic() >= deadline:
                raise LLMException(
                    f"transfers on the links to clusters {left} did not end in time",
                    status_code=LLMStatusCode.LLM_LINK_BUSY,
                )

    def _give_up_if_closing(self) -> None:
        if self._is_closing.is_set():
            raise _closed()

    def _announce(self, changes: Mapping[str, object]) -> None:
        """Tell what is so in any case; a registry that is away is told when it is back."""
        try:
            self._announcement.put(changes, _ANSWER_S, keep=True)
        except LLMException as error:
            _log.warning("cluster %d could not announce what it is now: %s", self._own_id, error)

    def _go_on(self, linked: set[int]) -> None:
        self._follower.remember(linked)
        self._gates.open_all()
        self._follower.resume()

    def _wait_for_links(self, deadline: float) -> None:
        deadline = min(deadline, time.monotonic() + _RELINK_S)
        while self._follower.is_running and self._follower.lacking() and time.monotonic() < deadline:
            if self._is_closing.wait(_POLL_S):
                return


def _closed() -> LLMException:
    return LLMException("the member is closed", status_code=LLMStatusCode.LLM_ENGINE_FINALIZED)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
