"""Keeps the links of a member as the cluster wants them, in a thread of its own.

It compares what should be linked with what is, and acts on the difference, again and again: a step that fails, or that
a lost message left out, is made good by the next pass.

- A peer drains: its gate is closed, transfers with it end, a link that was opened here is taken down, the peer is told.
- A peer has left, came back as another process, or has a role that does not fit: the same, without telling.
- A peer that fits is there: it is linked, if that was asked for, or if it was linked before it drained.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from llm_datadist.cluster.cluster_watch import ClusterWatch
from llm_datadist.cluster.member_info import DRAINING, Change, ChangeKind, MemberInfo
from llm_datadist.cluster.peer_links import BROKEN, LINKED, PeerLinks, is_good
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_locks import ROLE_SWITCH
from llm_datadist.cluster.registry_messages import Drained
from llm_datadist.cluster.transfer_gates import TransferGates
from llm_datadist.roles import LLMRole

if TYPE_CHECKING:
    from llm_datadist.engine.link_table import LinkDescription

_log = logging.getLogger("llm_datadist.cluster")

_IDLE_S = 1.0  # between two looks for links that broke, of which nobody tells
_BUSY_S = 0.02  # between two passes while something is unfinished
_LINK_S = 3.0
_UNLINK_S = 1.0
_LEAST_BACKOFF_S = 0.1
_MOST_BACKOFF_S = 2.0
_JOIN_S = 15.0  # a link call and what a callback takes

OnChange = Callable[[Change], None]


class Wanted(NamedTuple):
    """Which peers are linked by themselves.

    Attributes
    ----------
    link : bool
        Whether any are.
    roles : collection of LLMRole or None
        Their roles; None: PROMPT, if this member is DECODER.
    labels : dict of str to str
        All of which they have.
    """

    link: bool = True
    roles: Collection[LLMRole] | None = None
    labels: Mapping[str, str] = {}


class Follower:
    """Follows the cluster for one member.

    Parameters
    ----------
    own_id : int or None
        Cluster id of this process, None if it has none.
    own_role : callable
        Gives the role of this process.
    connection, watch, gates, links
        Of the member; `links` is None for one that cannot link.
    """

    def __init__(
        self,
        own_id: int | None,
        own_role: Callable[[], LLMRole | None],
        connection: RegistryConnection,
        watch: ClusterWatch,
        gates: TransferGates,
        links: PeerLinks | None,
    ) -> None:
        self._own_id = own_id
        self._own_role = own_role
        self._connection = connection
        self._watch = watch
        self._gates = gates
        self._links = links
        self._wanted = Wanted(link=False)
        self._on_change: OnChange | None = None
        self._changes: deque[Change] = deque()
        self._kicked = threading.Event()
        self._passing = threading.Lock()  # held during a pass, and while a role switch keeps passes away
        self._thread: threading.Thread | None = None
        self._stopping = False
        # Of the thread alone, or of whoever holds the lock above:
        self._known: dict[int, bytes] = {}  # instance of each member that was linked
        self._link_again: set[int] = set()  # members that were linked before they drained
        self._failures: dict[int, tuple[int, float]] = {}  # tries to link that failed, and when to try again
        self._told: dict[
            int, tuple[int, float]
        ] = {}  # token for which this member has drained, and when to say it again

    @property
    def is_running(self) -> bool:
        """Whether `start` was called."""
        return self._thread is not None

    def start(self, wanted: Wanted, on_change: OnChange | None, members: Collection[MemberInfo]) -> None:
        """Begin to follow, or go on with other wishes; `members` are told to the program first, as having joined."""
        self._wanted, self._on_change = wanted, on_change
        self._changes.clear()
        self._changes.extend(Change(ChangeKind.JOIN, member) for member in members if member.cluster_id != self._own_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="llm_datadist-follower", daemon=True)
            self._thread.start()
        self.kick()

    def take(self, changes: list[Change]) -> None:
        """Take in changes of the cluster; called in the thread of the connection, so nothing waits here."""
        if self._thread is None:
            return
        for change in changes:
            if change.member.cluster_id == self._own_id:
                continue
            if change.member.state == DRAINING:
                self._gates.close(change.member.cluster_id)
            self._changes.append(change)
        self.kick()

    def kick(self) -> None:
        """Have the next pass now."""
        self._kicked.set()

    def stop(self) -> None:
        """End the thread; may be called twice."""
        self._stopping = True
        self.kick()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                _log.error("the follower did not end within %s s", _JOIN_S)

    def pause(self) -> None:
        """Keep passes away until `resume`; waits for the one that runs."""
        self._passing.acquire()

    def resume(self) -> None:
        """Let passes be made again."""
        self._passing.release()
        self.kick()

    def remember(self, peers: Collection[int]) -> None:
        """Link to these peers again when they fit, whether or not it was asked for; during `pause`."""
        self._link_again.update(peers)
        self._failures.clear()

    def note_linked(self, peers: Collection[MemberInfo]) -> None:
        """Take over links that the program has asked for itself."""
        with self._passing:
            self._known.update((peer.cluster_id, peer.instance) for peer in peers)

    def lacking(self) -> list[int]:
        """Give the ids of peers that should be linked and are not."""
        if self._links is None:
            return []
        linked = {cluster_id for cluster_id, link in self._links.states().items() if link.state == LINKED}
        with self._passing:
            return sorted(peer.cluster_id for peer in self._fitting() if peer.cluster_id not in linked)

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping:
            self._kicked.clear()
            self._tell_the_program()
            unfinished = False
            try:
                with self._passing:
                    unfinished = self._pass()
            except Exception:  # such as that the instance was finalized
                if not self._stopping:
                    _log.exception("following the cluster failed, trying again in %s s", _IDLE_S)
            self._kicked.wait(_BUSY_S if unfinished else _IDLE_S)

    def _tell_the_program(self) -> None:
        while not self._stopping:
            try:
                change = self._changes.popleft()
            except IndexError:
                return
            if self._on_change is not None:
                try:
                    self._on_change(change)
                except Exception:
                    _log.exception("the callback of the program failed on %s", change)

    def _pass(self) -> bool:
        """Compare and act; True if something is unfinished."""
        if self._links is None or self._stopping:
            self._open_gates({})
            return False
        unfinished = self._drain_with_peers(self._links)
        unfinished |= self._take_down(self._links)
        unfinished |= self._link(self._links)
        self._open_gates(self._links.states())
        return unfinished

    def _drain_with_peers(self, links: PeerLinks) -> bool:
        unfinished = False
        states = links.states()
        for peer in self._watch.members().values():
            cluster_id = peer.cluster_id
            if peer.state != DRAINING or cluster_id == self._own_id:
                continue
            told, again = self._told.get(cluster_id, (0, 0.0))
            if told == peer.switch_token and time.monotonic() < again:
                continue
            self._gates.close(cluster_id)
            link = states.get(cluster_id)
            if not self._gates.is_idle(cluster_id) or (link is not None and not self._closes(links, link)):
                unfinished = True
                continue
            if link is not None:
                self._link_again.add(cluster_id)
            self._tell_drained(peer)
        return unfinished

    def _closes(self, links: PeerLinks, link: LinkDescription) -> bool:
        """Take down a link if that is for this end to do; False if it is in use."""
        if not link.client and link.state == LINKED:
            return True  # the other end does
        links.unlink([link.cluster_id], _UNLINK_S)
        return link.cluster_id not in links.states()

    def _tell_drained(self, peer: MemberInfo) -> None:
        """Say that this member has drained; again from time to time, since a registry that is started again forgets."""
        self._told[peer.cluster_id] = peer.switch_token, time.monotonic() + _IDLE_S
        if self._own_id is not None and peer.switch_token != 0:
            self._connection.request(Drained(ROLE_SWITCH, peer.switch_token, self._own_id), _IDLE_S)

    def _take_down(self, links: PeerLinks) -> bool:
        unfinished = False
        members = self._watch.members()
        for cluster_id, link in links.states().items():
            peer = members.get(cluster_id)
            if peer is not None and peer.state == DRAINING:
                continue  # done above
            if not self._is_to_go(link, peer):
                continue
            if link.state != BROKEN:
                self._gates.close(cluster_id)
                if not self._gates.is_idle(cluster_id):
                    unfinished = True
                    continue
            links.unlink([cluster_id], _UNLINK_S)
            gone = cluster_id not in links.states()
            unfinished |= not gone
            if gone:
                self._known.pop(cluster_id, None)
                _log.info("unlinked cluster %d, which has left or does not fit any more", cluster_id)
        return unfinished

    def _is_to_go(self, link: LinkDescription, peer: MemberInfo | None) -> bool:
        if link.state not in (LINKED, BROKEN):
            return False  # somebody is at it
        if link.state == BROKEN:
            return True
        instance = self._known.get(link.cluster_id)
        if instance is None or not link.client:
            return False  # it was made behind our back, or it is for the other end to take it down
        return peer is None or peer.instance != instance or (peer.available and not self._fits(peer))

    def _link(self, links: PeerLinks) -> bool:
        now = time.monotonic()
        states = links.states()
        missing = [peer for peer in self._fitting() if peer.cluster_id not in states]
        due = [peer for peer in missing if self._failures.get(peer.cluster_id, (0, 0.0))[1] <= now]
        if due and not self._stopping:
            results = links.link(due, _LINK_S)
            for peer in due:
                self._note(peer, is_good(results[peer.cluster_id]))
        return any(peer.cluster_id in self._failures for peer in missing)

    def _note(self, peer: MemberInfo, linked: bool) -> None:
        if linked:
            self._failures.pop(peer.cluster_id, None)
            self._link_again.discard(peer.cluster_id)
            self._known[peer.cluster_id] = peer.instance
            _log.info("linked to cluster %d", peer.cluster_id)
            return
        tries = self._failures.get(peer.cluster_id, (0, 0.0))[0] + 1
        after_s = min(_LEAST_BACKOFF_S * 2 ** min(tries, 10), _MOST_BACKOFF_S)
        self._failures[peer.cluster_id] = tries, time.monotonic() + after_s

    def _fitting(self) -> list[MemberInfo]:
        """List the peers that should be linked now."""
        members = self._watch.members()
        for cluster_id in [cluster_id for cluster_id in self._failures if cluster_id not in members]:
            del self._failures[cluster_id]
        self._link_again &= members.keys()
        return [
            peer
            for peer in members.values()
            if peer.cluster_id != self._own_id
            and peer.available
            and peer.listen_ip_info
            and self._fits(peer)
            and (peer.cluster_id in self._link_again or self._is_wanted(peer))
        ]

    def _is_wanted(self, peer: MemberInfo) -> bool:
        return self._wanted.link and peer.matches(labels=dict(self._wanted.labels))

    def _fits(self, peer: MemberInfo) -> bool:
        assert self._links is not None
        if not self._links.cache_manager_mode or self._wanted.roles is None:
            return self._own_role() is LLMRole.DECODER and peer.role is LLMRole.PROMPT
        return peer.role in self._wanted.roles

    def _open_gates(self, states: Mapping[int, LinkDescription]) -> None:
        """Open the gates of peers that do not drain any more: their links are as they should be now."""

        def open_gates(members: list[MemberInfo]) -> None:
            draining = {member.cluster_id for member in members if member.state == DRAINING}
            leaving = {
                cluster_id
                for cluster_id in self._known.keys() - {member.cluster_id for member in members}
                if cluster_id in states and states[cluster_id].state == LINKED
            }  # still to be taken down
            for cluster_id in self._gates.closed() - draining - leaving:
                self._told.pop(cluster_id, None)
                self._gates.open(cluster_id)

        self._watch.with_members(open_gates)  # so that none is closed in between
