"""The run as lines of text, for logs and pipes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from llm_datadist.tools.demo.outcome import RequestRecord
from llm_datadist.tools.demo.screen import Screen


class LineScreen(Screen):
    """Prints a line when something has happened to a request, and its text when it is complete."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def loading(self, what: str) -> None:
        self._line(what)

    def serving(self, records: Sequence[RequestRecord], where: str) -> None:
        tokens = sum(record.prompt_tokens for record in records)
        self._line(f"{len(records)} requests, {tokens} prompt tokens")
        self._line(where)

    def prefilled(self, record: RequestRecord) -> None:
        assert record.prefilled is not None
        done = f"#{record.request.number} prefilled{_by(record.prefilled_by)}"
        self._line(f"{done}: {record.prompt_tokens} tokens in {record.prefilled.prefill_s * 1e3:.0f} ms")

    def pulled(self, record: RequestRecord) -> None:
        assert record.pulled is not None
        pulled = record.pulled
        done = f"#{record.request.number} pulled{_by(record.decoded_by)}"
        how = f"over {pulled.transport} in {pulled.pull_s * 1e3:.2f} ms"
        self._line(f"{done}: {pulled.nbytes:,} bytes {how} into {pulled.place}")

    def answered(self, record: RequestRecord) -> None:
        assert record.answered is not None
        first_line = record.request.prompt.partition("\n")[0]
        self._line(f"#{record.request.number} answered: {first_line}")
        for line in record.answered.text.splitlines():
            self._line(f"    {line}")

    def retried(self, record: RequestRecord, reason: str) -> None:
        self._line(f"#{record.request.number} again: {reason}")

    def checking(self, done: int, total: int) -> None:
        if done == 0:
            self._line("the same prompts in one process, for comparison ...")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _by(name: str) -> str:
    return f" by {name}" if name else ""
