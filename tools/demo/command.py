"""The sub-command ``demo``: options, exit status, and which screen shows the run."""

from __future__ import annotations

import json
import sys

import click

from llm_datadist.tools.demo.prompts import choose_requests
from llm_datadist.tools.demo.requirements import missing_requirement

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@click.command()
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="A message to answer; may be given many times."
)
@click.option(
    "--requests",
    "count",
    type=click.IntRange(1, 1000),
    help="Requests to answer: the prompts in turn.  [default: 8, or one for each --prompt]",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1, 512), default=48, show_default=True, help="Length of an answer."
)
@click.option(
    "--mode",
    type=click.Choice(["cache", "blocks"]),
    default="cache",
    show_default=True,
    help="How KV is kept and pulled: one contiguous cache for each request, or paged blocks with block tables.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def demo(prompts: tuple[str, ...], count: int | None, max_new_tokens: int, mode: str, as_json: bool) -> None:
    """Answer with SmolLM2-135M: prefill in one process, decode in another.

    The KV cache of each request is pulled by the decode process as soon as its prefill is done. In the end the same
    model answers the same prompts in one process, and the token ids must be identical.

    Exit status: 0 if they are and all KV memory was given back, 1 if not or if a process failed, 2 for bad input or a
    missing package, 130 after Ctrl-C.
    """
    missing = missing_requirement()
    if missing is not None:
        click.echo(f"llm-datadist demo: {missing}", err=True)
        sys.exit(EXIT_USAGE)

    try:
        sys.exit(_run(prompts, count, max_new_tokens, mode, as_json))
    except KeyboardInterrupt:
        click.echo("llm-datadist demo: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _run(prompts: tuple[str, ...], count: int | None, max_new_tokens: int, mode: str, as_json: bool) -> int:
    """Run the demo, print its result, and return the exit status."""
    # Only now, because these import the packages that the caller has looked for.
    from llm_datadist.tools.demo.choose_screen import choose_screen, make_console
    from llm_datadist.tools.demo.coordinator import run_demo
    from llm_datadist.tools.demo.errors import BadInputError, DemoError
    from llm_datadist.tools.demo.report import as_document, print_report

    console = make_console()
    try:
        with choose_screen(console, quiet=as_json) as screen:
            outcome = run_demo(choose_requests(prompts, count), max_new_tokens, mode, screen)
    except DemoError as error:
        click.echo(f"llm-datadist demo: {error}", err=True)
        return EXIT_USAGE if isinstance(error, BadInputError) else EXIT_FAILED
    if as_json:
        click.echo(json.dumps(as_document(outcome), indent=2))
    else:
        print_report(console, outcome)
    return 0 if outcome.passed else EXIT_FAILED
