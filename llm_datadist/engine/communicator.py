"""One communicator of two-sided links: sets up a link to every other member, all of which do the same.

Members of one host find each other by the names of abstract Unix sockets, which follow from what all of them know. Each
listens under the name of its own rank, then connects to the members of lower rank, and tells those of higher rank that
it has come, so that they connect at once. Whoever comes second is found; nobody has to come first. Looking again now
and then is for members that were lost on the way.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import time
from enum import IntEnum
from typing import NamedTuple

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import MemberHello, MessageError, Refuse
from llm_datadist.control.stream import receive_message, send_message
from llm_datadist.engine.conversation import Conversation, Ending
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity, Link
from llm_datadist.engine.link_state import LinkState
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.member_handshake import MemberRefused, NobodyThere, Place, Steps, accept, join
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous

_log = logging.getLogger("llm_datadist.link")

_FIRST_PAUSE = 0.02  # until members are looked for again, in seconds
_LONGEST_PAUSE = 0.5
_STRANGER_SECONDS = 5.0  # for a connection to say hello
_MAX_STRANGERS = 16


class MemberStatus(IntEnum):
    """How far a communicator is; the numbers of the documented ``RegisterMemStatus``."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class Membership(NamedTuple):
    """What one process knows about a communicator that it is a member of.

    Attributes
    ----------
    communicator : int
        Its id in this process.
    name : str
        Its name, the same at all members.
    members : dict of int to int
        Cluster id of every rank.
    rank : int
        Of this process.
    rank_table : bytes
        Digest of the table, the same at all members.
    deadline : float
        For all links to stand, on the clock of ``time.monotonic``.
    attempts : int
        How often a member may be lost in the middle of a handshake before the set-up fails, >= 1.
    """

    communicator: int
    name: str
    members: dict[int, int]
    rank: int
    rank_table: bytes
    deadline: float
    attempts: int

    def meeting_name(self, rank: int) -> str:
        """Name of the Unix socket of a member."""
        known = (os.geteuid(), self.name, sorted(self.members.items()), rank)
        return f"llm_datadist.member.{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}"


