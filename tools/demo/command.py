"""The sub-command ``demo``: options, exit status, and which screen shows the run."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Callable

import click

from llm_datadist.tools.ascend_simulator import SimulatorMissing, environment, simulator
from llm_datadist.tools.demo.outcome import ASCEND, HOST_MEMORY, SIMULATOR
from llm_datadist.tools.demo.prompts import choose_requests
from llm_datadist.tools.demo.requirements import missing_requirement
from llm_datadist.tools.registry.client_options import address

if TYPE_CHECKING:
    from llm_datadist.tools.demo.outcome import Outcome
    from llm_datadist.tools.demo.screen import Screen

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _registry(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else address(context, parameter, value)


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
@click.option(
    "--device",
    type=click.Choice([HOST_MEMORY, ASCEND, SIMULATOR]),
    help="Where caches lie: in memory of the host, on devices 0 and 1, or on simulated devices.  [default: host]",
)
@click.option(
    "--registry",
    callback=_registry,
    metavar="TCP://HOST:PORT",
    help="Answer with the demo workers that are announced there, not with processes of this host.",
)
@click.option(
    "--min-prompts", type=click.IntRange(1), default=1, show_default=True, help="With --registry: prompts to wait for."
)
@click.option(
    "--min-decoders",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="With --registry: decoders to wait for.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="With --registry: seconds to wait for workers, at the start and later.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def demo(
    prompts: tuple[str, ...],
    count: int | None,
    max_new_tokens: int,
    mode: str,
    device: str | None,
    registry: str | None,
    min_prompts: int,
    min_decoders: int,
    wait: float,
    as_json: bool,
) -> None:
    """Answer with SmolLM2-135M: prefill in one process, decode in another.

    The KV cache of each request is pulled by the decode process as soon as its prefill is done. In the end the same
    model answers the same prompts in one process, and the token ids must be identical.

    With --device the caches lie on two devices, and are copied to and from arrays of the host, where the model
    computes.

    With --registry the work is done by services of a network (llm-datadist demo-worker), and a request whose services
    die begins again elsewhere.

    Exit status: 0 if they are and all KV memory was given back, 1 if not or if a process failed, 2 for bad input or a
    missing package, 130 after Ctrl-C.
    """
    if registry is not None and device is not None:
        raise click.UsageError("--device is for processes of this host; with --registry the workers decide")
    missing = missing_requirement()
    if missing is not None:
        click.echo(f"llm-datadist demo: {missing}", err=True)
        sys.exit(EXIT_USAGE)

    def run(screen: Screen) -> Outcome:
        # Only now, because these import the packages that were looked for.
        from llm_datadist.tools.demo.coordinator import run_demo
        from llm_datadist.tools.demo.network.network_demo import run_network_demo

        requests = choose_requests(prompts, count)
        if registry is None:
            with _on(device or HOST_MEMORY):
                return run_demo(requests, max_new_tokens, mode, screen, device or HOST_MEMORY)
        return run_network_demo(registry, requests, max_new_tokens, mode, screen, min_prompts, min_decoders, wait)

    try:
        sys.exit(_run(run, as_json))
    except SimulatorMissing as error:
        click.echo(f"llm-datadist demo: {error}", err=True)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        click.echo("llm-datadist demo: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _on(device: str) -> AbstractContextManager[None]:
    """Give the environment in which the processes use that device, whatever else there is."""
    return simulator() if device == SIMULATOR else environment({"LLM_DATADIST_DEVICE": device})


def _run(run: Callable[[Screen], Outcome], as_json: bool) -> int:
    """Run the demo, print its result, and return the exit status."""
    from llm_datadist.tools.demo.choose_screen import choose_screen, make_console
    from llm_datadist.tools.demo.errors import BadInputError, DemoError
    from llm_datadist.tools.demo.report import as_document, print_report

    console = make_console()
    try:
        with choose_screen(console, quiet=as_json) as screen:
            outcome = run(screen)
    except DemoError as error:
        click.echo(f"llm-datadist demo: {error}", err=True)
        return EXIT_USAGE if isinstance(error, BadInputError) else EXIT_FAILED
    if as_json:
        click.echo(json.dumps(as_document(outcome), indent=2))
    else:
        print_report(console, outcome)
    return 0 if outcome.passed else EXIT_FAILED
