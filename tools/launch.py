"""The sub-command ``launch``: options, report and exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import click

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import ClusterFile, ClusterFileError, read_cluster_file
from llm_datadist.cluster.held_ports import HeldPorts
from llm_datadist.cluster.launch_plan import (
    RegistryService,
    local_clusters,
    python_command,
    registry_service,
    worker_commands,
)
from llm_datadist.cluster.launcher import Outcome, run_commands
from llm_datadist.cluster.prefixed_output import PrefixedOutput

EXIT_FAILED = 1
MOST = 256  # processes of a role

_STREAMS = (1, 2)
_COLOURS = {"always": True, "never": False}


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--prompts", type=click.IntRange(0, MOST), help="Processes of role PROMPT; they have the first ranks.")
@click.option("--decoders", type=click.IntRange(0, MOST), help="Processes of role DECODER.")
@click.option(
    "--cluster",
    "path",
    type=click.Path(exists=True, dir_okay=False),
    help="Start the clusters of this file instead, all of them on this host.",
)
@click.option(
    "--registry", "with_registry", is_flag=True, help="Start a registry beside them, in LLM_DATADIST_REGISTRY."
)
@click.option("-m", "--module", is_flag=True, help="WORKER is a module, as for python -m.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of this host at which they listen.")
@click.option(
    "--stop-timeout",
    type=click.FloatRange(0, 3600),
    default=10.0,
    show_default=True,
    help="Seconds that processes get to end when they are stopped, before they are killed.",
)
@click.option(
    "--tail",
    type=click.IntRange(0, 10_000),
    default=20,
    show_default=True,
    help="How many last lines of a process that failed are shown again.",
)
@click.option(
    "--color",
    type=click.Choice(["auto", *_COLOURS]),
    default="auto",
    show_default=True,
    help="Colours for the names of the processes; auto: on a terminal, unless NO_COLOR is set.",
)
@click.argument("worker")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(
    prompts: int | None,
    decoders: int | None,
    path: str | None,
    with_registry: bool,
    module: bool,
    host: str,
    stop_timeout: float,
    tail: int,
    color: str,
    worker: str,
    arguments: tuple[str, ...],
) -> None:
    """Start the processes of a cluster on this host, each running WORKER with ARGUMENTS.

    Each process gets its rank, its role and the addresses of all others in environment variables, which
    llm_datadist.cluster.rank_environment reads. Lines that they print have the name of the process in front.

    The first process that fails ends the others, and its last lines are shown again. Ctrl-C, SIGTERM and SIGHUP go to
    all; a second one kills them. No process outlives the launcher.

    Exit status: 0, that of the process that failed first (128 + N if signal N ended it), 128 + N if signal N stopped
    the launcher, 2 for bad options.
    """
    try:
        command = python_command(worker, arguments, module=module)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with contextlib.ExitStack() as held:
        clusters = _clusters(prompts, decoders, path, host, held)
        service = _registry(host, held) if with_registry else None
        commands = worker_commands(clusters, command, os.environ, service and service.address)
        if service is not None:
            commands.insert(0, service.command)
        coloured = [_COLOURS.get(color, os.isatty(stream) and not os.environ.get("NO_COLOR")) for stream in _STREAMS]
        output = PrefixedOutput([one.name for one in commands], _STREAMS, coloured)
        try:
            outcome = run_commands(commands, output, stop_timeout_s=stop_timeout, tail_lines=tail)
        except (OSError, subprocess.SubprocessError) as error:
            click.echo(f"llm-datadist launch: a process cannot be started: {error}", err=True)
            sys.exit(EXIT_FAILED)
    with contextlib.suppress(OSError):  # nobody reads it: the status says the same
        _report(outcome)
    sys.exit(outcome.status)


def _clusters(
    prompts: int | None, decoders: int | None, path: str | None, host: str, held: contextlib.ExitStack
) -> ClusterFile:
    if path is not None:
        if prompts is not None or decoders is not None:
            raise click.UsageError("--cluster says how many processes there are, leave --prompts and --decoders away")
        try:
            return read_cluster_file(path)
        except ClusterFileError as error:
            raise click.UsageError(str(error)) from None
    roles = [LLMRole.PROMPT] * (prompts or 0) + [LLMRole.DECODER] * (decoders or 0)
    if not roles:
        raise click.UsageError("nothing to start: say --prompts and --decoders, or --cluster")
    return local_clusters(roles, host, _free_ports(host, len(roles), held))


def _registry(host: str, held: contextlib.ExitStack) -> RegistryService:
    (port,) = _free_ports(host, 1, held)
    return registry_service(host, port, os.environ)


def _free_ports(host: str, count: int, held: contextlib.ExitStack) -> tuple[int, ...]:
    try:
        return held.enter_context(HeldPorts(host, count)).ports
    except OSError as error:
        raise click.UsageError(f"--host is {host!r}, where this host cannot listen: {error}") from None


def _report(outcome: Outcome) -> None:
    failed = outcome.failed
    if failed is None:
        if outcome.signal is not None:
            click.echo(f"llm-datadist launch: stopped by {_signal_name(outcome.signal)}", err=True)
        return
    exitcode = failed.exitcode or 0
    how = f"was ended by {_signal_name(-exitcode)}" if exitcode < 0 else f"ended with status {exitcode}"
    click.echo(f"llm-datadist launch: {failed.command.name} {how}, the others were stopped", err=True)
    if failed.tail:
        click.echo(f"its last {'line' if len(failed.tail) == 1 else f'{len(failed.tail)} lines'}:", err=True)
        for line in failed.tail:
            click.echo(b"    " + line, err=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
