"""Run the benchmarks: ``python -m benchmarks``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from .limits import Limits
from .peer_reads import PEERS, PeerReads, missing_peers
from .plots import draw
from .results import as_document, save
from .table import as_table
from .topics import TOPICS

PEERS_PYTHON = Path("build/peers/bin/python")
_WIDTH = 150  # columns, where the output is no terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only", "names", multiple=True, type=click.Choice(list(TOPICS)), help="Topic to measure; may be given many times."
)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here too.")
@click.option(
    "--peers/--no-peers",
    "peers",
    default=None,
    help="Measure others beside us.  [default: if build/peers exists]",
)
@click.option(
    "--peers-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=PEERS_PYTHON if PEERS_PYTHON.exists() else None,
    help="Interpreter of an environment that has them.  [default: that of make bench-peers]",
)
def main(names: tuple[str, ...], path: Path | None, peers: bool | None, peers_python: Path | None) -> None:
    """Measure how fast KV caches travel, beside the limits of this machine.

    A run of all topics also writes benchmarks/results/<date>.json and draws its curves beside it. Let the machine do
    nothing else meanwhile.
    """
    if peers and peers_python is None:
        raise click.UsageError("--peers needs the environment of 'make bench-peers', or --peers-python")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    rows = []
    with ExitStack() as opened:
        others = []
        if peers_python is not None and peers is not False:
            missing = dict(missing_peers(str(peers_python)))
            for name, reason in missing.items():
                console.print(f"without {name}: {reason}")
            others = [opened.enter_context(PeerReads(name, str(peers_python))) for name in PEERS if name not in missing]
        limits = opened.enter_context(Limits())
        for name in names or TOPICS:
            with console.status(f"measuring {name}"):
                measured = list(TOPICS[name](limits, others))
            console.print(as_table(measured))
            rows += measured
    document = as_document(rows, [peer.name for peer in others])
    if path is not None:
        save(document, path)
    if not names:
        console.print(f"written to {save(document)}")
        try:
            for picture in draw(document):
                console.print(f"drawn in {picture}")
        except ImportError:
            console.print("no plots without matplotlib: pip install 'llm_datadist[bench]'")


if __name__ == "__main__":
    main()
