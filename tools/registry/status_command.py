"""The sub-commands ``registry-status`` and ``registry-check``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm_datadist.cluster.member_info import MemberInfo
from llm_datadist.cluster.registry_client import RegistryClient, RegistryStatus
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException
from llm_datadist.tools.registry.client_options import EXIT_FAILED, address_argument, timeout_option

_WIDTH = 140  # columns, where the output is no terminal
_COLUMNS = ("cluster", "role", "state", "listens at", "devices", "host", "pid", "lease", "labels")


@click.command("registry-status")
@address_argument
@click.option("--role", type=click.Choice([role.name.lower() for role in LLMRole]), help="Only members of this role.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@timeout_option(5.0)
def registry_status(registry: str, role: str | None, as_json: bool, timeout: float) -> None:
    """List the members of a cluster.

    REGISTRY is tcp://host:port; without it that of LLM_DATADIST_REGISTRY, else the one of this host.

    Exit status: 0, 1 if the registry does not answer, 2 for bad options.
    """
    try:
        with RegistryClient(registry) as client:
            status = client.status(timeout)
            members = client.members(None if role is None else LLMRole[role.upper()], timeout_s=timeout)
    except LLMException as error:
        click.echo(f"llm-datadist registry-status: {error}", err=True)
        sys.exit(EXIT_FAILED)
    if as_json:
        click.echo(json.dumps({"registry": status._asdict(), "members": [_as_dict(one) for one in members]}, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(_as_table(registry, status, members))


@click.command("registry-check")
@address_argument
@timeout_option(2.0)
def registry_check(registry: str, timeout: float) -> None:
    """Tell whether a registry answers, as the health check of a container does.

    REGISTRY is tcp://host:port; without it that of LLM_DATADIST_REGISTRY, else the one of this host.

    Exit status: 0 if it answers, 1 if not, 2 for bad options.
    """
    try:
        with RegistryClient(registry) as client:
            members = client.status(timeout).members
    except LLMException as error:
        click.echo(f"llm-datadist registry-check: {error}", err=True)
        sys.exit(EXIT_FAILED)
    click.echo(f"{registry} answers, members: {members}")


def _as_dict(member: MemberInfo) -> dict[str, Any]:
    return {
        "cluster_id": member.cluster_id,
        "role": member.role.name,
        "state": member.state,
        "listen_ip_info": member.listen_ip_info,
        "devices": list(member.devices),
        "host": member.host,
        "pid": member.pid,
        "lease_s": member.lease_s,
        "labels": dict(member.labels),
    }


def _as_table(registry: str, status: RegistryStatus, members: list[MemberInfo]) -> Table:
    title = f"{registry}: {status.members} members, up for {status.uptime_s:.0f} s, {status.revision} changes"
    table = Table(*_COLUMNS, title=title, title_justify="left")
    for member in members:
        # Text of members, in which brackets mean nothing
        values = (
            str(member.cluster_id),
            member.role.name,
            member.state,
            member.listen_ip_info or "-",
            ",".join(map(str, member.devices)),
            member.host,
            str(member.pid),
            f"{member.lease_s:g} s",
            " ".join(f"{name}={value}" for name, value in sorted(member.labels.items())),
        )
        table.add_row(*map(_plain, values))
    return table


def _plain(text: str) -> str:
    return escape("".join(character if character.isprintable() else "?" for character in text))
