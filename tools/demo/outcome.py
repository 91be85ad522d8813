"""What a run of the demo measured and found."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_datadist.tools.demo.messages import Answered, PoolLevel, Prefilled, Pulled, Referenced
from llm_datadist.tools.demo.prompts import Request

HOST_MEMORY, ASCEND, SIMULATOR = "host", "ascend", "simulator"


@dataclass
class RequestRecord:
    """One request; the fields fill in the order in which things happen to it."""

    request: Request
    prompt_tokens: int = 0
    prefilled: Prefilled | None = None
    pulled: Pulled | None = None
    answered: Answered | None = None
    reference: Referenced | None = None
    prefilled_by: str = ""  # name of a service; empty for the worker of this host
    decoded_by: str = ""
    attempts: int = 1

    @property
    def gigabytes_per_s(self) -> float | None:
        """Speed of the pull, 10^9 bytes a second."""
        return self.pulled.nbytes / self.pulled.pull_s / 1e9 if self.pulled else None

    @property
    def first_decoded_token_s(self) -> float | None:
        """Seconds from the start of the prefill to the first token that the decode process made."""
        if self.prefilled is None or self.answered is None or self.answered.first_decoded_s is None:
            return None
        return self.answered.first_decoded_s - self.prefilled.started_s

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the decode process for this request; None if it had nothing to decode."""
        if self.answered is None or len(self.answered.token_ids) < 2:
            return None
        return (len(self.answered.token_ids) - 1) / self.answered.decode_s

    @property
    def identical(self) -> bool:
        """Whether the answer is the reference, token for token."""
        if self.answered is None or self.reference is None:
            return False
        return self.answered.token_ids == self.reference.token_ids

    @property
    def same_logits(self) -> bool:
        """Whether even the logits are those of the reference, bit for bit."""
        if self.answered is None or self.reference is None:
            return False
        return self.answered.logits_checksum == self.reference.logits_checksum


@dataclass
class Outcome:
    """A whole run."""

    mode: str
    max_new_tokens: int
    records: list[RequestRecord]
    pools: dict[str, PoolLevel] = field(default_factory=dict)  # by the name of the worker
    seconds: float = 0.0
    device: str = HOST_MEMORY  # where caches lie: host, ascend or simulator

    @property
    def identical(self) -> bool:
        """Whether all answers are the reference."""
        return all(record.identical for record in self.records)

    @property
    def same_logits(self) -> bool:
        """Whether the logits of all answers are those of the reference, bit for bit."""
        return all(record.same_logits for record in self.records)

    @property
    def pools_empty(self) -> bool:
        """Whether all processes that were there at the end gave all KV memory back."""
        return bool(self.pools) and all(level.used == 0 for level in self.pools.values())

    @property
    def passed(self) -> bool:
        """The verdict."""
        return self.identical and self.pools_empty
