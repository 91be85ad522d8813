"""The sub-command ``bench``: options and exit status."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

from llm_datadist.tools.bench.byte_size import size, size_text
from llm_datadist.tools.bench.case import all_cases
from llm_datadist.tools.bench.endpoint import POOL, REGISTERED
from llm_datadist.tools.bench.measuring import PULL, PUSH, BenchError, Plan, measure
from llm_datadist.tools.bench.report import as_document, print_report

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LOG_WIDTH = 120  # columns, where the output is no terminal


@click.command()
@click.option(
    "--size",
    "sizes",
    type=size,
    multiple=True,
    default=["32K", "1M", "64M"],
    show_default=True,
    help="Bytes of a message, all tensors together; may be given many times.",
)
@click.option(
    "--block",
    "blocks",
    type=size,
    multiple=True,
    default=["16K"],
    show_default=True,
    help="Bytes of a block, moved in random order; may be given many times. Messages that are smaller leave it out.",
)
@click.option("--contiguous/--no-contiguous", default=True, show_default=True, help="Move messages in one piece too.")
@click.option("--tensors", type=click.IntRange(1, 1024), default=2, show_default=True, help="Tensors of a cache.")
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Threads that a copy may use.  [default: one for each core]"
)
@click.option(
    "--direction", type=click.Choice([PULL, PUSH]), default=PULL, show_default=True, help="Who moves the bytes."
)
@click.option(
    "--memory",
    type=click.Choice([POOL, REGISTERED]),
    default=POOL,
    show_default=True,
    help="Where the caches lie: in a pool, which peers map, or in memory of the program.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 3600),
    default=1.0,
    show_default=True,
    help="How long each message is moved again and again.",
)
@click.option("--runs", type=click.IntRange(1, 10_000_000), help="How often instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def bench(
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    contiguous: bool,
    tensors: int,
    threads: int | None,
    direction: str,
    memory: str,
    seconds: float,
    runs: int | None,
    as_json: bool,
) -> None:
    """Measure how fast this host moves KV caches between two processes.

    Two processes are started and linked. One of them moves messages of each size, in one piece and in blocks, and every
    call is timed. The bytes are compared in the end. Percentiles that need more runs than there were show as "-".

    Exit status: 0, 1 if a process failed or memory is short, 2 for bad options, 130 after Ctrl-C.
    """
    try:
        cases = tuple(all_cases(sizes, blocks, tensors, contiguous))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not cases:
        raise click.UsageError("nothing to measure: no block fits into a message, and --no-contiguous was given")
    plan = Plan(cases, direction, memory, threads, seconds, runs)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    try:
        with console.status("starting") as status:
            if as_json:
                status.stop()
            result = measure(plan, lambda case: status.update(f"measuring {size_text(case.nbytes)}"))
    except BenchError as error:
        click.echo(f"llm-datadist bench: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        click.echo("llm-datadist bench: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        click.echo(json.dumps(as_document(plan, result), indent=2))
    else:
        print_report(console, plan, result)
