"""The sub-command ``switch-role``."""

from __future__ import annotations

import sys

import click

from llm_datadist.cluster.registry_client import RegistryClient
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException
from llm_datadist.tools.registry.client_options import EXIT_FAILED, address_option, timeout_option


@click.command("switch-role")
@address_option
@click.option("--cluster-id", type=click.IntRange(0, 2**64 - 1), required=True, help="Who is to switch.")
@click.option(
    "--role", type=click.Choice([role.name.lower() for role in LLMRole]), required=True, help="What it is to be."
)
@click.option(
    "--listen", default="", help="Where it listens as PROMPT, ip:port.  [default: where it was told to at its start]"
)
@timeout_option(60.0)
def switch_role(registry: str, cluster_id: int, role: str, listen: str, timeout: float) -> None:
    """Have a member of a cluster switch its role.

    Its links are drained before, so that no transfer is cut off, and made again after. The member must use
    ClusterMember and have announced itself.

    Exit status: 0, 1 if the member did not switch, 2 for bad options.
    """
    try:
        with RegistryClient(registry) as client:
            said = client.switch_role(cluster_id, LLMRole[role.upper()], listen, timeout)
    except LLMException as error:
        click.echo(f"llm-datadist switch-role: {error} ({error.status_code.name})", err=True)
        sys.exit(EXIT_FAILED)
    click.echo(f"cluster {cluster_id}: {said}")
