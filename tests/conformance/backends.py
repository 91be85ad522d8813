"""What the suite runs on: a kind of device and a transport, each combination once."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_datadist.transports import private_memory
from tests import simulated_devices


@dataclass(frozen=True)
class Backend:
    """A device and a transport, and the options of `LLMDataDist.init` and the environment that select them.

    Attributes
    ----------
    link : str
        Transport that the description of a link names.
    private : str or None
        Way to registered memory that it names, if the tensors of a test are no memory of the pool.
    """

    device: str
    transport: str
    link: str
    private: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.device}-{self.transport}"


OVER_TCP = {"llm.Transport": "tcp"}

BACKENDS = [
    Backend("host", "shared_memory", "shared_memory"),
    Backend("host", "tcp", "tcp", options=OVER_TCP),
    # Most tests look into caches by `tensor_view`, so the simulator lets the host see the memory of its devices: a
    # deviation from hardware, which `tests/integration/test_ascend_transfers.py` does without.
    Backend("ascend", "hccl", "hccl", options=simulated_devices.OPTION),
]

# Ways to memory that a program has registered: tensors that it has placed in the pool, and memory of its own.
MEMORY_BACKENDS = [
    *BACKENDS,
    *(
        Backend("host", way, "shared_memory", way, environment={private_memory.VARIABLE: way})
        for way in (private_memory.PROCESS_VM, private_memory.DATA_SERVER)
    ),
    Backend("host", "tcp-private", "tcp", private_memory.DATA_SERVER, options=OVER_TCP),
    Backend("ascend", "hccl-private", "hccl", private_memory.DATA_SERVER, options=simulated_devices.OPTION),
]
