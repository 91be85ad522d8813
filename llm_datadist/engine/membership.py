"""What one process knows about a communicator that it is a member of, and by what names its members find each other."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

from llm_datadist.engine.meeting_places import UNIX_ALONE, MeetingPlaces
from llm_datadist.transports import rendezvous, shared_memory


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
    transports : tuple of str
        That links may have, best first.
    places : MeetingPlaces
        Where this process waits for the others and looks for them.
    """

    communicator: int
    name: str
    members: dict[int, int]
    rank: int
    rank_table: bytes
    deadline: float
    attempts: int
    transports: tuple[str, ...] = (shared_memory.NAME,)
    places: MeetingPlaces = UNIX_ALONE

    @property
    def title(self) -> str:
        """What the communicator is called in messages."""
        return f"communicator {self.communicator} {self.name!r}"

    def digest(self) -> bytes:
        """Name of the communicator in a preamble over TCP."""
        known = (self.name, sorted(self.members.items()))
        return hashlib.sha256(repr(known).encode()).digest()[: rendezvous.TOKEN_BYTES]

    def meeting_name(self, rank: int) -> str:
        """Name of the Unix socket of a member."""
        known = (os.geteuid(), self.name, sorted(self.members.items()), rank)
        return f"llm_datadist.member.{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}"
