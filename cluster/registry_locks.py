"""Locks with a lease and a fencing token. No sockets; the clock is given.

A token is never used twice and grows with every grant, also over restarts of the registry: it starts at the clock of
the host, and above every token that a client reports. A registry that has just started cannot know who held a lock in
its former life, so it grants nothing new for as long as a lock can last; who held one gets it back by its token.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

ROLE_SWITCH = "role_switch"  # the lock that serialises role switches

MAX_LOCKS = 64
MAX_WAITERS = 4096
MAX_ACKNOWLEDGED = 4096
_TOKENS_A_MILLISECOND = 1 << 12  # keeps tokens below 2**63 for two thousand years


@dataclass
class Holder:
    """Who has a lock."""

    cluster_id: int
    instance: bytes
    token: int
    deadline: float
    drained: set[int] = field(default_factory=set)  # members that have acknowledged


@dataclass
class Waiter:
    """Who wants a lock, and where the answer goes."""

    cluster_id: int
    instance: bytes
    lease_ms: int
    deadline: float
    peer: bytes
    request: bytes


@dataclass
class _Lock:
    holder: Holder | None = None
    waiters: OrderedDict[bytes, Waiter] = field(default_factory=OrderedDict)  # by instance, in their order


class RegistryLocks:
    """All locks of a registry.

    Parameters
    ----------
    now : float
        When the registry started, on the clock that every call is given.
    grace_s : float
        Seconds in which nothing new is granted.
    """

    def __init__(self, now: float, grace_s: float) -> None:
        self._locks: dict[str, _Lock] = {}
        self._grace_ends = now + grace_s
        self._last_token = int(time.time() * 1000) * _TOKENS_A_MILLISECOND

    def see(self, token: int) -> None:
        """Never grant a token up to this one; one that no clock can have made is not believed."""
        if self._last_token < token < self._last_token + _TOKENS_A_MILLISECOND * 86_400_000:
            self._last_token = token

    def holder(self, name: str, now: float) -> Holder | None:
        """Tell who has a lock."""
        lock = self._locks.get(name)
        if lock is None or lock.holder is None or lock.holder.deadline <= now:
            return None
        return lock.holder

    def is_current(self, name: str, token: int, instance: bytes, now: float) -> bool:
        """Whether a token is that of the lock, and shown by its holder."""
        holder = self.holder(name, now)
        return holder is not None and (holder.token, holder.instance) == (token, instance)

    def keep(self, name: str, cluster_id: int, instance: bytes, token: int, lease_ms: int, now: float) -> Holder | None:
        """Let the holder go on, or take it back after a restart of the registry; None if it is not the holder."""
        holder = self.holder(name, now)
        deadline = now + lease_ms / 1000
        if holder is not None:
            if holder.instance != instance or token not in (0, holder.token):
                return None
            holder.deadline = deadline
            return holder
        if token == 0 or now >= self._grace_ends or not self._has_room(name):
            return None
        self.see(token)
        holder = Holder(cluster_id, instance, token, deadline)
        self._locks.setdefault(name, _Lock()).holder = holder
        return holder

    def wait(self, name: str, waiter: Waiter) -> bool:
        """Put somebody in line, once; False if there is no room."""
        lock = self._locks.get(name)
        if lock is None:
            if not self._has_room(name):
                return False
            lock = self._locks[name] = _Lock()
        if waiter.instance not in lock.waiters and len(lock.waiters) >= MAX_WAITERS:
            return False
        lock.waiters[waiter.instance] = waiter
        return True

    def release(self, name: str, instance: bytes, token: int, now: float) -> bool:
        """Free a lock; False if it was not held with this token."""
        if not self.is_current(name, token, instance, now):
            return False
        self._locks[name].holder = None
        return True

    def acknowledge(self, name: str, token: int, cluster_id: int, now: float) -> bool:
        """Note that a member has drained for the holder of a token; False if nobody holds it."""
        holder = self.holder(name, now)
        if holder is None or holder.token != token or len(holder.drained) >= MAX_ACKNOWLEDGED:
            return False
        holder.drained.add(cluster_id)
        return True

    def forget(self, instance: bytes) -> None:
        """Take away what a process held or waited for: it is gone."""
        for lock in self._locks.values():
            lock.waiters.pop(instance, None)
            if lock.holder is not None and lock.holder.instance == instance:
                lock.holder = None

    def serve(self, now: float) -> tuple[list[tuple[Waiter, Holder]], list[Waiter]]:
        """Grant free locks to those in line; gives who got one, and who has waited too long."""
        granted: list[tuple[Waiter, Holder]] = []
        late: list[Waiter] = []
        for name in list(self._locks):
            lock = self._locks[name]
            if self.holder(name, now) is None:
                lock.holder = None
            for instance, waiter in list(lock.waiters.items()):
                if waiter.deadline <= now:
                    late.append(lock.waiters.pop(instance))
            if lock.holder is None and lock.waiters and now >= self._grace_ends:
                _, waiter = lock.waiters.popitem(last=False)
                self._last_token += 1
                deadline = now + waiter.lease_ms / 1000
                lock.holder = Holder(waiter.cluster_id, waiter.instance, self._last_token, deadline)
                granted.append((waiter, lock.holder))
            if lock.holder is None and not lock.waiters:
                del self._locks[name]
        return granted, late

    def next_due(self) -> float | None:
        """Tell when to call `serve` next, if nothing happens before."""
        times = [self._grace_ends] if any(lock.waiters and lock.holder is None for lock in self._locks.values()) else []
        for lock in self._locks.values():
            times += [waiter.deadline for waiter in lock.waiters.values()]
            if lock.holder is not None:
                times.append(lock.holder.deadline)
        return min(times, default=None)

    def _has_room(self, name: str) -> bool:
        return name in self._locks or len(self._locks) < MAX_LOCKS
