"""One communicator of two-sided links: sets up a link to every other member, all of which do the same.

Members find each other where all of them know: those of one host by the names of abstract Unix sockets, others at an
address and a port for each rank. Each listens at its own place, then connects to the members of lower rank, and tells
those of higher rank that it has come, so that they connect at once. Whoever comes second is found; nobody has to come
first. Looking again now and then is for members that were lost on the way.

A member may be looked for in both ways. The Unix socket is tried first: who is met there shares memory. One that is
reached over TCP though it is on the same host says so, and is tried on its Unix socket once more.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import time
from enum import IntEnum

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import MemberHello, MessageError, Refuse
from llm_datadist.control.stream import receive_message, send_message
from llm_datadist.engine.conversation import Conversation, Ending
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity, Link
from llm_datadist.engine.link_state import LinkState
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.member_handshake import MemberRefused, NobodyThere, Place, answer_of
from llm_datadist.engine.member_shared_memory import accept, join
from llm_datadist.engine.member_tcp import ComeToUnixSocket, MemberTcp
from llm_datadist.engine.membership import Membership
from llm_datadist.engine.steps import Steps
from llm_datadist.engine.transport_choice import SAME_HOST, Choice, choose
from llm_datadist.engine.waiting_place import WaitingPlace
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous, shared_memory, tcp

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
    over_tcp : MemberTcp
        Reaches members on other hosts.
    """

    def __init__(
        self,
        membership: Membership,
        loop: ControlLoop,
        identity: Identity,
        grants: Grants,
        table: LinkTable,
        over_tcp: MemberTcp,
    ) -> None:
        self.membership = membership
        self._loop = loop
        self._identity = identity
        self._grants = grants
        self._table = table
        self._tcp = over_tcp
        self._hello = MemberHello(
            cluster_id=identity.cluster_id,
            rank=membership.rank,
            instance=identity.instance,
            rank_table=membership.rank_table,
            host=identity.host,
            transports=list(membership.transports),
            reason="",
        )
        self._others = {rank: number for rank, number in membership.members.items() if rank != membership.rank}
        self._status = MemberStatus.PREPARING
        self._links: dict[int, Link] = {}  # by rank; replaced, never changed: `status` reads it in other threads
        self._handshakes: dict[int, Conversation] = {}  # by rank
        self._strangers: list[Conversation] = []  # have not said hello; the oldest first
        self._calls: list[Conversation] = []  # to members of higher rank, over TCP
        self._lost: dict[int, int] = {}  # how often each rank was
        self._trouble: dict[int, str] = {}  # why a rank was not reached over TCP the last time
        self._sent_back: set[int] = set()  # ranks that are on this host, as they say
        self._not_on_unix: dict[int, str] = {}  # ranks of those that are not to be had there after all, and why
        self._waiting = WaitingPlace(membership, loop, over_tcp.points, self._welcome)
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
        self._waiting.close()

    # ---- looking for members

    def _look_around(self) -> None:
        if self._status is not MemberStatus.PREPARING:
            return
        lost = self._lost_links()
        if lost:
            self._fail(f"{self._who(lost[0])} was lost before the others had come")
        else:
            self._look()
        self._loop.at(time.monotonic() + self._pause, self._look_around)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _look(self) -> None:
        try:
            has_come = self._waiting.open()
        except OSError as error:
            self._fail(f"cannot wait for members: {error}")
            return
        for rank in self._others:
            if rank < self.membership.rank:
                self._approach(rank)
            elif has_come:
                self._call(rank)

    def _approach(self, rank: int) -> None:
        """Make the link to a member of lower rank, if that one is there."""
        if self._status is not MemberStatus.PREPARING or rank in self._links:
            return
        talk = self._handshakes.get(rank)
        if talk is not None and not _is_tcp(talk.connection):
            return
        connection = self._connect(rank)
        if connection is not None:
            if talk is not None:
                talk.close()
            handshake = self._new_handshake(rank, connection)
            handshake.start(join(connection, self._place(rank), self._hello, self._grants))
        elif talk is None:
            self._dial(rank)

    def _answer_call(self, rank: int) -> None:
        """Go to a member of lower rank that has just come; a connection that is still not made is of before that."""
        talk = self._handshakes.get(rank)
        if talk is not None and _is_tcp(talk.connection) and not _is_made(talk.connection):
            talk.close()
            del self._handshakes[rank]
        self._approach(rank)

    def _dial(self, rank: int) -> None:
        """Look for a member of lower rank over TCP, if it may be there."""
        connection = self._tcp_socket(rank)
        if connection is None:
            return
        reason = self._not_on_unix.get(rank, "")
        offers = [tcp.NAME] if reason else self._hello.transports
        hello = dataclasses.replace(self._hello, transports=offers, reason=reason)
        handshake = self._new_handshake(rank, connection)
        address, meeting = self.membership.places.others[rank], self.membership.digest()
        place = self._place(rank)
        handshake.start(self._tcp.join(connection, address, meeting, place, hello, handshake.go_on))

    def _new_handshake(self, rank: int, connection: socket.socket) -> Conversation:
        handshake = Conversation(self._loop, connection, lambda ending: self._on_end(handshake, ending))
        self._handshakes[rank] = handshake
        return handshake

    def _call(self, rank: int) -> None:
        """Let a member of higher rank know that this one is there, if that one is."""
        connection = self._connect(rank)
        if connection is None:
            self._call_over_tcp(rank)
            return
        with connection:
            try:
                send_message(connection, self._hello)
            except OSError as error:
                _log.debug("%s: cannot call rank %d: %s", self.membership.title, rank, error)

    def _call_over_tcp(self, rank: int) -> None:
        connection = self._tcp_socket(rank)
        if connection is None:
            return

        def on_end(ending: Ending) -> None:
            self._calls.remove(call)
            if ending is not None:
                _log.debug("%s: cannot call rank %d: %s", self.membership.title, rank, ending)

        call = Conversation(self._loop, connection, on_end)
        self._calls.append(call)
        address, meeting = self.membership.places.others[rank], self.membership.digest()
        call.start(self._tcp.call(connection, address, meeting, self._hello, call.go_on))

    def _connect(self, rank: int) -> socket.socket | None:
        """Connect to the Unix socket of a member, if it is there."""
        if not self._waiting.on_unix or rank in self._not_on_unix:
            return None
        try:
            return rendezvous.connect(self.membership.meeting_name(rank), 0.0)
        except OSError:
            if rank in self._sent_back:
                self._not_on_unix[rank] = "the peer is on the same host, but not to be reached on its Unix socket"
            return None
        except rendezvous.ForeignProcess as error:
            _log.warning("%s: another user waits as rank %d: %s", self.membership.title, rank, error)
            return None

    def _tcp_socket(self, rank: int) -> socket.socket | None:
        """Make a socket for a member that may be met over TCP, not connected yet."""
        address = self.membership.places.others.get(rank)
        if address is None or not self._waiting.on_tcp:
            return None
        try:
            return tcp.new_socket(address)
        except OSError as error:
            self._trouble[rank] = str(error)
            return None

    # ---- members that come

    def _welcome(self, connection: socket.socket) -> None:
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
            self._loop.call(lambda: self._answer_call(rank))
            return None
        if _has_left(connection):
            return None  # it has given up, and may have come again on another connection
        choice = self._choose(connection, hello)
        objection = self._objection(hello, choice)
        if objection is not None:
            send_message(connection, Refuse(LLMStatusCode.LLM_LINK_FAILED, objection))
            raise MemberRefused(objection)
        if rank in self._links:
            return None  # that one was lost, which will be noticed in a moment
        if choice.transport == shared_memory.NAME and _is_tcp(connection):
            send_message(connection, answer_of(self._hello, shared_memory.NAME, choice.reason))
            return None  # it comes to the Unix socket
        if rank in self._handshakes:
            self._handshakes.pop(rank).close()  # the member has begun again
        self._strangers.remove(stranger)
        self._handshakes[rank] = stranger
        if choice.transport != shared_memory.NAME:
            return (yield from self._tcp.accept(connection, self._place(rank), hello, self._hello, choice.reason))
        return (yield from accept(connection, self._place(rank), hello, self._hello, self._grants))

    def _choose(self, connection: socket.socket, hello: MemberHello) -> Choice:
        if not _is_tcp(connection):
            return Choice(shared_memory.NAME, SAME_HOST)
        names = f"rank {hello.rank}", f"rank {self.membership.rank}"
        return choose(hello, self._identity, self.membership.transports, *names)

    def _objection(self, hello: MemberHello, choice: Choice) -> str | None:
        expected = self._others.get(hello.rank)
        if expected != hello.cluster_id:
            who = "nobody else" if expected is None else f"cluster {expected}"
            return (
                f"cluster {hello.cluster_id} comes as rank {hello.rank}, which is {who} to rank {self.membership.rank}"
            )
        if hello.rank_table != self.membership.rank_table:
            return f"ranks {self.membership.rank} and {hello.rank} were given different rank tables"
        if choice.transport is None:
            return f"no transport in common: {choice.reason}"
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
                _log.warning("%s: refused a connection: %s", self.membership.title, ending)
        elif isinstance(ending, Link):
            self._add(rank, ending)
        elif isinstance(ending, ComeToUnixSocket):
            self._sent_back.add(rank)
            self._loop.call(lambda: self._approach(rank))
        elif isinstance(ending, NobodyThere):
            self._trouble[rank] = str(ending)
        elif isinstance(ending, Exception):
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
            _log.info("%s is complete", self.membership.title)

    def _lose(self, rank: int, error: Exception) -> None:
        self._lost[rank] = self._lost.get(rank, 0) + 1
        reason = f"{self._who(rank)} was lost during the set-up: {error}"
        if self._lost[rank] >= self.membership.attempts:
            self._fail(reason)
        else:
            _log.warning("%s: %s (attempt %d)", self.membership.title, reason, self._lost[rank])

    def _expire(self) -> None:
        missing = [self._where(rank) for rank in sorted(self._others) if rank not in self._links]
        self._fail(f"the time is over, and there is no link to {', '.join(missing)}")

    def _fail(self, reason: str) -> None:
        if self._status is not MemberStatus.PREPARING:
            return
        _log.error("%s failed: %s", self.membership.title, reason)
        self.close()
        links, self._links = self._links, {}
        self._table.leave(list(links.values()))

    def _end_set_up(self) -> None:
        """Wait for nobody any more; others may still make data connections of links that they have joined over TCP."""
        if any(
            link.end.name != shared_memory.NAME for rank, link in self._links.items() if rank > self.membership.rank
        ):
            self._waiting.expect_nobody()
        else:
            self._waiting.close()
        for conversation in (*self._handshakes.values(), *self._strangers, *self._calls):
            conversation.close()
        self._handshakes.clear()
        self._strangers.clear()
        self._calls.clear()

    def _lost_links(self) -> list[int]:
        """Ranks whose links do not stand any more."""
        return [rank for rank, link in self._links.items() if link.state is not LinkState.LINKED]

    def _place(self, rank: int) -> Place:
        return Place(self.membership.communicator, self._others[rank], rank)

    def _who(self, rank: int) -> str:
        return f"cluster {self._others[rank]} (rank {rank})"

    def _where(self, rank: int) -> str:
        """Name a member that was not found, and where it was looked for over TCP."""
        address = self.membership.places.others.get(rank)
        if address is None:
            return self._who(rank)
        trouble = self._waiting.trouble or self._trouble.get(rank, "nobody came")
        return f"{self._who(rank)} at {address[0]}, port {address[1]} ({trouble})"


def _is_tcp(connection: socket.socket) -> bool:
    return connection.family != socket.AF_UNIX


def _is_made(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def _has_left(connection: socket.socket) -> bool:
    """Tell whether the other side has closed a connection on which it should be waiting."""
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
