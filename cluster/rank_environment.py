"""Rank, world size and role of this process, from the environment that its launcher made.

A table says which variables each launcher sets. The launchers are tried in the order of the table, those that may run
inside of others first: ``srun torchrun`` sets the variables of both, and torchrun's are the right ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import Cluster, ClusterFile, parse_cluster_file, read_cluster_file
from llm_datadist.cluster.role_assignment import assign_roles, parse_role

__all__ = [
    "CLUSTER",
    "LAUNCHER",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "RANK",
    "REGISTRY",
    "ROLE",
    "ROLES",
    "WORLD_SIZE",
    "RankEnvironment",
    "RankEnvironmentError",
    "read_rank_environment",
]

LAUNCHER = "LLM_DATADIST_LAUNCHER"  # which row of the table to take, whatever else is set
RANK = "LLM_DATADIST_RANK"
WORLD_SIZE = "LLM_DATADIST_WORLD_SIZE"
LOCAL_RANK = "LLM_DATADIST_LOCAL_RANK"
LOCAL_WORLD_SIZE = "LLM_DATADIST_LOCAL_WORLD_SIZE"
ROLE = "LLM_DATADIST_ROLE"  # of this rank
ROLES = "LLM_DATADIST_ROLES"  # of all ranks, as assign_roles takes them
CLUSTER = "LLM_DATADIST_CLUSTER"  # path of a cluster file, or its text in JSON
REGISTRY = "LLM_DATADIST_REGISTRY"  # address of the registry

_MAX_RANKS = 2**31


class RankEnvironmentError(ValueError):
    """The environment does not say which rank this is; the text names launcher, variable and value."""


class RankEnvironment(NamedTuple):
    """The place of this process among all that the launcher started.

    Attributes
    ----------
    launcher : str
        ``llm-datadist``, ``torchrun``, ``openmpi``, ``mpich`` (all that use Hydra), ``slurm``, ``pmi`` or ``generic``.
    rank : int
        From 0 on, over all hosts.
    world_size : int
        Number of ranks.
    local_rank : int
        From 0 on, on this host.
    local_world_size : int or None
        Number of ranks on this host; None if the launcher does not say it.
    role : LLMRole or None
        Role of this rank; None if nothing says it.
    clusters : ClusterFile or None
        All clusters, that of rank 0 first, if there is a cluster file.
    registry : str or None
        Address of the registry, if there is one.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None = None
    role: LLMRole | None = None
    clusters: ClusterFile | None = None
    registry: str | None = None

    @property
    def cluster(self) -> Cluster:
        """The cluster of this rank.

        Raises
        ------
        RankEnvironmentError
            There is no cluster file.
        """
        return self._cluster_file().clusters[self.rank]

    def with_role(self, role: LLMRole) -> tuple[Cluster, ...]:
        """Give all clusters of a role, in the order of their ranks; raises as `cluster` does."""
        return self._cluster_file().with_role(role)

    def _cluster_file(self) -> ClusterFile:
        if self.clusters is None:
            raise RankEnvironmentError(f"there is no cluster file: {CLUSTER} is not set, should be the path of one")
        return self.clusters


class _Launcher(NamedTuple):
    """The variables that a launcher sets."""

    name: str
    signs: tuple[str, ...]  # it was this launcher if one of them is set
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str | None
    one_a_host: bool = False  # without a local rank this is the only process of its host


