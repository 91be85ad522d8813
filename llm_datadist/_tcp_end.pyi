from llm_datadist._link_end import LinkEnd
from llm_datadist._local import BlockPairs, LocalCache

class TcpPeer(LinkEnd):
    def __init__(self, summed: bool) -> None: ...
    def _want_channel(self) -> None: ...
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
    def push(
        self,
        source: LocalCache,
        source_first: int,
        addresses: list[int],
        source_slot: int,
        pairs: BlockPairs | None,
        block_nbytes: int,
        deadline_ns: int,
    ) -> None: ...
    def push_to_key(
        self,
        source: LocalCache,
        source_first: int,
        tensors: int,
        source_slot: int,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        target_first: int,
        pairs: BlockPairs | None,
        block_nbytes: int,
        deadline_ns: int,
    ) -> None: ...
