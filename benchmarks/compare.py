"""Say what became slower or faster between two result files: ``python benchmarks/compare.py OLD.json NEW.json``.

A row has changed if its medians are further apart than the runs of both files are spread (from their first to their
third quartile), and by more than a tenth. Where a row was measured beside a limit, the limit's own change is taken
out first: a machine that is slower today does not make the library slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

LEAST = 1.10  # changes below it are noise, however even the runs are: a machine is not the same every day

Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """A row of both files.

    Attributes
    ----------
    topic, name : str
    old, new : float
        Medians: as many times the limit where both files have one, else in the unit of the row.
    noise : float
        Share of `old` by which `new` may differ without meaning anything.
    """

    topic: str
    name: str
    old: float
    new: float
    noise: float

    @property
    def times(self) -> float:
        return self.new / self.old

    @property
    def slower(self) -> bool:
        return self.times > 1 + self.noise

    @property
    def faster(self) -> bool:
        return self.times < 1 / (1 + self.noise)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Compare the rows that two documents have in common, in the order of the new one."""
    before = _rows(old)
    for key, row in _rows(new).items():
        earlier = before.get(key)
        if earlier is None or earlier["unit"] != row["unit"] or not earlier["median"] > 0 or not row["median"] > 0:
            continue
        beside_limit = bool(earlier["limit_us"]) and bool(row["limit_us"])
        scales = (earlier["limit_us"], row["limit_us"]) if beside_limit else (1.0, 1.0)
        noise = max(_spread(earlier) + _spread(row), LEAST - 1)
        yield Change(*key, earlier["median"] / scales[0], row["median"] / scales[1], noise)


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises
    ------
    ValueError
        It is none.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or "rows" not in document:
        raise ValueError(f"{path} holds no results of the benchmarks: it has no rows")
    return document


def _rows(document: dict[str, Any]) -> Rows:
    return {(row["topic"], row["name"]): row for row in document["rows"]}


def _spread(row: dict[str, Any]) -> float:
    """Half the distance of the quartiles, as a share of the median."""
    return float(row["p75"] - row["p25"]) / 2 / float(row["median"])


@click.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(old: Path, new: Path) -> None:
    """Say what became slower or faster from OLD to NEW.

    Exit status: 0 if nothing became slower, 1 if something did, 2 if a file holds no results.
    """
    try:
        before, after = load(old), load(new)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    changes = list(compare(before, after))
    changed = [change for change in changes if change.slower or change.faster]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if changed:
        console.print(_table(changed))
    if before["machine"]["cpu"] != after["machine"]["cpu"]:
        console.print("The files are from different processors; only what has a limit can be compared.")
    slower = sum(change.slower for change in changed)
    console.print(f"{len(changes)} rows compared: {slower} slower, {len(changed) - slower} faster")
    sys.exit(1 if slower else 0)


def _table(changes: list[Change]) -> Table:
    table = Table()
    table.add_column("topic")
    table.add_column("operation")
    for column in ("old", "new", "time", "noise"):
        table.add_column(column, justify="right")
    for change in changes:
        colour = "red" if change.slower else "green"
        times = f"[{colour}]x {change.times:.2f}[/{colour}]"
        noise = f"{change.noise:.0%}"
        table.add_row(change.topic, change.name, f"{change.old:.3g}", f"{change.new:.3g}", times, noise)
    return table


if __name__ == "__main__":
    main()
