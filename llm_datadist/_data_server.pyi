from llm_datadist._core import PeerMemory

class DataServer(PeerMemory):
    def serve(self, fd: int) -> None: ...
