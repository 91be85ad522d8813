"""What one client has learned about the cluster, and what each message of the registry changes in it. No sockets.

When the registry has started again it knows nobody until they announce themselves again. A member that is missing from
its first answers is therefore kept until its own lease would have ended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from llm_datadist.cluster.member_info import Change, ChangeKind, MemberInfo
from llm_datadist.cluster.registry_messages import Changes, Look, RegistryMessageError, decode_record

_log = logging.getLogger("llm_datadist.cluster")

_LEAST_PATIENCE_S = 1.0  # with members whose lease is shorter


class ClusterView:
    """Members by their cluster ids, as far as this client knows."""

    def __init__(self) -> None:
        self.members: dict[int, MemberInfo] = {}
        self._epoch = b""
        self._revision = 0
        self._missing: dict[int, float] = {}  # since the registry has told everything: until when they are kept
        self._listed: set[int] | None = None  # ids seen so far while it tells everything

    def next_look(self, role: int, labels: dict[str, str], hold_ms: int) -> Look:
        """Give the question to ask next."""
        return Look(self._epoch, self._revision, hold_ms, role, labels)

    @property
    def is_complete(self) -> bool:
        """Whether the registry has told everything once, and nothing is under way."""
        return bool(self._epoch) and self._listed is None

    def apply(self, changes: Changes, now: float) -> list[Change]:
        """Take in an answer; gives what has changed for this client, in order."""
        if changes.reset:
            self._listed = set()
        self._epoch, self._revision = changes.epoch, changes.revision
        found = [change for record in changes.members for change in self._put(record)]
        for cluster_id in changes.gone:
            found += self._remove(cluster_id, cluster_id in changes.expired)
        if self._listed is not None and not changes.more:
            for cluster_id in self.members.keys() - self._listed - self._missing.keys():
                patience = max(self.members[cluster_id].lease_s, _LEAST_PATIENCE_S)
                self._missing[cluster_id] = now + patience
            self._listed = None
        return found

    def expire(self, now: float) -> list[Change]:
        """Give up members that have not come back to a registry that was started again."""
        ended = [cluster_id for cluster_id, moment in self._missing.items() if moment <= now]
        return [change for cluster_id in ended for change in self._remove(cluster_id, True)]

    def next_expiry(self) -> float | None:
        """Tell when to call `expire` next."""
        return min(self._missing.values(), default=None)

    def _put(self, record: bytes) -> Iterator[Change]:
        try:
            member = decode_record(record)
        except RegistryMessageError as error:
            _log.warning("the registry tells of a member that cannot be read: %s", error)
            return
        previous = self.members.get(member.cluster_id)
        self._missing.pop(member.cluster_id, None)
        if self._listed is not None:
            self._listed.add(member.cluster_id)
        self.members[member.cluster_id] = member
        if previous is not None and previous.instance != member.instance:
            yield Change(ChangeKind.LEAVE, previous, previous, expired=True)
            previous = None
        if previous is None:
            yield Change(ChangeKind.JOIN, member)
        elif previous.role is not member.role:
            yield Change(ChangeKind.ROLE, member, previous)
        elif not _says_the_same(previous, member):
            yield Change(ChangeKind.UPDATE, member, previous)

    def _remove(self, cluster_id: int, expired: bool) -> Iterator[Change]:
        self._missing.pop(cluster_id, None)
        member = self.members.pop(cluster_id, None)
        if member is not None:
            yield Change(ChangeKind.LEAVE, member, member, expired)


def _says_the_same(one: MemberInfo, other: MemberInfo) -> bool:
    from dataclasses import replace

    return replace(one, revision=0) == replace(other, revision=0)
