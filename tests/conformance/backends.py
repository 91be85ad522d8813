"""What the suite runs on: a kind of device and a transport, each combination once."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Backend:
    """A device and a transport, and the options of `LLMDataDist.init` that select them."""

    device: str
    transport: str
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.device}-{self.transport}"


BACKENDS = [Backend("host", "shared_memory")]
