"""The sub-command ``check``: options and exit status."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click
from rich.console import Console

from llm_datadist.tools.ascend_simulator import SimulatorMissing, simulator
from llm_datadist.tools.bench.byte_size import size
from llm_datadist.tools.check.checking import ASCEND, AUTOMATIC, HOST_MEMORY, SIMULATOR, Plan, Result, run_check
from llm_datadist.tools.check.report import as_document, print_report
from llm_datadist.tools.check.shapes import SMALLEST_BYTES

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_LOG_WIDTH = 120  # columns, where the output is no terminal


@click.command()
@click.option(
    "--device",
    "kind",
    type=click.Choice([AUTOMATIC, HOST_MEMORY, ASCEND, SIMULATOR]),
    default=AUTOMATIC,
    show_default=True,
    help="Where the caches lie; auto: on an Ascend device if there is one, else in memory of the host.",
)
@click.option("--device-id", type=click.IntRange(0), default=0, show_default=True, help="Device, of the visible ones.")
@click.option("--peer-device-id", type=click.IntRange(0), help="Device of the second process.  [default: the next one]")
@click.option("--local", is_flag=True, help="Only one device: no second process, no link.")
@click.option("--size", "nbytes", type=size, default="64M", show_default=True, help="Bytes of the large cache.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 7200),
    default=60.0,
    show_default=True,
    help="Seconds for each step.",
)
@click.option(
    "--simulator-library",
    type=click.Path(path_type=Path),
    help="With --device simulator: the library, in place of the one that is built from the source tree.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def check(
    kind: str,
    device_id: int,
    peer_device_id: int | None,
    local: bool,
    nbytes: int,
    timeout_s: float,
    simulator_library: Path | None,
    as_json: bool,
) -> None:
    """Check that caches can be allocated, copied, linked, pulled and pushed on this machine.

    Says what there is of Ascend, then takes step after step, with two processes on two devices, compares every byte,
    and prints how fast it was. It stops at the first step that fails, with the text of the vendor's library.

    Exit status: 0 if every step succeeded, 1 if not, 2 for bad options or a missing simulator, 130 after Ctrl-C.
    """
    if nbytes % SMALLEST_BYTES:
        raise click.UsageError(f"--size is {nbytes}, should be a multiple of {SMALLEST_BYTES}")
    if kind in (ASCEND, SIMULATOR) and peer_device_id == device_id and not local:
        raise click.UsageError("--peer-device-id is that of the first process, HCCL links two devices")
    if simulator_library is not None and kind != SIMULATOR:
        raise click.UsageError("--simulator-library needs --device simulator")
    plan = Plan(kind, device_id, peer_device_id, local, nbytes, timeout_s)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    try:
        with simulator(simulator_library) if kind == SIMULATOR else contextlib.nullcontext():
            sys.exit(_run(plan, console, as_json))
    except SimulatorMissing as error:
        click.echo(f"llm-datadist check: {error}", err=True)
        sys.exit(EXIT_USAGE)


def _run(plan: Plan, console: Console, as_json: bool) -> int:
    """Take the steps, print the result whatever happens, and return the exit status."""
    result, status = Result(plan.kind), None
    try:
        with console.status("starting") as line:
            if as_json:
                line.stop()
            run_check(plan, result, lambda name: line.update(name))
    except KeyboardInterrupt:
        click.echo("llm-datadist check: interrupted", err=True)
        status = EXIT_INTERRUPTED
    except TimeoutError as error:  # a process that even SIGKILL does not end
        click.echo(f"llm-datadist check: {error}", err=True)
        status = EXIT_FAILED
    if as_json:
        click.echo(json.dumps(as_document(result), indent=2))
    else:
        print_report(console, result)
    if status is not None:
        return status
    return 0 if result.passed else EXIT_FAILED
