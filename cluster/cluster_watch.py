"""A view of the cluster that keeps itself up to date, in the thread of the connection."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from llm_datadist.cluster.cluster_view import ClusterView
from llm_datadist.cluster.member_info import Change, MemberInfo
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_messages import Changes, Message

_HOLD_MS = 10_000
_TRY_AGAIN_S = 0.25

OnChanges = Callable[["list[Change]"], None]


class ClusterWatch:
    """All members, as the registry tells of them.

    Parameters
    ----------
    connection : RegistryConnection
        To the registry.
    on_changes : callable
        Gets what has changed, in the thread of the connection, so it must not wait.
    """

    def __init__(self, connection: RegistryConnection, on_changes: OnChanges) -> None:
        self._connection = connection
        self._on_changes = on_changes
        self._changed = threading.Condition()  # guards the view
        self._view = ClusterView()
        self._started = False
        self._stopped = False

    def start(self) -> None:
        """Begin to watch; does nothing if it was begun."""
        with self._changed:
            if self._started:
                return
            self._started = True
        self._connection.call(self._look)

    def stop(self) -> None:
        """Let those who wait come back, and ask no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def members(self) -> dict[int, MemberInfo]:
        """Give the members by their cluster ids, as far as they are known now."""
        with self._changed:
            return dict(self._view.members)

    def get(self, cluster_id: int) -> MemberInfo | None:
        """Give one member; None if it is not there."""
        with self._changed:
            return self._view.members.get(cluster_id)

    def with_members(self, function: Callable[[list[MemberInfo]], None]) -> None:
        """Call a function with the members, between two calls of `on_changes`; it must not wait."""
        with self._changed:
            function(list(self._view.members.values()))

    def wait(self, enough: Callable[[dict[int, MemberInfo]], bool], deadline: float) -> bool:
        """Wait until the members are enough; False if the time is over or the watch was stopped before."""
        with self._changed:
            while not enough(self._view.members):
                left = deadline - time.monotonic()
                if left <= 0 or self._stopped:
                    return False
                self._changed.wait(min(left, 1.0))
            return True

    # ---- in the thread of the connection

    def _look(self) -> None:
        if self._stopped:
            return
        with self._changed:
            question = self._view.next_look(0, {}, _HOLD_MS)
        # Longer than it is held and than it takes until it is sent again.
        self._connection.request(question, 3 * _HOLD_MS / 1000).add_done_callback(self._seen)

    def _seen(self, answer: Future[Message]) -> None:
        reply = answer.result() if answer.exception() is None else None
        if not isinstance(reply, Changes):
            self._connection.at(time.monotonic() + _TRY_AGAIN_S, self._look)
            return
        self._take(lambda now: self._view.apply(reply, now))
        with self._changed:
            moment = self._view.next_expiry()
        if moment is not None:
            self._connection.at(moment, self._expire)
        self._look()

    def _expire(self) -> None:
        self._take(self._view.expire)

    def _take(self, change: Callable[[float], list[Change]]) -> None:
        with self._changed:
            found = change(time.monotonic())
            self._changed.notify_all()
            if found and not self._stopped:
                self._on_changes(found)
