"""The curves of a result file as pictures: ``python -m benchmarks.plots RESULTS.json``; needs matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from . import allocation, curves, links, registry
from .curves import LIMIT, MEMCPY, OURS, line
from .peer_reads import MOONCAKE, NIXL
from .results import FOLDER

Row = dict[str, Any]
Points = tuple[list[float], list[float]]

# Colours that stay apart in greys and for the colour-blind.
_STYLE: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0072b2", "marker": "o", "linewidth": 2.2},
    LIMIT: {"color": "#444444", "marker": "", "linestyle": "--"},
    MEMCPY: {"color": "#999999", "marker": "", "linestyle": ":"},
    NIXL: {"color": "#d55e00", "marker": "s"},
    MOONCAKE: {"color": "#009e73", "marker": "^"},
}
_DPI = 130


def draw(document: dict[str, Any], folder: Path = FOLDER) -> list[Path]:
    """Draw what a document has the curves for; gives the paths.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window
    folder.mkdir(exist_ok=True)
    rows = document["rows"]
    pictures = {
        "block_size": _block_size,
        "message_size": _message_size,
        "links": _links,
        "growth": _growth,
        "registry": _registry,
    }
    return [
        _save(figure, folder / f"{name}.png", document)
        for name, picture in pictures.items()
        for figure in picture(rows)
    ]


def _points(rows: list[Row], curve: str, value: Callable[[Row], float]) -> Points | None:
    """Give the points of a curve, or None if it was not measured."""
    found = [(row["point"]["at"], value(row)) for row in rows if row["point"] and row["point"]["curve"] == curve]
    if not found:
        return None
    at, values = zip(*sorted(found))
    return list(at), list(values)


def _speed(row: Row) -> float:
    return float(row["gb_per_s"])


def _median(row: Row) -> float:
    return float(row["median"])


# ---- pictures; each gives a figure, or none if a curve is missing


def _block_size(rows: list[Row]) -> Iterator[Any]:
    yield from _compared(rows, curves.BLOCK_SIZE_CURVE, _speed, "bytes of a block", "GB/s", "64 MiB in random order")


def _message_size(rows: list[Row]) -> Iterator[Any]:
    names = ("bytes of the message", "us", "One range in each of two tensors")
    yield from _compared(rows, curves.MESSAGE_CURVE, _median, *names, logarithmic=True)


def _compared(
    rows: list[Row],
    curve: str,
    value: Callable[[Row], float],
    across: str,
    up: str,
    title: str,
    *,
    logarithmic: bool = False,
) -> Iterator[Any]:
    from matplotlib import pyplot

    if _points(rows, line(curve, OURS), value) is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, style in _STYLE.items():
        points = _points(rows, line(curve, name), value)
        if points is not None:
            axes.plot(*points, label=name, **style)
    axes.set_xscale("log", base=2)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain)
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda at, _: _size(at))
    figure.legend(loc="lower left", bbox_to_anchor=(0, 0.02), ncols=len(_STYLE), frameon=False, fontsize=8)
    _label(axes, across, up, title)
    yield figure


def _links(rows: list[Row]) -> Iterator[Any]:
    panels = (
        (links.SET_UP_CURVE, "links", "s", "Set-up, 16 links a call"),
        (links.LATENCY_CURVE, "links", "us", "pull_cache of 2 x 16 KiB beside idle links"),
    )
    yield from _panels(rows, panels)


def _growth(rows: list[Row]) -> Iterator[Any]:
    panels = (
        (line(curves.BLOCKS_CURVE, OURS), "blocks of 16 KiB, in 2 tensors", "us", "pull_blocks"),
        (line(curves.TENSORS_CURVE, OURS), "tensors, 1 block of 16 KiB in each", "us", "pull_blocks"),
        (line(curves.CACHES_CURVE, OURS), "other caches at the prompt", "us", "pull_cache of 2 x 16 KiB"),
        (allocation.CURVE, "live caches", "us", "allocate_cache + deallocate_cache, 60 tensors"),
    )
    yield from _panels(rows, panels)


def _registry(rows: list[Row]) -> Iterator[Any]:
    across = "simulated members"
    panels = (
        (registry.ANNOUNCEMENTS_CURVE, across, "1/s", "Announcements a second"),
        (registry.LOOK_UP_CURVE, across, "us", "Look-up of one member by its label"),
        (registry.LOOK_UP_P99_CURVE, across, "us", "The same, p99"),
        (registry.LIST_CURVE, across, "us", "List of all members"),
        (registry.MEMORY_CURVE, across, "MiB", "Memory of the registry for them"),
        (registry.NEWS_CURVE, across, "ms", "A change, until all have heard of it"),
        (registry.DISCOVERY_CURVE, across, "s", "All come at once, until each knows each"),
    )
    yield from _panels(rows, panels)


def _panels(rows: list[Row], panels: tuple[tuple[str, str, str, str], ...]) -> Iterator[Any]:
    """Draw curves of ours side by side, two in a line."""
    from matplotlib import pyplot

    found = [(_points(rows, curve, _median), names) for curve, *names in panels]
    if any(points is None for points, _ in found):
        return
    lines = -(-len(found) // 2)
    figure, grid = pyplot.subplots(lines, 2, figsize=(9, 3.4 * lines), squeeze=False)
    for axes, (points, (across, up, title)) in zip(grid.flat, found):
        assert points is not None
        at, values = points
        axes.plot(at, values, **_STYLE[OURS])
        axes.set_xscale("symlog" if at[0] == 0 else "log")
        axes.set_xticks(at, [_plain(number) for number in at], rotation=45, fontsize=8)
        axes.set_xticks([], minor=True)
        if max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain)
            axes.yaxis.set_minor_formatter(lambda *_: "")
        else:
            axes.set_ylim(0, 1.3 * max(values))
        _label(axes, across, up, title)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    yield figure


def _label(axes: Any, across: str, up: str, title: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path, document: dict[str, Any]) -> Path:
    from matplotlib import pyplot

    machine = document["machine"]
    words = f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {document['date'][:10]}; medians"
    figure.text(0.99, 0.005, words, ha="right", fontsize=6, color="#777777")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _plain(number: float, place: object = None) -> str:
    return f"{number:,g}"


def _size(nbytes: float) -> str:
    power = min(max(int(nbytes).bit_length() - 1, 0) // 10, 3)
    return f"{nbytes / 1024**power:.0f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: Path) -> None:
    """Draw the curves of RESULTS into benchmarks/results."""
    for path in draw(json.loads(results.read_text())):
        click.echo(path)


if __name__ == "__main__":
    main()
