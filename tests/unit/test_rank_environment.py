"""Which rank a process is, by the variables of its launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import ClusterFileError
from llm_datadist.cluster.rank_environment import RankEnvironmentError, read_rank_environment

# As torchrun 2.13, Open MPI 4.1, MPICH 4.0 (Hydra) and SLURM 22.05 set them for rank 3 of 5, second of its host.
EXPLICIT = {
    "LLM_DATADIST_RANK": "3",
    "LLM_DATADIST_WORLD_SIZE": "5",
    "LLM_DATADIST_LOCAL_RANK": "1",
    "LLM_DATADIST_LOCAL_WORLD_SIZE": "2",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "5",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "MASTER_ADDR": "localhost",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_ID": "1254293505.3",
}
MPICH = {"PMI_FD": "8", "PMI_RANK": "3", "PMI_SIZE": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "5", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
GENERIC = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}

LAUNCHERS = {
    "llm-datadist": EXPLICIT,
    "torchrun": TORCHRUN,
    "openmpi": OPENMPI,
    "mpich": MPICH,
    "slurm": SLURM,
    "pmi": PMI,
    "generic": GENERIC,
}

FILE = """
clusters:
  - {cluster_id: 10, role: PROMPT, listen_ip_info: "127.0.0.1:26000"}
  - {cluster_id: 11, role: DECODER}
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher(launcher: str) -> None:
    found = read_rank_environment({"PATH": "/bin", **LAUNCHERS[launcher]})
    assert found[:5] == (launcher, 3, 5, 1, None if launcher == "slurm" else 2)
    assert (found.role, found.clusters, found.registry) == (None, None, None)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_variable_is_needed(launcher: str) -> None:
    """Each variable that tells a place is missed, is no number, or is out of range; the message names it."""
    complete = LAUNCHERS[launcher]
    for name in (name for name, value in complete.items() if value in ("1", "3", "5")):
        if name in ("GROUP_RANK", "ROLE_RANK", "SLURM_NTASKS", "LOCAL_WORLD_SIZE"):
            continue  # not read, or not needed
        if name == "RANK" and launcher == "generic":
            continue  # without it there is no sign of a launcher
        if name not in ("SLURM_PROCID", "MPI_LOCALRANKID"):
            with pytest.raises(RankEnvironmentError, match=f"^{name} is not set, but .*{launcher}"):
                read_rank_environment({key: value for key, value in complete.items() if key != name})
        for wrong in ("three", "-1", "1.0", "99999999999", "²"):
            with pytest.raises(
                RankEnvironmentError, match=f"^{name} is '{wrong}', should be a number from .*{launcher}"
            ):
                read_rank_environment({**complete, name: wrong})


def test_a_batch_script_of_slurm_is_no_rank() -> None:
    assert read_rank_environment({**SLURM, "SLURM_NTASKS": "64"}).world_size == 5
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NUM_TASKS"}
    with pytest.raises(RankEnvironmentError, match="SLURM_STEP_NUM_TASKS is not set, but SLURM_PROCID is '3'"):
        read_rank_environment(script)


@pytest.mark.parametrize("outer", ["mpich", "slurm", "generic"])
@pytest.mark.parametrize("inner", ["llm-datadist", "torchrun", "openmpi"])
def test_the_launcher_inside_wins(inner: str, outer: str) -> None:
    outside = {name: "0" if value == "3" else value for name, value in LAUNCHERS[outer].items()}
    assert read_rank_environment({**outside, **LAUNCHERS[inner]})[:2] == (inner, 3)


def test_hydra_wins_over_the_srun_that_started_its_daemons() -> None:
    assert read_rank_environment({**SLURM, **MPICH, "SLURM_PROCID": "0"})[:2] == ("mpich", 3)


def test_a_step_with_the_interface_of_mpich_is_one_of_slurm() -> None:
    assert read_rank_environment({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5"}).launcher == "slurm"


def test_the_launcher_can_be_named() -> None:
    both = {**EXPLICIT, **OPENMPI, "OMPI_COMM_WORLD_RANK": "4"}
    assert read_rank_environment({**both, "LLM_DATADIST_LAUNCHER": "openmpi"})[:2] == ("openmpi", 4)
    with pytest.raises(
        RankEnvironmentError, match="SLURM_STEP_NUM_TASKS is not set, but LLM_DATADIST_LAUNCHER is 'slurm'"
    ):
        read_rank_environment({**both, "LLM_DATADIST_LAUNCHER": "slurm"})
    with pytest.raises(
        RankEnvironmentError, match="LLM_DATADIST_LAUNCHER is 'mpi', should be one of llm-datadist, torch"
    ):
        read_rank_environment({**both, "LLM_DATADIST_LAUNCHER": "mpi"})


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "4"}, {"RANK": ""}, {"WORLD_SIZE": "2"}])
def test_no_launcher(variables: dict[str, str]) -> None:
    with pytest.raises(RankEnvironmentError, match="no launcher .* set LLM_DATADIST_RANK and LLM_DATADIST_WORLD_SIZE"):
        read_rank_environment(variables)


