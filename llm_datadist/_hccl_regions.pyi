from llm_datadist._acl import Device
from llm_datadist._hccl import Communicator
from llm_datadist._segment import Memory

class RegisteredMemory:
    def __init__(self, device: Device, memory: Memory) -> None: ...
    @property
    def device(self) -> Device: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    def close(self) -> None: ...

class OneSidedCommunicator(Communicator):
    def __init__(
        self,
        device: Device,
        rank_table: str,
        rank: int,
        name: str,
        buffer_mib: int,
        exec_timeout_s: int,
        memory: RegisteredMemory,
    ) -> None: ...
    def prepare(self, timeout_s: int) -> None: ...
