"""At most one communicator is being made on a device at any time.

HCCL allows one thread for each device in the call that makes a communicator, and that call waits for the peer: A that
makes one with B, B with C, and C with A would wait for each other until HCCL gives up, minutes later. So both ends take
the slot of their device before they enter. Who begins waits for its own slot, asks the other end, and gives its slot
back if that says that its own is taken: nobody waits for a slot while it holds another one.
"""

from __future__ import annotations

import threading

_slots: dict[int, threading.Lock] = {}
_guard = threading.Lock()


def creation_slot(device_id: int) -> threading.Lock:
    """Give the slot of a device of this process. It may be released by another thread than the one that took it."""
    with _guard:
        return _slots.setdefault(device_id, threading.Lock())
