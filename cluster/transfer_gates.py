"""Whether transfers with a peer may begin, and how many are under way.

A gate is closed while its peer, or this process, drains. Who wants to begin a transfer then waits; who has begun is
waited for. Nothing here touches links.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from llm_datadist.status import LLMException, LLMStatusCode


class TransferGates:
    """A gate for each peer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below
        self._closed: set[int] = set()
        self._all_closed = False
        self._linked: set[int] = set()
        self._running: dict[int, int] = {}  # transfers, by peer; none is not there

    def enter(self, cluster_id: int, timeout_s: float, look: Callable[[], object] | None) -> None:
        """Count a transfer, as soon as the gate is open; raises as ``ClusterMember.transfer``.

        `look` has `set_linked` called; it is used for a peer that is not linked, since the other end may have linked.
        """
        if self._try(cluster_id, timeout_s):
            return
        if look is not None:
            look()
        if not self._try(cluster_id, timeout_s):
            raise LLMException(
                f"cluster {cluster_id} is not linked, linked are {sorted(self.linked())}",
                status_code=LLMStatusCode.LLM_NOT_YET_LINK,
            )

    def leave(self, cluster_id: int) -> None:
        """Count a transfer as ended."""
        with self._changed:
            left = self._running[cluster_id] - 1
            if left:
                self._running[cluster_id] = left
            else:
                del self._running[cluster_id]
                self._changed.notify_all()

    def _try(self, cluster_id: int, timeout_s: float) -> bool:
        """Count a transfer, as soon as the gate is open; False if the peer is not linked."""
        with self._changed:
            if (self._all_closed or cluster_id in self._closed) and not self._changed.wait_for(
                lambda: not self._all_closed and cluster_id not in self._closed, timeout_s
            ):
                raise LLMException(
                    f"cluster {cluster_id} drains or this process does, and did not end that in {timeout_s} s",
                    status_code=LLMStatusCode.LLM_TIMEOUT,
                )
            if cluster_id not in self._linked:
                return False
            self._running[cluster_id] = self._running.get(cluster_id, 0) + 1
            return True

    def close(self, cluster_id: int) -> None:
        """Let no transfer with a peer begin."""
        with self._changed:
            self._closed.add(cluster_id)

    def open(self, cluster_id: int) -> None:
        """Let transfers with a peer begin again."""
        with self._changed:
            self._closed.discard(cluster_id)
            self._changed.notify_all()

    def closed(self) -> set[int]:
        """Give the peers whose gates are closed."""
        with self._changed:
            return set(self._closed)

    def close_all(self) -> None:
        """Let no transfer begin."""
        with self._changed:
            self._all_closed = True

    def open_all(self) -> None:
        """Take `close_all` back."""
        with self._changed:
            self._all_closed = False
            self._changed.notify_all()

    def set_linked(self, linked: set[int]) -> None:
        """Say which peers are linked."""
        with self._changed:
            self._linked = linked
            self._changed.notify_all()

    def linked(self) -> set[int]:
        """Give the peers that are linked and may be transferred with now."""
        with self._changed:
            return set() if self._all_closed else self._linked - self._closed

    def is_idle(self, cluster_id: int) -> bool:
        """Whether no transfer with a peer is under way."""
        with self._changed:
            return cluster_id not in self._running

    def wait_idle(self, deadline: float) -> bool:
        """Wait until no transfer at all is under way; False if the time is over before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic()))


class Transfer:
    """Transfers with one peer, for the length of a ``with`` block.

    It is entered before every pull, so it has no generator.
    """

    __slots__ = ("_cluster_id", "_gates", "_look", "_timeout_s")

    def __init__(
        self, gates: TransferGates, cluster_id: int, timeout_s: float, look: Callable[[], object] | None
    ) -> None:
        self._gates = gates
        self._cluster_id = cluster_id
        self._timeout_s = timeout_s
        self._look = look

    def __enter__(self) -> None:
        self._gates.enter(self._cluster_id, self._timeout_s, self._look)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gates.leave(self._cluster_id)
