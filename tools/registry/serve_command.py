"""The sub-command ``registry``: options, signals and exit status."""

from __future__ import annotations

import logging
import resource
import signal
import sys
from types import FrameType

import click

from llm_datadist.cluster.registry import DEFAULT_LIMITS, Limits, Registry
from llm_datadist.cluster.registry_address import DEFAULT_PORT
from llm_datadist.status import LLMException

EXIT_FAILED = 1
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@click.command()
@click.option(
    "--bind",
    default="127.0.0.1",
    show_default=True,
    help="Address of this host to listen at: IPv4, IPv6, a host name, or * for all IPv4 addresses.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="TCP port; 0 takes a free one, which is printed.",
)
@click.option(
    "--least-lease",
    type=click.FloatRange(0.1, 3600),
    default=DEFAULT_LIMITS.least_lease_ms / 1000,
    show_default=True,
    help="Seconds of the shortest lease that a member gets.",
)
@click.option(
    "--most-lease",
    type=click.FloatRange(0.1, 86_400),
    default=DEFAULT_LIMITS.most_lease_ms / 1000,
    show_default=True,
    help="Seconds of the longest lease that a member gets.",
)
@click.option(
    "--lock-lease",
    type=click.FloatRange(0.1, 3600),
    default=DEFAULT_LIMITS.most_lock_ms / 1000,
    show_default=True,
    help="Seconds after which the role switch of a member that is gone stands in nobody's way; none begins as long "
    "after the start.",
)
@click.option(
    "--max-members",
    type=click.IntRange(1, 1_000_000),
    default=DEFAULT_LIMITS.max_members,
    show_default=True,
    help="Members at a time.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every join, leave and change.")
def registry(
    bind: str,
    port: int,
    least_lease: float,
    most_lease: float,
    lock_lease: float,
    max_members: int,
    verbose: bool,
) -> None:
    """Run the place where the processes of a cluster find each other.

    Prints its address when it listens. It ends with SIGTERM or Ctrl-C; members announce themselves again when it is
    started again. Whoever reaches the port can join and give orders: keep it inside of the cluster's network.

    Exit status: 0, 1 if the address cannot be listened at, 2 for bad options.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format=_FORMAT)
    logging.getLogger("llm_datadist").setLevel(logging.INFO if verbose else logging.WARNING)
    _allow_many_connections()
    limits = Limits(int(least_lease * 1000), int(most_lease * 1000), int(lock_lease * 1000), max_members)
    try:
        service = Registry(bind, port, limits)
    except (LLMException, ValueError) as error:
        click.echo(f"llm-datadist registry: {error}", err=True)
        sys.exit(EXIT_FAILED)
    with service:

        def stop(number: int, frame: FrameType | None) -> None:
            service.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        click.echo(f"registry listens at {service.address}")
        service.serve()


def _allow_many_connections() -> None:
    """Raise the soft limit of open descriptors to the hard one: every member has a connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
