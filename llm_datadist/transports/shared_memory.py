"""Shared memory as a transport: the puller maps the peer's pool and copies by itself.

The owner grants a link by sending four segments: its pool and its directory (read-only for the peer), its ledger, and
a claim page made for that link alone. From then on a pull needs nothing from the owner's process, not even that it
runs.
"""

from __future__ import annotations

import os
import threading

from llm_datadist._core import PeerMemory
from llm_datadist._directory import Claims, Directory
from llm_datadist._segment import Segment

NAME = "shared_memory"
NUM_DESCRIPTORS = 4


class SharedMemoryPuller(PeerMemory):
    """The pulling end: a peer's segments, mapped into this process."""

    name = NAME


def attach(descriptors: list[int]) -> SharedMemoryPuller:
    """Map what a peer granted; takes over the descriptors, also when it fails.

    Raises
    ------
    ValueError
        The segments are not what they should be.
    OSError
        The kernel refuses a mapping.
    """
    left = list(descriptors)
    segments: list[Segment] = []
    try:
        for writable in (False, False, True, True):
            segments.append(Segment.attach(left.pop(0), writable=writable))
        return SharedMemoryPuller(*segments)
    except BaseException:
        for segment in segments:
            segment.close()
        for descriptor in left:
            os.close(descriptor)
        raise


class SharedMemoryGrant:
    """The pulled end: lets one peer map the pool, and honours its claims until it is revoked.

    Parameters
    ----------
    pool : Segment
        The device's pool.
    directory : Directory
        Caches and keys in that pool.
    lock : threading.Lock
        Guards the directory.
    """

    name = NAME

    def __init__(self, pool: Segment, directory: Directory, lock: threading.Lock) -> None:
        self._pool = pool
        self._directory = directory
        self._lock = lock
        self._claims = Claims()
        self._revoked = False
        with lock:
            directory.add_claims(self._claims)

    def descriptors(self) -> list[int]:
        """Descriptors to send; the grant keeps owning them."""
        parts = (self._pool, self._directory.segment, self._directory.ledger, self._claims.segment)
        return [segment.fileno() for segment in parts]

    @property
    def busy(self) -> bool:
        return not self._revoked and self._claims.busy

    def revoke(self) -> None:
        with self._lock:
            if self._revoked:
                return
            self._revoked = True
            self._directory.drop_claims(self._claims)
        self._claims.close()
