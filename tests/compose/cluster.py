"""A cluster that Compose starts from one of the files in docker/."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from tests.compose.daemon import Daemon
from tests.compose.image import IMAGE, ROOT
from tests.compose.steps import Failed, complain, require, run, step, wait_until

REGISTRY = "tcp://registry:5510"

_UP_S = 120.0
_HEALTHY_S = 240.0
_DOWN_S = 60.0
_ONE_S = 30.0


class Cluster:
    """The services of one Compose file; made by `running_cluster`."""

    def __init__(self, daemon: Daemon, file: str) -> None:
        # Runs of several users of one daemon must not meet.
        self.project = f"llm-datadist-test-{os.getpid()}"
        self.environment = {**daemon.environment, "IMAGE": IMAGE}
        self._compose = [*_compose_command(daemon), "--project-name", self.project, "--file", f"{ROOT}/docker/{file}"]

    def compose(self, *arguments: str, timeout_s: float = _ONE_S) -> str:
        """Run a command of Compose and give its output."""
        return run([*self._compose, *arguments], timeout_s, self.environment)

    def running(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command of Compose whose output is to be read line by line."""
        return subprocess.Popen(
            [*self._compose, *arguments],
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def kill(self, service: str) -> None:
        """End a service by SIGKILL."""
        run(["docker", "kill", "--signal", "KILL", self._container(service)], _ONE_S, self.environment)

    def start(self, services: Sequence[str]) -> None:
        """Start services again that were killed."""
        self.compose("start", *services)

    def wait_until_healthy(self, services: Sequence[str]) -> None:
        """Wait until the health checks of services say that they work."""
        for service in services:
            wait_until(f"{service} is healthy", lambda service=service: self._health(service) == "healthy", _HEALTHY_S)

    def members(self) -> dict[str, dict[str, Any]]:
        """Ask the registry for its members, by name."""
        output = self.compose("exec", "-T", "registry", "llm-datadist", "registry-status", "--json")
        return {member["labels"]["name"]: member for member in json.loads(output)["members"]}

    def down(self) -> None:
        """Take everything down and make sure that nothing is left."""
        # A run that was cut short is no service, and Compose leaves it.
        left = self._containers()
        if left:
            run(["docker", "rm", "--force", *left], _DOWN_S, self.environment)
        self.compose("down", "--volumes", "--timeout", "5", timeout_s=_DOWN_S)
        networks = run(["docker", "network", "ls", "--quiet", *self._ours()], _ONE_S, self.environment).split()
        require(not self._containers() and not networks, "no container and no network is left")

    def show_logs(self) -> None:
        """Print the end of what all services said."""
        with contextlib.suppress(Failed):
            complain(self.compose("logs", "--no-color", "--tail", "60"))

    def _container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).strip()

    def _containers(self) -> list[str]:
        return run(["docker", "ps", "--all", "--quiet", *self._ours()], _ONE_S, self.environment).split()

    def _ours(self) -> tuple[str, str]:
        return "--filter", f"label=com.docker.compose.project={self.project}"

    def _health(self, service: str) -> str:
        state = [
            "docker",
            "inspect",
            "--format",
            "{{.State.Status}} {{.State.Health.Status}}",
            self._container(service),
        ]
        status, health = run(state, _ONE_S, self.environment).split()
        if status == "exited":
            raise Failed(f"{service} has ended by itself")
        return health


@contextlib.contextmanager
def running_cluster(daemon: Daemon, file: str, services: Sequence[str]) -> Iterator[Cluster]:
    """Bring up a cluster, wait until it is healthy, and take it down in the end, whatever happens."""
    cluster = Cluster(daemon, file)
    try:
        with step(f"bring up {file}"):
            cluster.compose("up", "--detach", "--no-build", timeout_s=_UP_S)
            cluster.wait_until_healthy(["registry", *services])
        yield cluster
    except BaseException:
        cluster.show_logs()
        raise
    finally:
        with step(f"take down {file}"):
            cluster.down()


def _compose_command(daemon: Daemon) -> list[str]:
    """Give the command of Compose v2, else of v1."""
    asked = subprocess.run(["docker", "compose", "version"], env=daemon.environment, capture_output=True)
    if asked.returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is not None:
        return ["docker-compose"]
    raise Failed("neither docker compose nor docker-compose is there; Debian: apt-get install -y docker-compose")
