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
    parts,
    pulls,
    registered,
    start_up,
)
from .limits import Limits
from .measurement import Row
from .nixl_reads import NixlReads

Topic = Callable[[Limits, "NixlReads | None"], Iterator[Row]]

TOPICS: dict[str, Topic] = {
    "limits": lambda machine, nixl: limits.measure(machine),
    "pulls": pulls.measure,
    "held": lambda machine, nixl: held_prompt.measure(machine),
    "registered": registered.measure,
    "copies": lambda machine, nixl: local_copies.measure(machine),
    "allocation": lambda machine, nixl: allocation.measure(),
    "arguments": lambda machine, nixl: arguments.measure(machine),
    "layers": lambda machine, nixl: layers.measure(),
    "links": lambda machine, nixl: links.measure(),
    "start-up": lambda machine, nixl: start_up.measure(),
    "parts": lambda machine, nixl: parts.measure(),
    "curves": curves.measure,
}
