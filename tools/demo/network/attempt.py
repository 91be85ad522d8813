"""One way of a request through the services, from its prompt to its answer; if one of them fails, another begins."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llm_datadist.tools.demo.messages import Prefilled
from llm_datadist.tools.demo.network.service_connection import ServiceConnection
from llm_datadist.tools.demo.outcome import RequestRecord


@dataclass(eq=False)
class Attempt:
    """Where a request is.

    Attributes
    ----------
    request : int
        Its number for the services, which no other attempt has, of whatever driver.
    record : RequestRecord
        What is shown of it.
    prompt, decoder : ServiceConnection
        Who works on it; no decoder yet before its prefill is done.
    prefilled : Prefilled or None
        What the decoder is told.
    pulled : bool
        Whether it needs its prompt no more.
    heard_s : float
        When the last word of it came.
    pieces : int
        Pieces of text that came.
    first_decoded_s : float or None
        When the first token of the decoder came.
    """

    request: int
    record: RequestRecord
    prompt: ServiceConnection
    decoder: ServiceConnection | None = None
    prefilled: Prefilled | None = None
    pulled: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    pieces: int = 0
    first_decoded_s: float | None = None

    @property
    def needs_decoder(self) -> bool:
        """Whether it is prefilled, and nobody pulls it yet."""
        return self.prefilled is not None and self.decoder is None

    def needs(self, service: ServiceConnection) -> bool:
        """Tell whether it cannot go on without a service."""
        return service is self.decoder or (service is self.prompt and not self.pulled)
