"""What can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import (
    allocation,
    arguments,
    curves,
    held_prompt,
    layers,
    limits,
    links,
    local_copies,
    network,
    parts,
    pulls,
    registered,
    registry,
    start_up,
)
from .limits import Limits
from .measurement import Row
from .peer_reads import PeerReads

Topic = Callable[[Limits, "list[PeerReads]"], Iterator[Row]]

TOPICS: dict[str, Topic] = {
    "limits": lambda machine, peers: limits.measure(machine),
    "pulls": pulls.measure,
    "held": lambda machine, peers: held_prompt.measure(machine),
    "network": network.measure,
    "registered": registered.measure,
    "copies": lambda machine, peers: local_copies.measure(machine),
    "allocation": lambda machine, peers: allocation.measure(),
    "arguments": lambda machine, peers: arguments.measure(machine),
    "layers": lambda machine, peers: layers.measure(),
    "links": lambda machine, peers: links.measure(),
    "registry": lambda machine, peers: registry.measure(),
    "start-up": lambda machine, peers: start_up.measure(),
    "parts": lambda machine, peers: parts.measure(),
    "curves": curves.measure,
}
