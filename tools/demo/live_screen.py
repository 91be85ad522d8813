"""The run on a terminal: a progress bar, the answers as they grow, and each complete answer above them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from llm_datadist.tools.demo.outcome import RequestRecord
from llm_datadist.tools.demo.screen import Screen

_LINES_PER_ANSWER = 2  # of an answer that grows: its end is shown


class LiveScreen(Screen):
    """Redraws the moving part at the bottom of the terminal, and prints above it what is complete."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, count="")
        self._prefilled_tokens = 0
        self._prompt_tokens = 0
        self._growing: dict[int, tuple[str, str]] = {}  # request -> where it is decoded, its text up to now
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=12, transient=True)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def loading(self, what: str) -> None:
        self._progress.update(self._task, description=what, total=None)

    def serving(self, records: Sequence[RequestRecord], where: str) -> None:
        self._print(where, "bold")
        self._prompt_tokens = sum(record.prompt_tokens for record in records)
        self._advance("prefill", 0, self._prompt_tokens, "tokens")

    def prefilling(self, request: int, tokens: int) -> None:
        self._advance(f"prefill #{request}", self._prefilled_tokens + tokens, self._prompt_tokens, "tokens")

    def prefilled(self, record: RequestRecord) -> None:
        self._prefilled_tokens += record.prompt_tokens

    def pulled(self, record: RequestRecord) -> None:
        assert record.pulled is not None
        self._growing[record.request.number] = (record.pulled.place, "")

    def decoded(self, pieces: Sequence[tuple[int, str]]) -> None:
        for request, piece in pieces:
            place, text = self._growing[request]
            self._growing[request] = (place, text + piece)

    def answered(self, record: RequestRecord) -> None:
        assert record.answered is not None
        del self._growing[record.request.number]
        first_line = record.request.prompt.partition("\n")[0]
        self._print(f"\n#{record.request.number} {first_line}", "bold cyan")
        self._print(record.answered.text)

    def retried(self, record: RequestRecord, reason: str) -> None:
        self._growing.pop(record.request.number, None)
        if record.prefilled is not None:
            self._prefilled_tokens -= record.prompt_tokens
        self._print(f"#{record.request.number} again: {reason}", "yellow")

    def checking(self, done: int, total: int) -> None:
        self._advance("the same prompts in one process", done, total, "answers")

    def _advance(self, description: str, done: int, total: int, unit: str) -> None:
        count = f"{done}/{total} {unit}"
        self._progress.update(self._task, description=description, completed=done, total=total, count=count)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style))

    def _render(self) -> RenderableType:
        # The display thread of rich calls this; `dict` makes a copy in one step, so the main thread may go on.
        growing = sorted(dict(self._growing).items())
        return Group(*(self._tail(request, *state) for request, state in growing), self._progress)

    def _tail(self, request: int, place: str, text: str) -> Text:
        label = f"#{request} ({place}) "
        room = max(20, self._console.width * _LINES_PER_ANSWER - len(label) - 1)
        line = " ".join(text.split())
        if len(line) > room:
            line = "…" + line[1 - room :]
        return Text.assemble((label, "bold cyan"), line)
