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

    def serving(self, records: Sequence[RequestRecord], prefill_pid: int, decode_pid: int) -> None:
        tokens = sum(record.prompt_tokens for record in records)
        self._line(f"{len(records)} requests, {tokens} prompt tokens")
        self._line(f"prefill in process {prefill_pid}, decode in process {decode_pid}")

    def prefilled(self, record: RequestRecord) -> None:
        assert record.prefilled is not None
        prefill_ms = record.prefilled.prefill_s * 1e3
        self._line(f"#{record.request.number} prefilled: {record.prompt_tokens} tokens in {prefill_ms:.0f} ms")

    def pulled(self, record: RequestRecord) -> None:
        assert record.pulled is not None
        _, place, nbytes, pull_s = record.pulled
        self._line(f"#{record.request.number} pulled: {nbytes:,} bytes in {pull_s * 1e3:.2f} ms into {place}")

    def answered(self, record: RequestRecord) -> None:
        assert record.answered is not None
        first_line = record.request.prompt.partition("\n")[0]
        self._line(f"#{record.request.number} answered: {first_line}")
        for line in record.answered.text.splitlines():
            self._line(f"    {line}")

    def checking(self, done: int, total: int) -> None:
        if done == 0:
            self._line("the same prompts in one process, for comparison ...")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
