"""The sub-command ``demo-check``: the health check of a demo worker."""

from __future__ import annotations

import sys

import click
import zmq

from llm_datadist.tools.demo.messages import LevelQuery, ServiceLevel
from llm_datadist.tools.demo.network.wire import WireError, decode, encode

EXIT_FAILED = 1


@click.command("demo-check")
@click.argument("service", default="tcp://127.0.0.1:26500")
@click.option(
    "--timeout",
    type=click.FloatRange(0.01, 3600),
    default=10.0,
    show_default=True,
    help="Seconds to wait for the answer; a long prefill may take some.",
)
def demo_check(service: str, timeout: float) -> None:
    """Tell whether a worker of the demo answers, as the health check of a container does.

    SERVICE is tcp://host:port, where drivers ask; without it the port 26500 of this host.

    Exit status: 0 if it answers, 1 if not, 2 for bad options.
    """
    try:
        level = _ask(service, timeout)
    except (TimeoutError, WireError, zmq.ZMQError) as error:
        click.echo(f"llm-datadist demo-check: {service}: {error}", err=True)
        sys.exit(EXIT_FAILED)
    click.echo(f"{service} answers, requests: {level.others}, bytes used: {level.used:,} of {level.capacity:,}")


def _ask(service: str, timeout_s: float) -> ServiceLevel:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(service)
        socket.send(encode(LevelQuery()))
        if not socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        level = decode(socket.recv())
    if not isinstance(level, ServiceLevel):
        raise WireError(f"answers with {type(level).__name__}, should be ServiceLevel")
    return level