@pytest.mark.parametrize("prefix", ["", "LLM_DATADIST_"])
def test_one_process_a_host_needs_no_local_rank(prefix: str) -> None:
    variables = {f"{prefix}RANK": "3", f"{prefix}WORLD_SIZE": "5"}
    assert read_rank_environment(variables)[1:5] == (3, 5, 0, None)
    assert read_rank_environment({**variables, f"{prefix}LOCAL_WORLD_SIZE": "1"})[1:5] == (3, 5, 0, 1)
    with pytest.raises(RankEnvironmentError, match=f"{prefix}LOCAL_RANK is not set"):
        read_rank_environment({**variables, f"{prefix}LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LLM_DATADIST_RANK": "5"}, "LLM_DATADIST_RANK is '5', should be a number from 0 to 4"),
        ({"LLM_DATADIST_LOCAL_RANK": "2"}, "LLM_DATADIST_LOCAL_RANK is '2', should be a number from 0 to 1"),
        (
            {"LLM_DATADIST_LOCAL_WORLD_SIZE": "6"},
            "LLM_DATADIST_LOCAL_WORLD_SIZE is '6', should be a number from 1 to 5",
        ),
        ({"LLM_DATADIST_WORLD_SIZE": "0"}, "LLM_DATADIST_WORLD_SIZE is '0', should be a number from 1"),
    ],
)
def test_variables_that_contradict_each_other(changes: dict[str, str], message: str) -> None:
    with pytest.raises(RankEnvironmentError, match=message):
        read_rank_environment({**EXPLICIT, **changes})


def place(rank: int, world_size: int, **variables: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    } | {f"LLM_DATADIST_{name}": value for name, value in variables.items()}


def test_where_the_role_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    assert read_rank_environment(place(0, 2), roles="prompts=1").role is LLMRole.PROMPT
    assert read_rank_environment(place(1, 2), roles="prompts=1").role is LLMRole.DECODER
    assert read_rank_environment(place(1, 2, ROLES="decoders=1"), roles="prompts=1").role is LLMRole.PROMPT
    assert read_rank_environment(place(1, 2, ROLE="mix"), roles="prompts=1").role is LLMRole.MIX
    found = read_rank_environment(place(1, 2, CLUSTER=str(path)), roles="prompts=2")
    assert (found.role, found.cluster.cluster_id) == (LLMRole.DECODER, 11)
    assert found.clusters is not None
    assert read_rank_environment(place(0, 2, CLUSTER=found.clusters.to_json())).cluster.cluster_id == 10
    assert (
        read_rank_environment(place(1, 2, CLUSTER=str(path), ROLE="DECODER", ROLES="prompts=1")).role is LLMRole.DECODER
    )


def test_roles_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    with pytest.raises(RankEnvironmentError, match=r"'prompts=3' are for 3 ranks.*\(rank 1 of 2, openmpi\)"):
        read_rank_environment(place(1, 2), roles="prompts=3")
    with pytest.raises(RankEnvironmentError, match="role is 'reader'"):
        read_rank_environment(place(1, 2, ROLE="reader"))
    with pytest.raises(
        RankEnvironmentError, match="rank 1 is PROMPT by LLM_DATADIST_ROLE, DECODER by LLM_DATADIST_CLUSTER"
    ):
        read_rank_environment(place(1, 2, ROLE="PROMPT", CLUSTER=str(path)))


def test_cluster_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(FILE)
    with pytest.raises(RankEnvironmentError, match=r"cluster.yaml has 2 clusters, but there are 3 ranks \(openmpi\)"):
        read_rank_environment(place(1, 3, CLUSTER=str(path)))
    with pytest.raises(FileNotFoundError):
        read_rank_environment(place(1, 3, CLUSTER=str(tmp_path / "none.yaml")))
    with pytest.raises(ClusterFileError, match="LLM_DATADIST_CLUSTER: clusters is missing"):
        read_rank_environment(place(1, 3, CLUSTER="{}"))
    with pytest.raises(RankEnvironmentError, match="there is no cluster file: LLM_DATADIST_CLUSTER is not set"):
        read_rank_environment(place(1, 3)).cluster  # noqa: B018


def test_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**EXPLICIT, "LLM_DATADIST_REGISTRY": "tcp://127.0.0.1:26100"}.items():
        monkeypatch.setenv(name, value)
    found = read_rank_environment()
    assert (found.rank, found.registry) == (3, "tcp://127.0.0.1:26100")
