"""A wire that takes its time, loses frames and damages them: it carries them between TAP devices of two namespaces.

The queueing discipline netem of Linux does much of that, where a kernel has it; many of virtual machines have not. It
does not make damage that the checksum of TCP misses.
"""

from __future__ import annotations

import fcntl
import os
import random
import selectors
import struct
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.hosts.namespace import enter

FRAME_BYTES = 65536
SEED = 1  # of chance
MOST_FRAMES = 20_000  # on their way in one direction; further ones are lost, as in a full queue

_SET_INTERFACE = 0x400454CA  # TUNSETIFF of <linux/if_tun.h>
_TAP, _NO_PACKET_INFORMATION = 0x0002, 0x1000  # IFF_TAP, IFF_NO_PI
_REQUEST = struct.Struct("16sH22x")  # struct ifreq

_WORD = struct.Struct("!H")
_ETHERNET_BYTES, _ETHERTYPE, _IPV4 = 14, slice(12, 14), b"\x08\x00"
_PROTOCOL, _TCP = 23, 6  # where IPv4 says what it carries
_NEARLY_FULL = 1400


class Quality(NamedTuple):
    """What a wire does to each frame, in either direction.

    Attributes
    ----------
    delay_s : float
        Seconds that it takes.
    loss : float
        Share of frames that are lost.
    damage : float
        Share of nearly full TCP segments in which bytes change, with a checksum that hides it.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    damage: float = 0.0


class Carried(NamedTuple):
    """Frames that a wire has delivered, lost and damaged so far, both directions together."""

    delivered: int
    lost: int
    damaged: int


class End(NamedTuple):
    """A namespace and the name of the device in it."""

    path: str
    device: str


def serve(connection: Connection, first: End, second: End, quality: Quality) -> None:
    """Carry frames until the connection closes; a quality that comes over it holds from then on, and is answered."""
    taps = [_open_tap(end) for end in (first, second)]
    connection.send("ready")
    try:
        _Wire(connection, taps, quality).carry()
    finally:
        for tap in taps:
            os.close(tap)


class _Wire:
    def __init__(self, connection: Connection, taps: list[int], quality: Quality) -> None:
        self._connection = connection
        self._quality = quality
        self._random = random.Random(SEED)
        self._other = {taps[0]: taps[1], taps[1]: taps[0]}
        self._under_way: dict[int, deque[tuple[float, bytes]]] = {tap: deque() for tap in taps}  # by destination
        self._delivered = self._lost = self._damaged = 0

    def carry(self) -> None:
        with selectors.DefaultSelector() as selector:
            for tap in self._other:
                selector.register(tap, selectors.EVENT_READ)
            selector.register(self._connection, selectors.EVENT_READ)
            while True:
                for ready, _ in selector.select(self._until_next()):
                    if ready.fileobj in self._other:
                        self._take(ready.fd)
                    elif not self._hear():
                        return
                self._deliver()

    def _until_next(self) -> float | None:
        due = [queue[0][0] for queue in self._under_way.values() if queue]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _take(self, tap: int) -> None:
        """Take all frames that wait at a device."""
        queue = self._under_way[self._other[tap]]
        while True:
            try:
                frame = os.read(tap, FRAME_BYTES)
            except BlockingIOError:
                return
            if len(queue) >= MOST_FRAMES or self._random.random() < self._quality.loss:
                self._lost += 1
            else:
                queue.append((time.monotonic() + self._quality.delay_s, self._damage(frame)))

    def _deliver(self) -> None:
        now = time.monotonic()
        for tap, queue in self._under_way.items():
            while queue and queue[0][0] <= now:
                try:
                    os.write(tap, queue.popleft()[1])
                    self._delivered += 1
                except OSError:  # the interface is down
                    self._lost += 1

    def _damage(self, frame: bytes) -> bytes:
        if len(frame) < _NEARLY_FULL or frame[_ETHERTYPE] != _IPV4 or frame[_PROTOCOL] != _TCP:
            return frame
        if self._random.random() >= self._quality.damage:
            return frame
        self._damaged += 1
        segment = _ETHERNET_BYTES + 4 * (frame[_ETHERNET_BYTES] & 15)
        data = segment + 4 * (frame[segment + 12] >> 4)
        at = data + 2 * self._random.randrange((len(frame) - data) // 2)  # the checksum is over words of 16 bits
        return change_word(frame, at, segment + 16, self._random.randrange(1, 1 << 16))

    def _hear(self) -> bool:
        try:
            quality = self._connection.recv()
        except EOFError:
            return False
        if quality is not None:
            self._quality = quality
        self._connection.send(Carried(self._delivered, self._lost, self._damaged))
        return True


def change_word(frame: bytes, at: int, checksum: int, change: int) -> bytes:
    """Change the bits of a word, and the checksum at another place so that it fits again (RFC 1624, equation 3)."""
    damaged = bytearray(frame)
    (old,) = _WORD.unpack_from(frame, at)
    (summed,) = _WORD.unpack_from(frame, checksum)
    total = (~summed & 0xFFFF) + (~old & 0xFFFF) + (old ^ change)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    _WORD.pack_into(damaged, at, old ^ change)
    _WORD.pack_into(damaged, checksum, ~total & 0xFFFF)
    return bytes(damaged)


def _open_tap(end: End) -> int:
    """Make a TAP device; it exists as long as the descriptor."""
    enter(end.path)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, _SET_INTERFACE, _REQUEST.pack(end.device.encode(), _TAP | _NO_PACKET_INFORMATION))
    return tap
