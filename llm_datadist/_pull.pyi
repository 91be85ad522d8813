from llm_datadist._core import PeerMemory
from llm_datadist._local import BlockPairs, LocalCache

class PeerSource(PeerMemory):
    def pull_cache(
        self,
        target: LocalCache,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        local_slot: int,
        nbytes: int,
        source_first: int,
        source_count: int,
        target_first: int,
        target_count: int,
        source_offset: int,
        target_offset: int,
        consume: bool,
        deadline_ns: int,
    ) -> None: ...
    def pull_blocks(
        self,
        target: LocalCache,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        pairs: BlockPairs,
        source_first: int,
        source_count: int,
        target_first: int,
        target_count: int,
        token: bytes | None,
        deadline_ns: int,
    ) -> None: ...
