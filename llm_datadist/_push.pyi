from llm_datadist._core import PeerMemory
from llm_datadist._local import BlockPairs, LocalCache

class PeerTarget(PeerMemory):
    def push(
        self,
        source: LocalCache,
        source_first: int,
        addresses: list[int],
        source_slot: int,
        pairs: BlockPairs | None,
        deadline_ns: int,
    ) -> None: ...
