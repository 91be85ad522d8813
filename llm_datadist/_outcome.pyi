from enum import IntEnum

class Outcome(IntEnum):
    DONE = 0
    KEY_UNKNOWN = 1
    SLOT_UNKNOWN = 2
    SOURCE_RANGE = 3
    SOURCE_TENSORS = 4
    TENSOR_COUNT = 5
    BLOCK_SIZE = 6
    SOURCE_BLOCK = 7
    CACHE_RELEASED = 8
    TIMED_OUT = 9
    PEER_DEAD = 10
    REVOKED = 11
    LINK_CLOSED = 12
    BAD_DIRECTORY = 13
    NO_MEMORY = 14
    TARGET_ADDRESS = 15
    STALE_BLOCKS = 16
    MEMORY_FAULT = 17
    MEMORY_DENIED = 18
    TARGET_READ_ONLY = 19
    TARGET_TENSORS = 20
    TARGET_BLOCK = 21
    TARGET_RANGE = 22
    CORRUPTED = 23
    DEVICE_FAILED = 24
    NO_COMMUNICATOR = 25

class TransferFault(Exception):
    outcome: Outcome
    remote_tensors: int
    remote_slots: int
    remote_stride: int
    detail: str
    def __init__(
        self,
        outcome: Outcome,
        remote_tensors: int = 0,
        remote_slots: int = 0,
        remote_stride: int = 0,
        detail: str = "",
    ) -> None: ...
