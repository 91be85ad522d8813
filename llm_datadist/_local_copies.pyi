from enum import IntEnum

from llm_datadist._local import BlockPairs, LocalCache

class LocalOutcome(IntEnum):
    DONE = 0
    CACHE_RELEASED = 1
    TIMED_OUT = 2
    CLOSED = 3

class LocalCopier:
    def __init__(self, threads: int) -> None: ...
    def close(self, deadline_ns: int) -> bool: ...
    def copy_slot(
        self,
        target: LocalCache,
        source: LocalCache,
        target_slot: int,
        source_slot: int,
        offset: int,
        nbytes: int,
        deadline_ns: int,
    ) -> LocalOutcome: ...
    def copy_blocks(self, cache: LocalCache, pairs: BlockPairs, deadline_ns: int) -> LocalOutcome: ...
    def swap_blocks(
        self,
        cache: LocalCache,
        host: list[int],
        pairs: BlockPairs,
        block_nbytes: int,
        swap_in: bool,
        deadline_ns: int,
    ) -> LocalOutcome: ...
    def copy_range(
        self,
        cache: LocalCache,
        tensor: int,
        offset: int,
        host: int,
        nbytes: int,
        into_cache: bool,
        deadline_ns: int,
    ) -> LocalOutcome: ...
