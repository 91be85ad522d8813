"""The commands around a registry, as people type them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from llm_datadist import LLMException, LLMRole
from llm_datadist.cluster import ClusterMember, Registry, RegistryClient
from llm_datadist.cluster.registry import Limits
from tests.cluster import cluster_process as cp
from tests.cluster.conftest import Announce
from tests.cluster.registry_process import RegistryProcess
from tests.processes import Member

LLM_DATADIST = [sys.executable, "-m", "llm_datadist.tools.cli"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LLM_DATADIST, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_it_ends_with_a_signal(registry: RegistryProcess, announce: Announce, number: signal.Signals) -> None:
    announce(1)
    assert registry.end_with(number) == 0
    with socket.socket() as again:  # the port is free
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", registry.port))


def test_a_port_that_is_taken(registry: RegistryProcess) -> None:
    done = run("registry", "--port", str(registry.port))
    assert done.returncode == 1
    where = f"127.0.0.1 port {registry.port}"
    assert done.stderr == f"llm-datadist registry: cannot listen on {where}: Address already in use\n"
    assert run("registry", "--bind", "no.such.host.invalid").returncode == 1
    assert run("registry", "--least-lease", "9", "--most-lease", "3").returncode == 1


def test_the_health_check(registry: RegistryProcess) -> None:
    done = run("registry-check", registry.address)
    assert (done.returncode, done.stdout) == (0, f"{registry.address} answers, members: 0\n")
    assert run("registry-check", LLM_DATADIST_REGISTRY=registry.address).returncode == 0
    registry.kill()
    done = run("registry-check", registry.address, "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no answer in time" in done.stderr
    assert run("registry-check", "tcp://x:99999").returncode == 2


def test_the_health_check_of_a_registry_that_hangs(registry: RegistryProcess) -> None:
    os.kill(registry.pid, signal.SIGSTOP)
    assert run("registry-check", registry.address, "--timeout", "0.5").returncode == 1


def test_the_list(registry: RegistryProcess, announce: Announce) -> None:
    announce(7, listen_ip_info="10.0.0.7:26000", labels={"name": "prompt-7", "[red]": "\x1b[2J"})
    announce(8, LLMRole.DECODER, state="busy")
    done = run("registry-status", registry.address)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    (prompt,) = [line for line in lines if "10.0.0.7:26000" in line]
    assert all(text in prompt for text in ("7", "PROMPT", "ready", "name=prompt-7", "[red]=?[2J"))
    assert any("DECODER" in line and "busy" in line for line in lines)
    assert "2 members" in lines[0]
    assert "\x1b" not in done.stdout
    document = json.loads(run("registry-status", registry.address, "--json", "--role", "decoder").stdout)
    assert [member["cluster_id"] for member in document["members"]] == [8]
    assert document["registry"]["members"] == 2
    registry.kill()
    assert run("registry-status", registry.address, "--timeout", "0.3").returncode == 1


def test_switch_role(members: Callable[[str], Member], registry: RegistryProcess, free_port: Callable[[], int]) -> None:
    prompt = members("prompt")
    prompt.call(cp.join, LLMRole.PROMPT, 1, free_port(), registry.address)
    order = ("switch-role", "--registry", registry.address, "--cluster-id")
    done = run(*order, "1", "--role", "decoder")
    assert (done.returncode, done.stdout) == (0, "cluster 1: its role is LLMRole.DECODER now\n")
    assert prompt.call(cp.role_of) == "DECODER"
    listen = f"127.0.0.1:{free_port()}"
    assert run(*order, "1", "--role", "prompt", "--listen", listen).returncode == 0
    with RegistryClient(registry.address) as client:
        (found,) = client.members(role=LLMRole.PROMPT)
    assert found.listen_ip_info == listen


@pytest.mark.parametrize("bind", ["127.0.0.1", "localhost", "*", "::1"])
def test_addresses(bind: str) -> None:
    if ":" in bind and not has_ipv6():
        pytest.skip("this host has no IPv6 loopback address")
    process = RegistryProcess("--bind", bind)
    try:
        process.start()
        hosts = {"*": ["127.0.0.1", "localhost"], "::1": ["[::1]"]}.get(bind, ["127.0.0.1", "localhost"])
        for host in hosts:
            with ClusterMember(None, f"tcp://{host}:{process.port}", 1, role=LLMRole.PROMPT) as member:
                member.announce()
    finally:
        process.close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_registry_inside_of_a_program() -> None:
    with Registry() as service:
        assert service.address == f"tcp://127.0.0.1:{service.port}"
        with pytest.raises(LLMException, match="Address already in use"):
            Registry(port=service.port)
        service.stop()
        service.serve()  # stopped before it began
        service.close()
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="port is"):
            Registry(port=port)
    with pytest.raises(ValueError, match="positive"):
        Registry(limits=Limits(max_members=0))