class Communicator:
    """A communicator from the call that joins it to the one that leaves it.

    Everything in here runs in the control thread, but for `status`.

    Parameters
    ----------
    membership : Membership
        Who takes part.
    loop : ControlLoop
        Watches connections and the clock.
    identity : Identity
        Of this process.
    grants : Grants
        Makes what a member may reach.
    table : LinkTable
        Takes the links.
    """

    def __init__(
        self,
        membership: Membership,
        loop: ControlLoop,
        identity: Identity,
        grants: Grants,
        table: LinkTable,
    ) -> None:
        self.membership = membership
        self._loop = loop
        self._grants = grants
        self._table = table
        self._hello = MemberHello(identity.cluster_id, membership.rank, identity.instance, membership.rank_table)
        self._others = {rank: number for rank, number in membership.members.items() if rank != membership.rank}
        self._status = MemberStatus.PREPARING
        self._links: dict[int, Link] = {}  # by rank; replaced, never changed: `status` reads it in other threads
        self._handshakes: dict[int, Conversation] = {}  # by rank
        self._strangers: list[Conversation] = []  # have not said hello; the oldest first
        self._lost: dict[int, int] = {}  # how often each rank was
        self._listener: socket.socket | None = None
        self._name_was_taken = False
        self._pause = _FIRST_PAUSE

    @property
    def status(self) -> MemberStatus:
        """How far the communicator is; FAILED also once one of its links has broken. In any thread."""
        return MemberStatus.FAILED if self._lost_links() else self._status

    def start(self) -> None:
        """Begin to look for the other members."""
        self._loop.at(self.membership.deadline, self._expire)
        self._look_around()

    def take_down(self) -> bool:
        """Give up everything; False, and nothing changed, if a transfer uses one of the links."""
        links = list(self._links.values())
        if not self._table.start_unlink_all(links):
            return False
        self.close()
        self._table.leave(links)
        return True

    def close(self) -> None:
        """End the set-up; the links are left to the table."""
        self._status = MemberStatus.FAILED
        self._end_set_up()

    # ---- looking for members

    def _look_around(self) -> None:
        if self._status is not MemberStatus.PREPARING:
            return
        lost = self._lost_links()
        if lost:
            self._fail(f"{self._who(lost[0])} was lost before the others had come")
        elif self._listener is None:
            self._listen()
        else:
            self._approach_all()
        self._loop.at(time.monotonic() + self._pause, self._look_around)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _listen(self) -> None:
        try:
            listener = rendezvous.listen_at(self.membership.meeting_name(self.membership.rank))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                self._fail(f"cannot listen for members: {error}")
            elif not self._name_was_taken:
                self._name_was_taken = True
                _log.warning("%s: another process waits as rank %d", self._title(), self.membership.rank)
            return
        self._listener = listener
        self._loop.watch(listener, self._on_connection)
        self._approach_all()
        for rank in self._others:
            if rank > self.membership.rank:
                self._call(rank)

    def _approach_all(self) -> None:
        for rank in self._others:
            if rank < self.membership.rank:
                self._approach(rank)

    def _approach(self, rank: int) -> None:
        """Make the link to a member of lower rank, if that one is there."""
        if self._status is not MemberStatus.PREPARING or rank in self._handshakes or rank in self._links:
            return
        connection = self._connect(rank)
        if connection is not None:
            handshake = Conversation(self._loop, connection, lambda ending: self._on_end(handshake, ending))
            self._handshakes[rank] = handshake
            handshake.start(join(connection, self._place(rank), self._hello, self._grants))

    def _call(self, rank: int) -> None:
        """Let a member of higher rank know that this one is there, if that one is."""
        connection = self._connect(rank)
        if connection is not None:
            with connection:
                try:
                    send_message(connection, self._hello)
                except OSError as error:
                    _log.debug("%s: cannot call rank %d: %s", self._title(), rank, error)

    def _connect(self, rank: int) -> socket.socket | None:
        try:
            return rendezvous.connect(self.membership.meeting_name(rank), 0.0)
        except OSError:
            return None
        except rendezvous.ForeignProcess as error:
            _log.warning("%s: another user waits as rank %d: %s", self._title(), rank, error)
            return None

    # ---- members that come

    def _on_connection(self) -> None:
        assert self._listener is not None
        try:
            connection = rendezvous.accept(self._listener)
        except BlockingIOError:
            return
        except rendezvous.ForeignProcess as error:
            _log.warning("%s: refused a connection: %s", self._title(), error)
            return
        stranger = Conversation(self._loop, connection, lambda ending: self._on_end(stranger, ending))
        self._strangers.append(stranger)
        if len(self._strangers) > _MAX_STRANGERS:
            self._forget(self._strangers[0])
        self._loop.at(time.monotonic() + _STRANGER_SECONDS, lambda: self._forget(stranger))
        stranger.start(self._receive(stranger))

    def _forget(self, stranger: Conversation) -> None:
        if stranger in self._strangers:
            self._strangers.remove(stranger)
            stranger.close()

    def _receive(self, stranger: Conversation) -> Steps[Link | None]:
        """Hear who has come, and go on with the handshake."""
        connection = stranger.connection
        hello = yield from receive_message(connection)
        if not isinstance(hello, MemberHello):
            raise MessageError(f"unexpected message {hello!r}")
        rank = hello.rank
        if rank in self._others and rank < self.membership.rank:
            self._loop.call(lambda: self._approach(rank))
            return None
        if _has_left(connection):
            return None  # it has given up, and may have come again on another connection
        objection = self._objection(hello)
        if objection is not None:
            send_message(connection, Refuse(LLMStatusCode.LLM_LINK_FAILED, objection))
            raise MemberRefused(objection)
        if rank in self._links:
            return None  # that one was lost, which will be noticed in a moment
        if rank in self._handshakes:
            self._handshakes.pop(rank).close()  # the member has begun again
        self._strangers.remove(stranger)
        self._handshakes[rank] = stranger
        return (yield from accept(connection, self._place(rank), hello, self._hello, self._grants))

    def _objection(self, hello: MemberHello) -> str | None:
        expected = self._others.get(hello.rank)
        if expected != hello.cluster_id:
            who = "nobody else" if expected is None else f"cluster {expected}"
            return (
                f"cluster {hello.cluster_id} comes as rank {hello.rank}, which is {who} to rank {self.membership.rank}"
            )
        if hello.rank_table != self.membership.rank_table:
            return f"ranks {self.membership.rank} and {hello.rank} were given different rank tables"
        return None

    # ---- what comes of it

    def _on_end(self, talk: Conversation, ending: Ending) -> None:
        rank = next((rank for rank, other in self._handshakes.items() if other is talk), None)
        if rank is None:
            self._strangers.remove(talk)
        else:
            del self._handshakes[rank]
        if isinstance(ending, MemberRefused):
            self._fail(str(ending))
        elif rank is None:
            if ending is not None:
                _log.warning("%s: refused a connection: %s", self._title(), ending)
        elif isinstance(ending, Link):
            self._add(rank, ending)
        elif isinstance(ending, Exception) and not isinstance(ending, NobodyThere):
            self._lose(rank, ending)

    def _add(self, rank: int, link: Link) -> None:
        if not self._table.add_member(link):
            link.close()
            self._fail("this process has as many links as are possible")
            return
        self._links = {**self._links, rank: link}
        if len(self._links) == len(self._others):
            self._status = MemberStatus.OK
            self._end_set_up()
            _log.info("%s is complete", self._title())

    def _lose(self, rank: int, error: Exception) -> None:
        self._lost[rank] = self._lost.get(rank, 0) + 1
        reason = f"{self._who(rank)} was lost during the set-up: {error}"
        if self._lost[rank] >= self.membership.attempts:
            self._fail(reason)
        else:
            _log.warning("%s: %s (attempt %d)", self._title(), reason, self._lost[rank])

    def _expire(self) -> None:
        missing = [self._who(rank) for rank in sorted(self._others) if rank not in self._links]
        self._fail(f"the time is over, and there is no link to {', '.join(missing)}")

    def _fail(self, reason: str) -> None:
        if self._status is not MemberStatus.PREPARING:
            return
        _log.error("%s failed: %s", self._title(), reason)
        self.close()
        links, self._links = self._links, {}
        self._table.leave(list(links.values()))

    def _end_set_up(self) -> None:
        if self._listener is not None:
            self._loop.unwatch(self._listener)
            self._listener.close()
            self._listener = None
        for conversation in (*self._handshakes.values(), *self._strangers):
            conversation.close()
        self._handshakes.clear()
        self._strangers.clear()

    def _lost_links(self) -> list[int]:
        """Ranks whose links do not stand any more."""
        return [rank for rank, link in self._links.items() if link.state is not LinkState.LINKED]

    def _place(self, rank: int) -> Place:
        return Place(self.membership.communicator, self._others[rank], rank)

    def _who(self, rank: int) -> str:
        return f"cluster {self._others[rank]} (rank {rank})"

    def _title(self) -> str:
        return f"communicator {self.membership.communicator} {self.membership.name!r}"


def _has_left(connection: socket.socket) -> bool:
    """Tell whether the other side has closed a connection on which it should be waiting."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
