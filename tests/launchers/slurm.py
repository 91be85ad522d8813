"""A SLURM of one node, made for one test: all its files are in a folder of the test, all its ports on this host."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_datadist.cluster.death_signal import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")
READY_S = 60.0
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=100
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def running_slurm(folder: Path, free_port: Callable[[], int]) -> Iterator[dict[str, str]]:
    """Start it, and give the variables that its commands need; skips where it cannot be."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(
            f"SLURM is not installed: no {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
        )
    if os.getuid() != 0:
        pytest.skip("the daemons of SLURM start processes of users, which only root may")
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (folder / "munge" / "key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, ports=(free_port(), free_port())))
    variables = {**os.environ, "PATH": PATH, "SLURM_CONF": str(configuration)}
    munge = {name: f"{folder}/munge/{name}" for name in ("socket", "key", "pid", "log", "seed")}
    with contextlib.ExitStack() as daemons:
        munged = ["munged", "--foreground", "--force", f"--socket={munge['socket']}", f"--key-file={munge['key']}"]
        munged += [f"--pid-file={munge['pid']}", f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"]
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.enter_context(daemon(command, variables, folder))
        wait_for_node(variables, folder)
        yield variables


@contextlib.contextmanager
def daemon(command: list[str], variables: dict[str, str], folder: Path) -> Iterator[None]:
    parent = os.getpid()
    with (
        (folder / f"{command[0]}.out").open("wb") as output,
        subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: die_with_parent(parent),
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_node(variables: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env=variables, capture_output=True, text=True, timeout=READY_S, check=False
        )
        if asked.stdout.strip() == "idle":
            return
        if time.monotonic() > deadline:
            logs = "".join(
                path.read_text(errors="replace") for path in sorted([*folder.glob("*.out"), *folder.glob("*.log")])
            )
            pytest.fail(f"the node of SLURM is {asked.stdout.strip()!r} {asked.stderr}\n{logs[-5000:]}")
        time.sleep(0.05)
