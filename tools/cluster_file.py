"""The sub-commands ``cluster-file``: check one, and convert it from and to the rank tables of Ascend programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from llm_datadist.cluster.cluster_file import ClusterFile, parse_cluster_file
from llm_datadist.cluster.rank_table import VERSIONS, from_rank_table, to_rank_table

EXIT_FAILED = 1

_file = click.argument("file", type=click.File(encoding="utf-8"))


@click.group("cluster-file")
def cluster_file() -> None:
    """Check cluster files, and convert them from and to rank tables.

    FILE is the path of one, or - for the standard input. Exit status: 0, 1 if it cannot be used, 2 for bad options.
    """


@cluster_file.command()
@_file
def check(file: Any) -> None:
    """Check a cluster file, and list its ranks."""
    for rank, cluster in enumerate(_tried(_read, file).clusters):
        devices = ",".join(str(device.device_id) for device in cluster.devices)
        listen = f", listens at {';'.join(cluster.listen_ip_info)}" if cluster.listen_ip_info else ""
        server = f" of {cluster.server_id}" if cluster.server_id else ""
        click.echo(f"rank {rank}: cluster {cluster.cluster_id}, {cluster.role.name}, devices {devices}{server}{listen}")


@cluster_file.command("to-rank-table")
@_file
@click.option("--version", type=click.Choice(VERSIONS), help="Version of the table.  [default: what the file needs]")
def to_table(file: Any, version: str | None) -> None:
    """Print the rank table of a cluster file, in JSON. Each cluster needs a server_id."""
    click.echo(_tried(to_rank_table, _tried(_read, file), version))


@cluster_file.command("from-rank-table")
@_file
@click.option("--roles", required=True, help="Roles of the clusters: prompts=2, or the role of each, joined by commas.")
@click.option("--port", type=int, help="Port of the first device of each server, the further ones count on.")
@click.option("--first-cluster-id", type=int, default=1, show_default=True, help="Id of the first cluster.")
@click.option("--devices", type=int, default=1, show_default=True, help="Devices of a cluster.")
def from_table(file: Any, roles: str, port: int | None, first_cluster_id: int, devices: int) -> None:
    """Print a cluster file for the devices of a rank table, in YAML."""
    clusters = _tried(
        lambda: from_rank_table(
            file.read(),
            roles,
            first_cluster_id=first_cluster_id,
            listen_port=port,
            devices_per_cluster=devices,
            name=file.name,
        )
    )
    click.echo(clusters.to_yaml(), nl=False)


def _read(file: Any) -> ClusterFile:
    return parse_cluster_file(file.read(), file.name)


def _tried(function: Callable[..., Any], *arguments: object) -> Any:
    """Call it; what it says about its arguments is the last word of the command."""
    try:
        return function(*arguments)
    except ValueError as error:
        click.echo(f"llm-datadist cluster-file: {error}", err=True)
        sys.exit(EXIT_FAILED)
