from llm_datadist._push import PeerTarget
from llm_datadist._segment import Memory, Segment

class TcpServer(PeerTarget):
    def __init__(
        self, pool: Memory, directory: Segment, ledger: Segment, claims: Segment, peer_writes: bool
    ) -> None: ...
    def serve(self, fd: int) -> None: ...
