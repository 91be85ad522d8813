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
        deadline_ns: int,
    ) -> None: ...
