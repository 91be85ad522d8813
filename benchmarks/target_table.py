"""What a result file says of the targets, as a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .table import number


def lines(document: dict[str, Any]) -> Iterator[str]:
    """Give the table line by line."""
    yield "| what | median | GB/s | measured | target | met |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in document["rows"]:
        for target in row["targets"]:
            speed = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}"
            measured = f"{number(target['value'])} {target['what']}"
            wanted = f"{target['relation']} {target['bound']:g}"
            met = "yes" if target["met"] else "no"
            yield f"| {row['name']} | {number(row['median'])} {row['unit']} | {speed} | {measured} | {wanted} | {met} |"


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: Path) -> None:
    """Print the table of RESULTS."""
    for line in lines(json.loads(results.read_text())):
        click.echo(line)


if __name__ == "__main__":
    main()
