"""Who waits for a change. Changes that come close together are told together, packed once for all who look alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from llm_datadist.cluster.registry_messages import Changes, Look, Message, encode
from llm_datadist.cluster.registry_table import RegistryTable

MAX_HELD = 100_000
MOST_HOLD_MS = 30_000
TOGETHER_S = 0.02  # least time between two rounds in which watchers are told
LOOK_S = 0.25  # how exact the end of a wait is

Send = Callable[[bytes, bytes, bytes], bool]
_Key = tuple[bytes, bytes]  # client and request


@dataclass
class _Held:
    look: Look
    since: int
    deadline: float


class RegistryWatches:
    """Looks that wait for a change.

    Parameters
    ----------
    table : RegistryTable
        What is looked at.
    send : callable
        Sends bytes to a client as the answer to a request.
    """

    def __init__(self, table: RegistryTable, send: Send) -> None:
        self._table = table
        self._send = send
        self._held: dict[_Key, _Held] = {}
        self._told = 0  # revision up to which all who wait have been told
        self._next_round = 0.0
        self._next_look = 0.0

    def look(self, peer: bytes, request: bytes, look: Look, now: float) -> Message | None:
        """Answer a look, or keep it."""
        up_to_date = look.epoch == self._table.epoch and look.since == self._table.revision
        if not up_to_date or look.hold_ms == 0 or len(self._held) >= MAX_HELD:
            return self._table.changes(look.epoch, look.since, look.role, look.labels)
        self._held[peer, request] = _Held(look, look.since, now + min(look.hold_ms, MOST_HOLD_MS) / 1000)
        return None

    def next_due(self) -> float | None:
        """Tell when to call `flush` next, if nothing happens before."""
        if not self._held:
            return None
        return min(self._next_round, self._next_look) if self._told != self._table.revision else self._next_look

    def flush(self, now: float) -> None:
        """Tell those who wait what has changed, and those who have waited long enough that nothing has."""
        if self._told != self._table.revision and now >= self._next_round:
            self._tell()
            # A round takes long with thousands of watchers; as much time again is left for everything else.
            ended = time.monotonic()
            self._next_round = ended + max(TOGETHER_S, ended - now)
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            for key in [key for key, held in self._held.items() if held.deadline <= now]:
                since = self._held.pop(key).since
                self._send(*key, encode(Changes(self._table.epoch, since, False, False, [], [], [])))

    def _tell(self) -> None:
        self._told = self._table.revision
        packed: dict[tuple[object, ...], tuple[bytes, bool]] = {}
        for key, held in list(self._held.items()):
            look = held.look
            alike = (held.since, look.role, tuple(sorted(look.labels.items())))
            if alike not in packed:
                changes = self._table.changes(self._table.epoch, held.since, look.role, look.labels)
                packed[alike] = encode(changes), bool(changes.members or changes.gone)
            data, is_news = packed[alike]
            if is_news:
                del self._held[key]
                self._send(*key, data)
            else:
                held.since = self._told
