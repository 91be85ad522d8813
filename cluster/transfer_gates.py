"""Whether transfers with a peer may begin, and how many are under way.

A gate is closed while its peer, or this process, drains. Who wants to begin a transfer then waits; who has begun is
waited for. Nothing here touches links.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from llm_datadist.status import LLMException, LLMStatusCode


class TransferGates:
    """A gate for each peer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below
        self._closed: set[int] = set()
        self._all_closed = False
        self._linked: set[int] = set()
        self._running: Counter[int] = Counter()

    @contextlib.contextmanager
    def transfer(self, cluster_id: int, timeout_s: float, look: Callable[[], object] | None = None) -> Iterator[None]:
        """Pass the gate; see ``ClusterMember.transfer``. `look` calls `set_linked`: the other end may have linked."""
        deadline = time.monotonic() + timeout_s
        if not self._enter(cluster_id, deadline):
            if look is not None:
                look()
            if not self._enter(cluster_id, deadline):
                raise LLMException(
                    f"cluster {cluster_id} is not linked, linked are {sorted(self.linked())}",
                    status_code=LLMStatusCode.LLM_NOT_YET_LINK,
                )
        try:
            yield
        finally:
            with self._changed:
                self._running[cluster_id] -= 1
                if self._running[cluster_id] == 0:
                    del self._running[cluster_id]
                self._changed.notify_all()

    def _enter(self, cluster_id: int, deadline: float) -> bool:
        """Count a transfer, as soon as the gate is open; False if the peer is not linked."""
        with self._changed:
            while self._all_closed or cluster_id in self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LLMException(
                        f"cluster {cluster_id} drains or this process does, and did not end that in time",
                        status_code=LLMStatusCode.LLM_TIMEOUT,
                    )
                self._changed.wait(left)
            if cluster_id not in self._linked:
                return False
            self._running[cluster_id] += 1
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
            return self._running[cluster_id] == 0

    def wait_idle(self, deadline: float) -> bool:
        """Wait until no transfer at all is under way; False if the time is over before."""
        with self._changed:
            return self._changed.wait_for(lambda: not +self._running, max(0.0, deadline - time.monotonic()))