_TABLE = (
    _Launcher(
        "llm-datadist",
        (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE),
        RANK,
        WORLD_SIZE,
        LOCAL_RANK,
        LOCAL_WORLD_SIZE,
        one_a_host=True,
    ),
    _Launcher("torchrun", ("TORCHELASTIC_RUN_ID",), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher(
        "openmpi",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # Hydra, the mpirun of MPICH, Intel MPI and MVAPICH. Its daemons may be started by srun, so it comes before SLURM.
    _Launcher("mpich", ("MPI_LOCALRANKID",), "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Not SLURM_NTASKS: a batch script has it and SLURM_PROCID too, but only what srun starts is a rank.
    _Launcher("slurm", ("SLURM_PROCID",), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
    # Other process managers with the interface of MPICH, such as PALS.
    _Launcher("pmi", ("PMI_RANK", "PMI_SIZE"), "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    # The names that torchrun made usual, set by something else, such as a training operator of Kubernetes.
    _Launcher("generic", ("RANK",), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", one_a_host=True),
)


def read_rank_environment(environment: Mapping[str, str] | None = None, roles: str | None = None) -> RankEnvironment:
    """Find out which rank this is.

    Parameters
    ----------
    environment : mapping of str to str, optional
        Variables; those of this process if it is not given.
    roles : str, optional
        Roles of all ranks, as `assign_roles` takes them, for when the environment says nothing about roles.

    Returns
    -------
    RankEnvironment
        The role is that of ``LLM_DATADIST_ROLE``, else of ``LLM_DATADIST_ROLES``, else of the cluster file in
        ``LLM_DATADIST_CLUSTER``, else of `roles`.

    Raises
    ------
    RankEnvironmentError
        No launcher is known by its variables, one of them is missing or is no number, they contradict each other, or a
        role cannot be.
    ClusterFileError
        The cluster file cannot be used.
    OSError
        The cluster file cannot be read.

    Examples
    --------
    >>> from llm_datadist.cluster.rank_environment import read_rank_environment
    >>> variables = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    >>> variables.update(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2")
    >>> place = read_rank_environment(variables, roles="prompts=2")
    >>> place.launcher, place.rank, place.world_size, place.role.name
    ('openmpi', 1, 4, 'PROMPT')
    """
    variables = {name: value for name, value in (os.environ if environment is None else environment).items() if value}
    ranks = _ranks(_detect(variables), variables)
    clusters = _clusters(variables, ranks)
    role = _role(variables, ranks, clusters, roles)
    return ranks._replace(role=role, clusters=clusters, registry=variables.get(REGISTRY))


def _detect(variables: Mapping[str, str]) -> _Launcher:
    names = ", ".join(launcher.name for launcher in _TABLE)
    wanted = variables.get(LAUNCHER)
    for launcher in _TABLE:
        if launcher.name == wanted or (wanted is None and any(sign in variables for sign in launcher.signs)):
            return launcher
    if wanted is not None:
        raise RankEnvironmentError(f"{LAUNCHER} is {wanted!r}, should be one of {names}")
    signs = ", ".join(launcher.signs[0] for launcher in _TABLE)
    raise RankEnvironmentError(
        f"no launcher ({names}) started this process: none of {signs} is set. Start it with one of them, or set {RANK}"
        f" and {WORLD_SIZE}"
    )


def _ranks(launcher: _Launcher, variables: Mapping[str, str]) -> RankEnvironment:
    world_size = _required(launcher, variables, launcher.world_size, 1, _MAX_RANKS)
    rank = _required(launcher, variables, launcher.rank, 0, world_size - 1)
    local_world_size = _optional(launcher, variables, launcher.local_world_size, 1, world_size)
    last = (world_size if local_world_size is None else local_world_size) - 1
    if launcher.one_a_host and local_world_size in (None, 1):
        local_rank = _optional(launcher, variables, launcher.local_rank, 0, last) or 0
    else:
        local_rank = _required(launcher, variables, launcher.local_rank, 0, last)
    return RankEnvironment(launcher.name, rank, world_size, local_rank, local_world_size)


def _required(launcher: _Launcher, variables: Mapping[str, str], name: str, lowest: int, highest: int) -> int:
    value = _optional(launcher, variables, name, lowest, highest)
    if value is None:
        sign = next((name for name in launcher.signs if name in variables), LAUNCHER)
        raise RankEnvironmentError(f"{name} is not set, but {sign} is {variables[sign]!r} ({launcher.name})")
    return value


def _optional(
    launcher: _Launcher, variables: Mapping[str, str], name: str | None, lowest: int, highest: int
) -> int | None:
    if name is None or name not in variables:
        return None
    text = variables[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and lowest <= int(text) <= highest):
        expected = f"a number from {lowest} to {highest}"
        raise RankEnvironmentError(f"{name} is {variables[name]!r}, should be {expected} ({launcher.name})")
    return int(text)


def _clusters(variables: Mapping[str, str], ranks: RankEnvironment) -> ClusterFile | None:
    given = variables.get(CLUSTER)
    if given is None:
        return None
    is_text = given.lstrip().startswith("{")
    clusters = parse_cluster_file(given, CLUSTER) if is_text else read_cluster_file(given)
    if len(clusters.clusters) != ranks.world_size:
        where = CLUSTER if is_text else given
        raise RankEnvironmentError(
            f"{where} has {len(clusters.clusters)} clusters, but there are {ranks.world_size} ranks ({ranks.launcher})"
        )
    return clusters


def _role(
    variables: Mapping[str, str], ranks: RankEnvironment, clusters: ClusterFile | None, roles: str | None
) -> LLMRole | None:
    sources: dict[str, LLMRole] = {}
    try:
        if ROLE in variables:
            sources[ROLE] = parse_role(variables[ROLE])
        if ROLES in variables:
            sources[ROLES] = assign_roles(variables[ROLES], ranks.world_size)[ranks.rank]
        if clusters is not None:
            sources[CLUSTER] = clusters.clusters[ranks.rank].role
        if roles is not None and not sources:
            sources["the program"] = assign_roles(roles, ranks.world_size)[ranks.rank]
    except ValueError as error:
        raise RankEnvironmentError(f"{error} (rank {ranks.rank} of {ranks.world_size}, {ranks.launcher})") from None
    if len(set(sources.values())) > 1:
        said = ", ".join(f"{role.name} by {source}" for source, role in sources.items())
        raise RankEnvironmentError(f"rank {ranks.rank} is {said}; they should say the same")
    return next(iter(sources.values()), None)
