"""The rows of a topic as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .measurement import Row, Target

_COLUMNS = ("runs", "median", "p99", "", "GB/s")


def as_table(rows: Sequence[Row]) -> Table:
    """Show rows of one topic."""
    table = Table(title=rows[0].topic, title_justify="left")
    table.add_column("operation")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("measured / target")
    for row in rows:
        speed = row.gb_per_s
        table.add_row(
            row.name,
            str(len(row.values)),
            number(row.median),
            number(row.quantile(0.99)),
            row.unit,
            "" if speed is None else f"{speed:.1f}",
            "\n".join([*map(verdict, row.targets), *([row.note] if row.note else [])]),
        )
    return table


def verdict(target: Target) -> str:
    """Say how a target was met, in the markup of rich."""
    relation = ">=" if target.at_least else "<="
    colour, word = ("green", "met") if target.met else ("red", "missed")
    return f"{target.value:.3g} {target.what} ({relation} {target.bound:g}) [{colour}]{word}[/{colour}]"


def number(value: float) -> str:
    """Give three digits that count, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
