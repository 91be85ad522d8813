"""Services that a launcher starts beside the workers: there before them, and there until the last of them has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DEADLINE_S = 30.0

# Runs a service and two workers, whose programs are its arguments, and tells how it ended.
LAUNCHER = """
import os, sys
from llm_datadist.cluster.launched_process import Command
from llm_datadist.cluster.launcher import run_commands
from llm_datadist.cluster.prefixed_output import PrefixedOutput

def command(name, program, service=False):
    return Command(name, [sys.executable, "-u", "-c", program], os.environ, service)

commands = [command("service", sys.argv[1], True), command("one", sys.argv[2]), command("two", sys.argv[3])]
output = PrefixedOutput([one.name for one in commands], (1, 2), (False, False))
outcome = run_commands(commands, output, stop_timeout_s=float(sys.argv[4]))
print("outcome", outcome.status, outcome.failed and outcome.failed.command.name)
"""

SERVICE = """
import pathlib, signal, sys, threading
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
print("up")
pathlib.Path("service").touch()
while not ended.wait(0.01):
    pass
print("down")
"""

WAIT_FOR_SERVICE = """
import pathlib, time
while not pathlib.Path("service").exists():
    time.sleep(0.005)
"""


def run(folder: Path, service: str, one: str, two: str, stop_timeout_s: float = 20.0) -> list[str]:
    programs = [textwrap.dedent(program) for program in (service, one, two)]
    ended = subprocess.run(
        [sys.executable, "-u", "-c", LAUNCHER, *programs, str(stop_timeout_s)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return ended.stdout.splitlines()


def test_a_service_is_stopped_when_all_others_have_ended(tmp_path: Path) -> None:
    lines = run(tmp_path, SERVICE, WAIT_FOR_SERVICE + "print('done')", WAIT_FOR_SERVICE + "print('done')")
    assert lines[0] == "service | up"
    assert sorted(lines[1:3]) == ["one     | done", "two     | done"]
    assert lines[3:] == ["service | down", "outcome 0 None"]


def test_workers_that_are_stopped_still_have_the_service(tmp_path: Path) -> None:
    goodbye = """
    import signal, sys
    signal.signal(signal.SIGTERM, lambda number, frame: (print("goodbye"), sys.exit(0)))
    pathlib.Path("ready").touch()
    while True:
        time.sleep(60)
    """
    failure = WAIT_FOR_SERVICE.replace('"service"', '"ready"') + "raise SystemExit(9)"
    lines = run(tmp_path, SERVICE, WAIT_FOR_SERVICE + textwrap.dedent(goodbye), failure)
    assert lines == ["service | up", "one     | goodbye", "service | down", "outcome 9 two"]


@pytest.mark.parametrize(("end", "status"), [("sys.exit(0)", 1), ("sys.exit(4)", 4)])
def test_a_service_that_ends_before_the_others_is_a_failure(tmp_path: Path, end: str, status: int) -> None:
    forever = "import time\nwhile True: time.sleep(60)"
    lines = run(tmp_path, f"import sys\n{end}", forever, forever)
    assert lines == [f"outcome {status} service"]


def test_a_service_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    deaf = """
    import pathlib, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path("service").touch()
    while True:
        time.sleep(60)
    """
    assert run(tmp_path, deaf, WAIT_FOR_SERVICE, WAIT_FOR_SERVICE, 0.3) == ["outcome 0 None"]
