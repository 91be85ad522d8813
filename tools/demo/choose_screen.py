"""Which screen shows the run: none, lines, or a live display."""

from __future__ import annotations

import sys

from rich.console import Console

from llm_datadist.tools.demo.line_screen import LineScreen
from llm_datadist.tools.demo.live_screen import LiveScreen
from llm_datadist.tools.demo.screen import Screen

_LOG_WIDTH = 120  # columns, where the output is no terminal


def make_console() -> Console:
    """Return the console of the standard output; wide enough for the table where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)


def choose_screen(console: Console, quiet: bool) -> Screen:
    """Return no screen if `quiet`, a live one on a terminal, and lines elsewhere."""
    if quiet:
        return Screen()
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return LiveScreen(console)
    return LineScreen(console)
