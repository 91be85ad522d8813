"""A Docker daemon: the one of the machine, or one of our own that leaves nothing behind.

Ours lives in name spaces for network, mounts and processes: its bridges, firewall rules and mounts are not those of the
machine, and they end with it. It has no way to the outside, so nothing can be pulled with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.compose.steps import say, step

_START_S = 60.0
_STOP_S = 20.0
_POLL_S = 0.1
_LOG_LINES = 20
_NEEDED = ("docker", "dockerd", "unshare", "setpriv", "ip")

# The daemon dies with unshare, and unshare with this process.
_ISOLATED = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
_IN_THERE = 'ip link set lo up; exec dockerd --bridge none --host "unix://$1/docker.sock" --data-root "$1/data" \
--exec-root "$1/exec" --pidfile "$1/pid" --cgroup-parent "/$2"'
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


class NoDaemon(Exception):
    """There is no Docker daemon and none can be started; the text says why."""


@dataclass(frozen=True)
class Daemon:
    """A daemon that answers.

    Attributes
    ----------
    environment : dict of str to str
        For programs that use it.
    reaches_registries : bool
        Whether it may be able to pull images.
    """

    environment: dict[str, str]
    reaches_registries: bool


@contextlib.contextmanager
def docker_daemon() -> Iterator[Daemon]:
    """Give a daemon; one of our own is ended with the block.

    Raises
    ------
    NoDaemon
        There is none, and none can be started.
    """
    if shutil.which("docker") is not None and _answers(dict(os.environ)):
        say("the Docker daemon of this machine is used")
        yield Daemon(dict(os.environ), reaches_registries=True)
        return
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        raise NoDaemon(f"no Docker daemon answers, and to start one these programs are missing: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise NoDaemon("no Docker daemon answers, and only root can start one")
    folder = Path(tempfile.mkdtemp(prefix="llm_datadist-docker-"))
    try:
        with _own_daemon(folder) as environment:
            yield Daemon(environment, reaches_registries=False)
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _own_daemon(folder: Path) -> Iterator[dict[str, str]]:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock"}
    environment.pop("DOCKER_CONTEXT", None)
    log = folder / "log"
    with log.open("w") as output:
        outer = subprocess.Popen(
            [*_ISOLATED, "--mount-proc", "sh", "-ec", _IN_THERE, "sh", str(folder), folder.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with step("start a Docker daemon in name spaces of its own"):
            _wait_for_answer(outer, environment, log)
        yield environment
    finally:
        _stop(outer)
        _remove_control_groups(folder.name)


def _wait_for_answer(outer: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(environment):
        if outer.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
            raise NoDaemon(f"a Docker daemon does not start here:\n{end}")
        time.sleep(_POLL_S)


def _stop(outer: subprocess.Popen[bytes]) -> None:
    """Let the daemon end by itself, else with its name spaces."""
    for child in _children(outer.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
    try:
        outer.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        say("the Docker daemon does not end by itself and is killed")
        outer.kill()
        outer.wait()


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                # "pid (name) state parent ...": the name may contain anything, also parentheses
                if int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    yield int(entry.name)


def _remove_control_groups(name: str) -> None:
    """Remove the empty control groups in which containers were: one of them, or one a controller."""
    for top in (_CONTROL_GROUPS / name, *_CONTROL_GROUPS.glob(f"*/{name}")):
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)


def _answers(environment: dict[str, str]) -> bool:
    asked = ["docker", "info", "--format", "{{.ServerVersion}}"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=_START_S)
    # Old clients end with status 0 even if nobody answers.
    return done.returncode == 0 and bool(done.stdout.strip())
