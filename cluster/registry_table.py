"""Who is in the cluster: members, their leases, and the order in which they changed. No sockets; the clock is given.

Every change gets the next revision. Members and the ids of those that have left stand in the order of their last
change: what has happened after a revision is the end of that order, and a page of it ends at a revision again.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Union

from llm_datadist.cluster.registry_messages import Announce, Changes, encode_record

_log = logging.getLogger("llm_datadist.cluster.registry")

PAGE_BYTES = 256 * 1024
PAGE_ITEMS = 1024
MAX_GONE = 4096  # ids of former members that are remembered; who looks from before them is told everything

NEW, CHANGED, SAME = "new", "changed", "same"


@dataclass
class _Entry:
    announce: Announce
    record: bytes
    lease_ms: int
    revision: int
    deadline: float
    peer: bytes  # where its last message came from


@dataclass(frozen=True)
class _Gone:
    revision: int
    expired: bool


_Item = Union[_Entry, _Gone]


class TableFull(Exception):
    """There is no room for another member."""


class RegistryTable:
    """Members of a cluster.

    Parameters
    ----------
    epoch : bytes
        Names this life of the registry; revisions of another one mean nothing here.
    max_members : int
        Members at a time.
    """

    def __init__(self, epoch: bytes, max_members: int) -> None:
        self.epoch = epoch
        self.revision = 0
        self._max_members = max_members
        self._items: OrderedDict[int, _Item] = OrderedDict()  # by cluster id, in the order of revisions
        self._members = 0
        self._gone = 0
        self._forgotten = 0  # revision of the newest former member that is not remembered
        self._leases: list[tuple[float, int]] = []  # heap; a renewed lease is put in again when its entry is due
        self._looked_at: dict[int, float] = {}  # when; what the heap has besides is out of date

    def __len__(self) -> int:
        return self._members

    def instance_of(self, cluster_id: int) -> bytes | None:
        """Give the instance of a member; None if there is none of that id."""
        entry = self._entry(cluster_id)
        return None if entry is None else entry.announce.instance

    def peer_of(self, cluster_id: int) -> bytes | None:
        """Tell where the last message of a member came from; None if there is none of that id."""
        entry = self._entry(cluster_id)
        return None if entry is None else entry.peer

    def announce(self, announce: Announce, lease_ms: int, peer: bytes, now: float) -> str:
        """Take in what a member says about itself, and renew its lease.

        Whether it may have its cluster id is for the caller to decide. Gives NEW, CHANGED, or SAME if nobody needs to
        know.

        Raises
        ------
        TableFull
            It would be one too many.
        RegistryMessageError
            It says too much.
        """
        entry = self._entry(announce.cluster_id)
        if entry is not None and (_is_old(entry, announce) or _says_the_same(entry, announce, lease_ms)):
            entry.deadline, entry.peer = now + entry.lease_ms / 1000, peer
            return SAME
        if entry is None and self._members >= self._max_members:
            raise TableFull(f"there are {self._members} members, at most {self._max_members} are possible")
        record = encode_record(announce, lease_ms, self.revision + 1)
        self._drop(announce.cluster_id)
        self.revision += 1
        deadline = now + lease_ms / 1000
        self._items[announce.cluster_id] = _Entry(announce, record, lease_ms, self.revision, deadline, peer)
        self._members += 1
        self._watch_lease(announce.cluster_id, deadline)
        return NEW if entry is None else CHANGED

    def renew(self, cluster_id: int, instance: bytes, peer: bytes, now: float) -> int | None:
        """Renew a lease; gives its milliseconds, or None if the member is not known."""
        entry = self._entry(cluster_id)
        if entry is None or entry.announce.instance != instance:
            return None
        entry.deadline, entry.peer = now + entry.lease_ms / 1000, peer
        return entry.lease_ms

    def remove(self, cluster_id: int, expired: bool) -> None:
        """Take a member out."""
        if self._entry(cluster_id) is None:
            return
        self._drop(cluster_id)
        self.revision += 1
        self._items[cluster_id] = _Gone(self.revision, expired)
        self._gone += 1
        if self._gone > MAX_GONE:
            self._forget_the_oldest()

    def expire(self, now: float) -> list[tuple[int, bytes]]:
        """Take out the members whose lease has ended; gives their ids and instances."""
        ended = []
        while self._leases and self._leases[0][0] <= now:
            moment, cluster_id = heapq.heappop(self._leases)
            if self._looked_at.get(cluster_id) != moment:
                continue
            del self._looked_at[cluster_id]
            entry = self._entry(cluster_id)
            if entry is None:
                continue
            if entry.deadline <= now:
                self.remove(cluster_id, expired=True)
                ended.append((cluster_id, entry.announce.instance))
            else:
                self._watch_lease(cluster_id, entry.deadline)
        return ended

    def next_expiry(self) -> float | None:
        """Tell when to call `expire` next; None if there are no members."""
        return self._leases[0][0] if self._leases else None

    def changes(self, epoch: bytes, since: int, role: int, labels: dict[str, str]) -> Changes:
        """Give a page of what has changed after a revision.

        Of members that do not match (role 0: any) only the ids are given, as gone: who looks may have known them as
        something else. When everything is told they are left out.
        """
        reset = epoch != self.epoch or since < self._forgotten or since > self.revision or since == 0
        start = 0 if reset else since
        members: list[bytes] = []
        gone: list[int] = []
        expired: list[int] = []
        reached, nbytes, more = start, 0, False
        for cluster_id, item in self._after(start):
            if nbytes >= PAGE_BYTES or len(members) + len(gone) >= PAGE_ITEMS:
                more = True
                break
            reached = item.revision
            if isinstance(item, _Entry) and _matches(item.announce, role, labels):
                members.append(item.record)
                nbytes += len(item.record)
            elif not reset:
                gone.append(cluster_id)
                if isinstance(item, _Gone) and item.expired:
                    expired.append(cluster_id)
        return Changes(self.epoch, reached if more else self.revision, reset, more, members, gone, expired)

    # ---- inside

    def _entry(self, cluster_id: int) -> _Entry | None:
        item = self._items.get(cluster_id)
        return item if isinstance(item, _Entry) else None

    def _watch_lease(self, cluster_id: int, deadline: float) -> None:
        """See to it that `expire` looks at a member no later than at its deadline."""
        if deadline < self._looked_at.get(cluster_id, math.inf):
            self._looked_at[cluster_id] = deadline
            heapq.heappush(self._leases, (deadline, cluster_id))

    def _drop(self, cluster_id: int) -> None:
        item = self._items.pop(cluster_id, None)
        if isinstance(item, _Entry):
            self._members -= 1
        elif item is not None:
            self._gone -= 1

    def _forget_the_oldest(self) -> None:
        for cluster_id, item in self._items.items():
            if isinstance(item, _Gone):
                self._forgotten = item.revision
                self._drop(cluster_id)
                return

    def _after(self, revision: int) -> list[tuple[int, _Item]]:
        """List what has changed after a revision, in order."""
        found = []
        for cluster_id, item in reversed(self._items.items()):
            if item.revision <= revision:
                break
            found.append((cluster_id, item))
        found.reverse()
        return found


def _is_old(entry: _Entry, announce: Announce) -> bool:
    return entry.announce.instance == announce.instance and announce.version < entry.announce.version


def _says_the_same(entry: _Entry, announce: Announce, lease_ms: int) -> bool:
    told = replace(announce, version=entry.announce.version, seen_token=entry.announce.seen_token)
    return entry.lease_ms == lease_ms and told == entry.announce


def _matches(announce: Announce, role: int, labels: dict[str, str]) -> bool:
    if role not in (0, announce.role):
        return False
    return all(announce.labels.get(name) == value for name, value in labels.items())
