"""The command ``llm-datadist bench`` with its two processes, on small messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli", "bench"]
SMALL = ["--size", "64K", "--size", "1M", "--block", "16K", "--runs", "20"]
RUN_S = 60.0
STOP_S = 20.0


@contextmanager
def running_bench(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a session of its own; afterwards no process of that session may be left."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *arguments], start_new_session=True, **pipes) as bench:
        try:
            yield bench
            deadline = time.monotonic() + STOP_S
            while left := others_in_session(bench.pid):
                assert time.monotonic() < deadline, f"processes {left} are left"
                time.sleep(0.01)
        finally:
            for pid in others_in_session(bench.pid):
                os.kill(pid, signal.SIGKILL)
            bench.kill()


def others_in_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != session:
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session:
                found.append(int(entry.name))
    return found


def document_of(*arguments: str) -> dict[str, Any]:
    with running_bench("--json", *arguments) as bench:
        output, errors = bench.communicate(timeout=RUN_S)
    assert bench.returncode == 0, errors
    assert errors == ""
    return json.loads(output)


@pytest.mark.parametrize("direction", ["pull", "push"])
@pytest.mark.parametrize("memory", ["pool", "registered"])
def test_document(direction: str, memory: str) -> None:
    document = document_of(*SMALL, "--direction", direction, "--memory", memory, "--tensors", "4", "--threads", "1")
    assert (document["direction"], document["memory"], document["threads"]) == (direction, memory, 1)
    assert document["memcpy_gb_per_s"] > 0
    shapes = [(case["bytes"], case["block_bytes"], case["blocks"]) for case in document["cases"]]
    assert shapes == [(65536, None, 1), (65536, 16384, 1), (1 << 20, None, 1), (1 << 20, 16384, 16)]
    for case in document["cases"]:
        assert case["tensors"] == 4
        assert case["runs"] == 20
        assert 0 < case["p50_us"] <= case["p90_us"]
        assert case["p99_us"] is None
        assert case["gb_per_s"] == pytest.approx(case["bytes"] / case["p50_us"] / 1e3, abs=1e-3)


def test_table() -> None:
    with running_bench(*SMALL, "--no-contiguous") as bench:
        output, errors = bench.communicate(timeout=RUN_S)
    assert bench.returncode == 0, errors
    assert "pull, pool memory, 2 tensors" in output
    assert "32 x 16 KiB" in output
    assert "one piece" not in output
    assert "\x1b" not in output


def test_for_so_many_seconds() -> None:
    document = document_of("--size", "64K", "--no-contiguous", "--seconds", "0.2")
    (case,) = document["cases"]
    assert case["runs"] >= 3
    assert case["p50_us"] > 0


def test_too_little_memory_is_told_in_one_line() -> None:
    with running_bench("--size", "1000000G") as bench:
        _, errors = bench.communicate(timeout=RUN_S)
    assert bench.returncode == 1
    assert errors.startswith("llm-datadist bench: ")
    assert errors.count("\n") == 1


def test_ctrl_c_leaves_nothing() -> None:
    with running_bench("--size", "64K", "--seconds", "600") as bench:
        wait_for_peer(bench)
        bench.send_signal(signal.SIGINT)
        _, errors = bench.communicate(timeout=STOP_S)
        assert bench.returncode == 130
        assert errors.strip() == "llm-datadist bench: interrupted"


def test_a_killed_peer_ends_the_measurement() -> None:
    with running_bench("--size", "64K", "--seconds", "600") as bench:
        os.kill(wait_for_peer(bench), signal.SIGKILL)
        _, errors = bench.communicate(timeout=STOP_S)
        assert bench.returncode == 1
        assert errors.startswith("llm-datadist bench: ")


def wait_for_peer(bench: subprocess.Popen[str]) -> int:
    """Wait until the second process runs the library; gives its number."""
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        for pid in others_in_session(bench.pid):
            try:
                if "_pull" in Path(f"/proc/{pid}/maps").read_text():
                    return pid
            except (FileNotFoundError, ProcessLookupError):
                pass
        time.sleep(0.01)
    raise AssertionError("no second process was started")
