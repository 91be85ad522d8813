"""The command ``llm-datadist check``: on the simulator, with everything in order and with faults; and on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_datadist.tools import ascend_simulator
from tests.ascend_simulator import build

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli", "check", "--size", "1M"]
RUN_S = 120.0
OF_TWO = [
    "second process",
    "second device",
    "link",
    "fill caches",
    "pull_cache",
    "pull_blocks",
    "small pulls",
    "push by layer",
    "unlink",
]
OF_ONE = ["allocate", "host to device", "device to host", "inside the device", "swap_blocks"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMDD_", "ASCEND_", "HCCL_"))}
    command = [*COMMAND, *arguments]
    return subprocess.run(
        command, env={**kept, **variables}, capture_output=True, text=True, timeout=RUN_S, check=False
    )


def on_simulator(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    library = str(build.library())
    return run("--device", "simulator", "--simulator-library", library, *arguments, **variables)


def failed_step(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], str]:
    """Give the step that failed, which must be the last one, and the notes as one text."""
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"] is False
    assert [step["ok"] for step in document["steps"]].index(False) == len(document["steps"]) - 1
    return document["steps"][-1], "\n".join(document["notes"])


def test_on_the_simulator() -> None:
    done = on_simulator("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert (document["passed"], document["simulator"], document["device"]) == (True, True, "simulator")
    assert document["software"]["libraries"] == [str(build.library())]
    assert [document["devices"][device]["physical_id"] for device in ("0", "1")] == [0, 1]
    names = [step["step"] for step in document["steps"]]
    assert names == ["first process", "libraries", "device", *OF_ONE, *OF_TWO, "finalize"]
    by_name = {step["step"]: step for step in document["steps"]}
    assert by_name["link"]["detail"] == "over hccl"
    moving = {*OF_ONE[1:], "pull_cache", "pull_blocks", "push by layer"}
    assert {name for name, step in by_name.items() if step["gb_per_s"]} == moving


def test_what_it_prints() -> None:
    done = on_simulator("--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIMULATOR: no number of this run means anything for hardware." in done.stdout
    assert "OK: 9 steps, every byte compared" in done.stdout
    assert "Ascend910B3, physical id 0, one of 2 visible" in done.stdout
    assert "pull_cache" not in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("device", ["host", "auto"])
def test_in_memory_of_the_host(device: str) -> None:
    done = run("--device", device, "--json", LLM_DATADIST_ACL_LIBRARY="/no/such.so")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert (document["device"], document["simulator"], document["passed"]) == ("host", False, True)
    assert ("/no/such.so" in document["no_device"]) == (device == "auto")
    assert document["steps"][-1]["step"] == "finalize"


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("exec.recv#3=drop", "pull_cache"),
        ("exec.recv#6=drop", "pull_blocks"),
        ("exec.copy#40=corrupt", "host to device"),
    ],
)
def test_bytes_that_do_not_arrive_are_noticed(fault: str, step: str) -> None:
    failed, _ = failed_step(on_simulator("--json", LLMDD_SIM_FAULTS=fault))
    assert failed["step"] == step
    assert failed["failure"].startswith("wrong bytes ")


def test_the_text_of_the_vendor_is_told() -> None:
    failed, notes = failed_step(on_simulator("--json", LLMDD_SIM_FAULTS="HcclCommInitRootInfoConfig=code(4)"))
    assert failed["step"] == "link"
    assert "first process: " in notes
    assert "second process: " in notes
    assert "HcclCommInitRootInfoConfig failed with 4: internal error" in notes


def test_a_call_that_hangs_ends_with_its_step() -> None:
    arguments = ("--json", "--timeout", "3", "--local")
    failed, _ = failed_step(on_simulator(*arguments, LLMDD_SIM_FAULTS="aclrtMallocAlign32=hang"))
    assert failed["step"] == "allocate"
    assert failed["failure"] == "the first process did not answer within the 3 s of a step, and was killed"


def test_a_process_that_dies_is_told() -> None:
    failed, _ = failed_step(on_simulator("--json", LLMDD_SIM_FAULTS="exec.recv#3=kill"))
    assert (failed["step"], failed["failure"]) == ("pull_cache", "the second process has died of signal 9")


def test_one_device_is_too_few_for_a_link() -> None:
    failed, _ = failed_step(on_simulator("--json", LLMDD_SIM_DEVICES="1"))
    assert failed["step"] == "second process"
    assert "--local" in failed["failure"]


def test_without_libraries_it_says_what_is_missing() -> None:
    done = run("--device", "ascend", LLM_DATADIST_ACL_LIBRARY="/no/such.so")
    assert done.returncode == 1
    assert "FAILED at: libraries" in done.stdout
    assert "/no/such.so" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "simulator", "--simulator-library", "/no/such.so"), "there is no library /no/such.so"),
        (("--device", "ascend", "--peer-device-id", "0"), "HCCL links two devices"),
        (("--size", "1000"), "multiple of 512"),
        (("--simulator-library", "/no/such.so"), "needs --device simulator"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert told in done.stderr


def test_an_installed_package_has_no_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend_simulator, "_BUILD", Path("tests", "nothing", "build.py"))
    with pytest.raises(ascend_simulator.SimulatorMissing, match="source tree"), ascend_simulator.simulator():
        pass


def test_the_simulator_of_the_tree_and_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DATADIST_DEVICE", "host")
    monkeypatch.delenv("LLMDD_SIM_WORLD", raising=False)
    with ascend_simulator.simulator():
        assert os.environ["LLM_DATADIST_HCCL_LIBRARY"] == str(build.library())
        assert os.environ["LLM_DATADIST_DEVICE"] == "simulator"
        assert os.environ["LLMDD_SIM_WORLD"]
    assert os.environ["LLM_DATADIST_DEVICE"] == "host"
    assert "LLMDD_SIM_WORLD" not in os.environ
