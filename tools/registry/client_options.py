"""What the sub-commands that ask a registry have in common."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from llm_datadist.cluster.registry_address import DEFAULT_PORT, parse_registry_address

ADDRESS_VARIABLE = "LLM_DATADIST_REGISTRY"
EXIT_FAILED = 1

Command = Callable[..., Any]


def address(context: click.Context, parameter: click.Parameter, value: str | None) -> str:
    """Check the address of a registry."""
    try:
        return parse_registry_address(value or f"127.0.0.1:{DEFAULT_PORT}").endpoint
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def address_argument(command: Command) -> Command:
    """Add the address of the registry as an argument."""
    return click.argument("registry", required=False, callback=address, default=_default)(command)


def address_option(command: Command) -> Command:
    """Add the address of the registry as an option."""
    text = f"Where the registry is, tcp://host:port.  [default: ${ADDRESS_VARIABLE}, else port {DEFAULT_PORT} here]"
    return click.option("--registry", callback=address, default=_default, help=text)(command)


def timeout_option(seconds: float) -> Callable[[Command], Command]:
    """Add the option how long to wait for an answer."""
    return click.option(
        "--timeout",
        type=click.FloatRange(0.01, 3600),
        default=seconds,
        show_default=True,
        help="Seconds to wait for the answer.",
    )


def _default() -> str | None:
    return os.environ.get(ADDRESS_VARIABLE)
