"""The sub-command ``demo-worker``: options of a service of the demo."""

from __future__ import annotations

import sys

import click

from llm_datadist.roles import LLMRole
from llm_datadist.tools.demo.requirements import missing_requirement
from llm_datadist.tools.registry.client_options import address_option

EXIT_FAILED = 1
EXIT_USAGE = 2


@click.command("demo-worker")
@click.option("--role", type=click.Choice(["prompt", "decoder"]), required=True, help="What the worker does.")
@address_option
@click.option(
    "--cluster-id", type=click.IntRange(0, 2**64 - 2), required=True, help="Its cluster id, unlike all others."
)
@click.option("--name", help="Its name for people.  [default: ROLE-ID]")
@click.option(
    "--listen",
    default="0.0.0.0:26000",
    show_default=True,
    metavar="HOST:PORT",
    help="Where a prompt accepts links.",
)
@click.option(
    "--service",
    default="0.0.0.0:26500",
    show_default=True,
    metavar="HOST:PORT",
    help="Where drivers ask; port 0: any that is free.",
)
@click.option("--advertise", default="", metavar="HOST", help="Where drivers find it.  [default: its address]")
@click.option(
    "--mode",
    type=click.Choice(["cache", "blocks"]),
    default="cache",
    show_default=True,
    help="How KV is kept and pulled, see demo; drivers ask the workers of their mode.",
)
def demo_worker(
    role: str, registry: str, cluster_id: int, name: str | None, listen: str, service: str, advertise: str, mode: str
) -> None:
    """Serve as a worker of the demo: prefill or decode what ``llm-datadist demo --registry`` asks for.

    Ends after SIGTERM or Ctrl-C.

    Exit status: 0 then, 1 if it cannot serve, 2 for bad options or a missing package.
    """
    missing = missing_requirement()
    if missing is not None:
        click.echo(f"llm-datadist demo-worker: {missing}", err=True)
        sys.exit(EXIT_USAGE)
    host, port = _split(service)

    # Only now, because these import the packages that were looked for.
    from llm_datadist import LLMException
    from llm_datadist.tools.demo.network.worker_service import WorkerOptions, run_worker_service

    llm_role = LLMRole.PROMPT if role == "prompt" else LLMRole.DECODER
    options = WorkerOptions(
        llm_role, registry, cluster_id, name or f"{role}-{cluster_id}", mode, listen, host, port, advertise
    )
    try:
        run_worker_service(options)
    except (LLMException, OSError, ValueError) as error:
        click.echo(f"llm-datadist demo-worker: {error}", err=True)
        sys.exit(EXIT_FAILED)


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{address!r} is no HOST:PORT", param_hint="--service")
    return host.strip("[]"), int(port)
