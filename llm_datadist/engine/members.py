"""Two-sided links: the communicators that this process is a member of."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.communicator import Communicator, MemberStatus
from llm_datadist.engine.failures import failure, invalid
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.meeting_places import meeting_places
from llm_datadist.engine.meeting_points import MeetingPoints
from llm_datadist.engine.member_tcp import MemberTcp
from llm_datadist.engine.membership import Membership
from llm_datadist.engine.network import Network
from llm_datadist.engine.options import CacheManagerOptions
from llm_datadist.engine.rank_table import BadRankTable, RankTable, read_rank_table
from llm_datadist.status import LLMStatusCode

_log = logging.getLogger("llm_datadist.link")

MAX_COMMUNICATORS = 512  # of one process, documented

CONNECT_TIMEOUT_VARIABLE = "HCCL_CONNECT_TIMEOUT"
DEFAULT_CONNECT_SECONDS = 120


class Members:
    """All communicators of this process; set up in the control thread, one step at a time.

    Parameters
    ----------
    loop : ControlLoop
        Carries the set-ups.
    identity : Identity
        Of this process.
    grants : Grants
        Makes what a member may reach.
    table : LinkTable
        Takes the links.
    options : CacheManagerOptions
        How long and how often a link is tried, and whether there are communicators at all.
    network : Network
        Which transports may be used.
    """

    def __init__(
        self,
        loop: ControlLoop,
        identity: Identity,
        grants: Grants,
        table: LinkTable,
        options: CacheManagerOptions,
        network: Network,
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._grants = grants
        self._table = table
        self._options = options
        self._transports = network.transports
        self._tcp = MemberTcp(loop, grants, MeetingPoints(loop, table))
        self._ids = itertools.count(1)
        self._by_id: dict[int, Communicator] = {}
        self._lock = threading.Lock()  # guards _by_id
        self.were_linked = False  # whether this process was ever a member of a communicator

    def link(self, name: str, members: dict[int, int], rank_table: str) -> int:
        """Join a communicator; every member does so. Comes back at once, see `status`.

        Servers of the rank table that have a name instead of an address are looked up first, if they are needed.

        Parameters
        ----------
        name : str
            The same at all members, and of no other communicator of this process.
        members : dict of int to int
            Rank of every cluster; two or more.
        rank_table : str
            JSON that has a device for each rank, and says where the members meet that are not on one host; the same at
            all members.

        Returns
        -------
        int
            Id of the communicator in this process, from 1 on.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID, LLM_FEATURE_NOT_ENABLED: with a transfer backend.
        """
        call = "link"
        if self._options.has_backend:
            reason = "not available with a transfer backend, use link_clusters"
            raise failure(call, LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)
        number = self._identity.cluster_id
        if number not in members:
            raise invalid(call, f"clusters are {sorted(members)}, the own cluster {number} must be among them")
        try:
            table = read_rank_table(rank_table)
            _check_ranks(call, members, table)
            places = meeting_places(table, members.values(), members[number], self._transports)
        except BadRankTable as error:
            raise invalid(call, str(error)) from None
        seconds = self._options.link_total_time_s or _connect_seconds()
        with self._lock:
            if any(other.membership.name == name for other in self._by_id.values()):
                raise invalid(call, f"a communicator {name!r} exists, unlink it first or choose another name")
            if len(self._by_id) >= MAX_COMMUNICATORS:
                raise invalid(call, f"{MAX_COMMUNICATORS} communicators exist, no more are possible")
            membership = Membership(
                next(self._ids),
                name,
                {rank: cluster_id for cluster_id, rank in members.items()},
                members[number],
                table.digest(),
                time.monotonic() + seconds,
                max(1, self._options.link_retry_count),
                self._transports,
                places,
            )
            communicator = Communicator(membership, self._loop, self._identity, self._grants, self._table, self._tcp)
            self._by_id[membership.communicator] = communicator
            self.were_linked = True
        self._loop.call(communicator.start)
        self._loop.start()
        return membership.communicator

    def status(self, communicator: int) -> MemberStatus:
        """Tell how far a communicator is.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: there is none of that id.
        """
        found = self._by_id.get(communicator)
        if found is None:
            raise _unknown("query_register_mem_status", communicator)
        return found.status

    def unlink(self, communicator: int) -> None:
        """Leave a communicator, also one that is not complete yet.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: there is none of that id. LLM_LINK_BUSY: a transfer uses one of its links; nothing has
            changed. LLM_FAILED: the control thread does not answer.
        """
        call = "unlink"
        if communicator not in self._by_id:
            raise _unknown(call, communicator)

        def leave() -> None:
            found = self._by_id.get(communicator)
            if found is None:
                raise _unknown(call, communicator)
            if not found.take_down():
                reason = f"a transfer uses a link of communicator {communicator}, try again"
                raise failure(call, LLMStatusCode.LLM_LINK_BUSY, reason)
            with self._lock:
                del self._by_id[communicator]

        try:
            self._loop.ask(leave)
        except TimeoutError as error:
            raise failure(call, LLMStatusCode.LLM_FAILED, str(error)) from error

    def close(self) -> None:
        """End what is being set up. The control loop has ended."""
        with self._lock:
            for communicator in self._by_id.values():
                communicator.close()
        self._tcp.points.close()


def _check_ranks(call: str, members: dict[int, int], table: RankTable) -> None:
    ranks = sorted(members.values())
    if len(set(ranks)) != len(ranks):
        raise invalid(call, f"ranks of the clusters are {ranks}, must be different")
    for cluster_id, rank in members.items():
        if rank >= len(table.devices):
            raise invalid(
                call,
                f"cluster {cluster_id} has rank {rank}, rank_table has ranks 0 to {len(table.devices) - 1}",
            )


def _connect_seconds() -> int:
    text = os.environ.get(CONNECT_TIMEOUT_VARIABLE, "")
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    if text:
        _log.warning("%s is %r, should be seconds; %d is used", CONNECT_TIMEOUT_VARIABLE, text, DEFAULT_CONNECT_SECONDS)
    return DEFAULT_CONNECT_SECONDS


def _unknown(call: str, communicator: int) -> Exception:
    reason = f"no communicator {communicator}, link gives the id of one"
    return failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
