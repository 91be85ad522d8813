"""What a local launcher starts: a worker for each cluster, with the variables that tell it its place."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_datadist import LLMRole
from llm_datadist.cluster import rank_environment
from llm_datadist.cluster.cluster_file import Cluster, ClusterFile, Device
from llm_datadist.cluster.launched_process import Command

__all__ = ["RegistryService", "local_clusters", "python_command", "registry_service", "worker_commands"]


def local_clusters(roles: Sequence[LLMRole], host: str, ports: Sequence[int]) -> ClusterFile:
    """Describe clusters on this host: cluster ids from 1, a device each, and an address for each, whatever its role.

    Parameters
    ----------
    roles : sequence of LLMRole
        Role of each rank.
    host : str
        Where they listen.
    ports : sequence of int
        A port for each rank.
    """
    return ClusterFile(
        tuple(
            Cluster(rank + 1, role, (Device(rank),), (f"{_bracketed(host)}:{port}",))
            for rank, (role, port) in enumerate(zip(roles, ports))
        )
    )


def worker_commands(
    clusters: ClusterFile, arguments: Sequence[str], environment: Mapping[str, str], registry: str | None = None
) -> list[Command]:
    """Make the commands that start a worker for each cluster, all on this host.

    Parameters
    ----------
    clusters : ClusterFile
        In the order of their ranks.
    arguments : sequence of str
        Program and arguments, the same for all.
    environment : mapping of str to str
        Variables to which those of the rank are added.
    registry : str, optional
        Address of the registry.
    """
    size = str(len(clusters.clusters))
    inherited = {name: value for name, value in environment.items() if name != rank_environment.ROLES}
    shared = {
        "PYTHONUNBUFFERED": "1",  # lines come when they are printed; who does not want that sets it empty
        **inherited,
        rank_environment.LAUNCHER: "llm-datadist",
        rank_environment.WORLD_SIZE: size,
        rank_environment.LOCAL_WORLD_SIZE: size,
        rank_environment.CLUSTER: clusters.to_json(),
    }
    if registry is not None:
        shared[rank_environment.REGISTRY] = registry
    commands = []
    seen: Counter[LLMRole] = Counter()
    for rank, cluster in enumerate(clusters.clusters):
        own = {
            rank_environment.RANK: str(rank),
            rank_environment.LOCAL_RANK: str(rank),
            rank_environment.ROLE: cluster.role.name,
        }
        commands.append(Command(f"{cluster.role.name.lower()}-{seen[cluster.role]}", arguments, {**shared, **own}))
        seen[cluster.role] += 1
    return commands


class RegistryService(NamedTuple):
    """A registry that a launcher starts, and where it listens."""

    address: str
    command: Command


def registry_service(host: str, port: int, environment: Mapping[str, str]) -> RegistryService:
    """Make the command that starts a registry on this host.

    Parameters
    ----------
    host, port : str, int
        Where it listens.
    environment : mapping of str to str
        Its variables.
    """
    serve = [sys.executable, "-m", "llm_datadist.tools.cli", "registry", "--bind", host, "--port", str(port)]
    return RegistryService(f"tcp://{_bracketed(host)}:{port}", Command("registry", serve, environment, service=True))


def python_command(worker: str, arguments: Sequence[str], *, module: bool) -> list[str]:
    """Make the command that runs a script, or a module, in this interpreter.

    Raises
    ------
    ValueError
        There is no such script.
    """
    if module:
        return [sys.executable, "-m", worker, *arguments]
    if not os.path.isfile(worker):
        raise ValueError(f"there is no file {worker!r}; a module is started with -m")
    return [sys.executable, worker, *arguments]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
