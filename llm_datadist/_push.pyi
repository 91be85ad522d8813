from llm_datadist._local import BlockPairs, LocalCache
from llm_datadist._pull import PeerSource

class PeerTarget(PeerSource):
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
