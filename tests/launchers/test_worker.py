"""The worker in examples/launchers runs unchanged under every launcher: real ones, and the variables of others."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_file import parse_cluster_file, read_cluster_file
from llm_datadist.cluster.launch_plan import local_clusters
from tests.launchers.slurm import running_slurm

EXAMPLES = Path(__file__).parents[2] / "examples" / "launchers"
WORKER = str(EXAMPLES / "worker.py")
RUN_S = 100.0
PROMPTS, DECODERS = 2, 3
RANKS = PROMPTS + DECODERS

# What launchers of a cluster set for a rank; `{rank}` is filled in.
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": str(RANKS), "SLURM_LOCALID": "{rank}"}
KUBERNETES = {"LLM_DATADIST_RANK": "{rank}", "LLM_DATADIST_WORLD_SIZE": str(RANKS)}


@pytest.fixture
def cluster_file(tmp_path: Path, free_port: Callable[[], int]) -> str:
    roles = [LLMRole.PROMPT] * PROMPTS + [LLMRole.DECODER] * DECODERS
    path = tmp_path / "cluster.yaml"
    path.write_text(local_clusters(roles, "127.0.0.1", [free_port() for _ in roles]).to_yaml())
    return str(path)


def environment(**variables: str) -> dict[str, str]:
    """Give the variables of this process, without those of a launcher that it may have been started by."""
    prefixes = ("LLM_DATADIST_", "OMPI_", "PMI", "MPI_", "SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | variables


def run(command: list[str], **variables: str) -> str:
    """Run a launcher to its end, and give what its processes have printed."""
    settings = environment(OMP_NUM_THREADS="1", **variables)
    with subprocess.Popen(
        command, env=settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=RUN_S)
        finally:
            launcher.terminate()  # it takes its workers along
    assert launcher.returncode == 0, output
    return output


def assert_all_done(output: str, launcher: str) -> None:
    for rank in range(RANKS):
        role = "PROMPT" if rank < PROMPTS else "DECODER"
        done = (
            f"{DECODERS} caches were pulled"
            if rank < PROMPTS
            else f"pulled from {PROMPTS} prompts, all bytes are right"
        )
        assert f"rank {rank} of {RANKS}, {role}, by {launcher}: {done}" in output


def find_mpirun(kind: str, names: tuple[str, ...]) -> str:
    """Find the mpirun of a kind by what it says of itself: two may be installed side by side."""
    for name in names:
        path = shutil.which(name)
        if path is not None:
            version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
            if kind in version.stdout:
                return path
    pytest.skip(f"no mpirun of {kind} is installed (looked for {', '.join(names)})")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
def test_llm_datadist_launch(host: str, transport: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this host has no IPv6")
    command = [sys.executable, "-m", "llm_datadist.tools.cli", "launch", "--host", host, "--prompts", str(PROMPTS)]
    command += ["--decoders", str(DECODERS), "-m", "llm_datadist.examples.launchers.worker"]
    assert_all_done(run(command, LLM_DATADIST_TRANSPORT=transport), "llm-datadist")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_torchrun(cluster_file: str) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torchrun is not installed (pip install torch; the CPU build is enough)")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    assert_all_done(run([*torchrun, WORKER], LLM_DATADIST_CLUSTER=cluster_file), "torchrun")


def test_mpirun_of_open_mpi(cluster_file: str) -> None:
    mpirun = [find_mpirun("Open MPI", ("mpirun.openmpi", "mpirun")), "--oversubscribe", "-np", str(RANKS)]
    if os.getuid() == 0:
        mpirun.append("--allow-run-as-root")
    assert_all_done(run([*mpirun, sys.executable, WORKER], LLM_DATADIST_CLUSTER=cluster_file), "openmpi")


def test_mpirun_of_mpich(cluster_file: str) -> None:
    mpirun = [find_mpirun("HYDRA", ("mpiexec.hydra", "mpirun.mpich", "mpirun")), "-n", str(RANKS)]
    assert_all_done(run([*mpirun, sys.executable, WORKER], LLM_DATADIST_CLUSTER=cluster_file), "mpich")


def test_srun(cluster_file: str, tmp_path: Path, free_port: Callable[[], int]) -> None:
    with running_slurm(tmp_path, free_port) as slurm:
        srun = ["srun", "--kill-on-bad-exit=1", "--ntasks", str(RANKS), sys.executable, WORKER]
        output = run(srun, **{**slurm, "LLM_DATADIST_CLUSTER": cluster_file})
    assert_all_done(output, "slurm")


def test_the_batch_script_of_slurm(tmp_path: Path, free_port: Callable[[], int]) -> None:
    with running_slurm(tmp_path, free_port) as slurm, ports_in_a_row(RANKS) as port:
        sbatch = ["sbatch", "--wait", "--nodes=1", f"--ntasks-per-node={RANKS}", f"--output={tmp_path}/output"]
        variables = {**slurm, "PROMPTS": str(PROMPTS), "PORT": str(port)}
        run([*sbatch, f"--chdir={tmp_path}", str(EXAMPLES / "slurm.sbatch"), sys.executable, WORKER], **variables)
    assert_all_done((tmp_path / "output").read_text(), "slurm")


@contextlib.contextmanager
def ports_in_a_row(count: int) -> Iterator[int]:
    """Hold ports that follow each other, on all addresses; gives the first."""
    for first in range(40000, 60000, count):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                one = held.enter_context(socket.socket())
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("", port))
            yield first
            return
    raise AssertionError(f"no {count} free ports in a row")


def test_files_for_other_launchers() -> None:
    assert len(read_cluster_file(EXAMPLES / "cluster.yaml").clusters) == 6
    _, config, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    clusters = parse_cluster_file(config["data"]["cluster.yaml"])
    assert len(clusters.clusters) == job["spec"]["completions"] == job["spec"]["parallelism"]
    given = {variable["name"] for variable in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert given == {*KUBERNETES, "LLM_DATADIST_CLUSTER"}


@pytest.mark.parametrize(("variables", "launcher"), [(SLURM, "slurm"), (KUBERNETES, "llm-datadist")])
def test_variables_of_a_cluster(cluster_file: str, variables: dict[str, str], launcher: str) -> None:
    """Processes that know of each other what srun, or a manifest of Kubernetes, gives them, and nothing else."""
    with contextlib.ExitStack() as owned:
        workers = [owned.enter_context(started(rank, cluster_file, variables)) for rank in range(RANKS)]
        output = "".join(worker.communicate(timeout=RUN_S)[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0] * RANKS, output
    assert_all_done(output, launcher)


@contextlib.contextmanager
def started(rank: int, cluster_file: str, variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    own = {name: value.format(rank=rank) for name, value in variables.items()}
    settings = environment(LLM_DATADIST_CLUSTER=cluster_file, OMP_NUM_THREADS="1", **own)
    with subprocess.Popen(
        [sys.executable, WORKER], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        try:
            yield worker
        finally:
            worker.kill()
