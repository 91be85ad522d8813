"""What a screen is told while the demo runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from llm_datadist.tools.demo.outcome import RequestRecord


class Screen:
    """A screen that shows nothing; the others override what they show."""

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def loading(self, what: str) -> None:
        """Show that something slow begins."""

    def serving(self, records: Sequence[RequestRecord], where: str) -> None:
        """Show that the prompts are tokenised, where the work is done, and that the first prefill begins."""

    def prefilling(self, request: int, tokens: int) -> None:
        """Show how many tokens of a prompt are done."""

    def prefilled(self, record: RequestRecord) -> None:
        """Show that the prefill of a request is done."""

    def pulled(self, record: RequestRecord) -> None:
        """Show that the KV cache of a request has arrived."""

    def decoded(self, pieces: Sequence[tuple[int, str]]) -> None:
        """Show the pieces of text by which answers grew, each with its request."""

    def answered(self, record: RequestRecord) -> None:
        """Show a complete answer."""

    def retried(self, record: RequestRecord, reason: str) -> None:
        """Show that a request begins again from its prompt."""

    def checking(self, done: int, total: int) -> None:
        """Show how many answers of the reference are there."""
