"""Names of caches inside the engine: a kind and two numbers."""

from __future__ import annotations

from enum import IntEnum


class KeyKind(IntEnum):
    """Name spaces of keys; the numbers stand in the shared directory (`_core.pxd`)."""

    ORDINARY = 1
    PREFIX = 2
    BLOCKS = 3
    CACHE = 4


# (ORDINARY, req_id, model_id), (PREFIX, prefix_id, model_id), (BLOCKS, 0, model_id) or (CACHE, cache_id, slot)
KeyName = tuple[int, int, int]
