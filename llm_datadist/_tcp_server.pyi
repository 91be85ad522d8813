from llm_datadist._push import PeerTarget
from llm_datadist._segment import Segment

class TcpServer(PeerTarget):
    def __init__(
        self, pool: Segment, directory: Segment, ledger: Segment, claims: Segment, peer_writes: bool
    ) -> None: ...
    def serve(self, fd: int) -> None: ...
