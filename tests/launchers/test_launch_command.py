"""The command ``llm-datadist launch``: what its workers get, how their output is shown, and how it all ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from llm_datadist.cluster.cluster_file import parse_cluster_file

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli", "launch"]
DEADLINE_S = 30.0
F_GETPIPE_SZ = 1032  # fcntl(2); in the fcntl module from Python 3.10 on

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write a worker; it knows its rank, and can leave notes in the folder that is its first argument."""

    def write(body: str) -> str:
        path = tmp_path / "worker.py"
        path.write_text(
            "import os, pathlib, signal, subprocess, sys, time\n"
            "rank = int(os.environ['LLM_DATADIST_RANK'])\n"
            f"notes = pathlib.Path({str(tmp_path)!r})\n"
            "def note(name, text=''):\n"
            "    (notes / 'new').with_suffix(f'.{rank}').write_text(str(text))\n"
            "    (notes / 'new').with_suffix(f'.{rank}').rename(notes / f'{name}-{rank}')\n"
            "def wait_for(*names):\n"
            "    while not all((notes / name).exists() for name in names):\n"
            "        time.sleep(0.005)\n"
            "def sleep():\n"
            "    while True:\n"
            "        time.sleep(60)\n" + textwrap.dedent(body)
        )
        return str(path)

    return write


@contextmanager
def launched(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, **options}
    with subprocess.Popen([*COMMAND, *arguments], **settings) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """Run it to its end; gives status, output, errors."""
    with launched(*arguments, **options) as launcher:
        output, errors = launcher.communicate(timeout=DEADLINE_S)
    return launcher.returncode, output.decode(), errors.decode()


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Say whether a process runs; a dead one may wait for an init process that does not look after its children."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def bytes_in(pipe: IO[bytes]) -> int:
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def wait_for_notes(folder: Path, *names: str) -> list[str]:
    paths = [folder / name for name in names]
    wait_until(lambda: all(path.exists() for path in paths), f"{names} in {folder}")
    return [path.read_text() for path in paths]


def test_what_workers_are_told(script: Script) -> None:
    worker = script("import json; print(json.dumps([sys.argv[1:], dict(os.environ)]))")
    status, output, errors = run(
        "--prompts", "1", "--decoders", "2", worker, "--prompts", "x", "--", "-h",
        env={**os.environ, "LLM_DATADIST_ROLES": "mixes=3", "LLM_DATADIST_LAUNCHER": "slurm", "MINE": "yes"},
    )  # fmt: skip
    assert (status, errors) == (0, "")
    told = {name.strip(): json.loads(text) for name, _, text in (line.partition(" | ") for line in output.splitlines())}
    assert told.keys() == {"prompt-0", "decoder-0", "decoder-1"}
    for rank, (name, role) in enumerate([("prompt-0", "PROMPT"), ("decoder-0", "DECODER"), ("decoder-1", "DECODER")]):
        arguments, environment = told[name]
        assert arguments == ["--prompts", "x", "--", "-h"]
        assert environment["MINE"] == "yes"
        variables = {key[13:]: value for key, value in environment.items() if key.startswith("LLM_DATADIST_")}
        clusters = parse_cluster_file(variables.pop("CLUSTER"))
        assert variables == {
            "LAUNCHER": "llm-datadist",
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "ROLE": role,
            "DEVICE": "host",  # of the environment of all tests
        }
        assert [cluster.cluster_id for cluster in clusters.clusters] == [1, 2, 3]
        assert len({cluster.listen_ip_info for cluster in clusters.clusters}) == 3


def test_a_module(script: Script, tmp_path: Path) -> None:
    script("print(__name__, sys.argv[1:])")
    status, output, _ = run("--decoders", "1", "-m", "worker", "-m", "x", cwd=tmp_path)
    assert (status, output) == (0, "decoder-0 | __main__ ['-m', 'x']\n")


def test_the_clusters_of_a_file(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("clusters: [{cluster_id: 9, role: MIX}, {cluster_id: 8, role: DECODER, devices: [4]}]")
    worker = script(
        """
        from llm_datadist.cluster.rank_environment import read_rank_environment
        print(read_rank_environment().cluster.cluster_id)
        """
    )
    status, output, _ = run("--cluster", str(path), worker)
    assert (status, sorted(output.splitlines())) == (0, ["decoder-0 | 8", "mix-0     | 9"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{worker}"], "nothing to start: say --prompts and --decoders, or --cluster"),
        (["--prompts", "0", "{worker}"], "nothing to start"),
        (["--prompts", "1"], "Missing argument 'WORKER'"),
        (["--prompts", "1", "nowhere.py"], "there is no file 'nowhere.py'; a module is started with -m"),
        (["--prompts", "1", "--cluster", "{worker}", "{worker}"], "leave --prompts and --decoders away"),
        (["--cluster", "{worker}", "{worker}"], "worker.py:"),
        (["--prompts", "1", "--host", "192.0.2.1", "{worker}"], "--host is '192.0.2.1', where this host cannot listen"),
        (["--readers", "1", "{worker}"], "No such option"),
    ],
)
def test_options_that_cannot_be(script: Script, arguments: list[str], message: str) -> None:
    worker = script("raise AssertionError('started')")
    status, output, errors = run(*(argument.format(worker=worker) for argument in arguments))
    assert (status, output) == (2, "")
    assert message in errors


def test_lines_stay_whole_and_streams_apart(script: Script) -> None:
    worker = script(
        """
        for number in range(2000):
            print(f"{rank} says {number} " + "." * (number % 300))
            print(f"{rank} warns {number}", file=sys.stderr)
        """
    )
    status, output, errors = run("--prompts", "2", "--decoders", "1", worker)
    assert status == 0
    for name, rank in [("prompt-0 ", 0), ("prompt-1 ", 1), ("decoder-0", 2)]:
        own = [line for line in output.splitlines() if line.startswith(name)]
        assert own == [f"{name} | {rank} says {number} " + "." * (number % 300) for number in range(2000)]
        own = [line for line in errors.splitlines() if line.startswith(name)]
        assert own == [f"{name} | {rank} warns {number}" for number in range(2000)]
    assert len(output.splitlines()) == len(errors.splitlines()) == 6000


def test_lines_without_end_of_any_bytes_and_very_long(script: Script) -> None:
    worker = script(r"sys.stdout.buffer.write(b'\xff\x00\r\n' + b'x' * 200_000 + b'\nlast')")
    with launched("--decoders", "1", worker) as launcher:
        output, _ = launcher.communicate(timeout=DEADLINE_S)
    first, *parts, last = output.split(b"\n")[:-1]
    assert (first, last) == (b"decoder-0 | \xff\x00", b"decoder-0 | last")
    assert b"".join(part[len("decoder-0 | ") :] for part in parts) == b"x" * 200_000
    assert len(parts) > 1  # nobody keeps more than 128 KiB of a line


@pytest.mark.parametrize("color", ["always", "never", "auto"])
def test_colours(script: Script, color: str) -> None:
    worker = script("print('text')")
    _, output, _ = run("--prompts", "1", "--decoders", "1", "--color", color, worker)
    names = {"prompt-0  | ", "decoder-0 | "}
    if color == "always":
        found = re.findall("\x1b\\[([0-9]+)m(.*)\x1b\\[0mtext\n", output)
        assert ({name for _, name in found}, len({number for number, _ in found})) == (names, 2)
    else:
        assert set(output.splitlines()) == {f"{name}text" for name in names}


def test_standard_input_is_empty(script: Script) -> None:
    assert (
        run("--decoders", "1", script("print(repr(sys.stdin.read()))"), stdin=subprocess.DEVNULL)[1]
        == "decoder-0 | ''\n"
    )


def test_one_failure_ends_all(script: Script, tmp_path: Path) -> None:
    worker = script(
        """
        note("up")
        if rank == 1:
            wait_for("up-0", "up-2")
            for number in range(30):
                print("line", number)
            raise SystemExit("it failed on purpose")
        try:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
            note("ready")
            sleep()
        finally:
            note("cleaned")
        """.replace('wait_for("up-0", "up-2")', 'wait_for("ready-0", "ready-2")')
    )
    status, output, errors = run("--prompts", "2", "--decoders", "1", "--tail", "3", worker)
    assert status == 1
    assert "prompt-1  | line 0\n" in output
    report = errors.partition("llm-datadist launch: ")[2]
    assert report.splitlines()[:2] == ["prompt-1 ended with status 1, the others were stopped", "its last 3 lines:"]
    assert "    it failed on purpose" in report.splitlines()
    assert sorted(path.name for path in tmp_path.glob("cleaned-*")) == ["cleaned-0", "cleaned-2"]


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("sys.exit(7)", 7, "ended with status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", 128 + signal.SIGRTMIN + 3, "was ended by signal"),
    ],
)
def test_the_status_is_that_of_the_failure(script: Script, end: str, status: int, words: str) -> None:
    worker = script(f"if rank == 1: {end}\nsleep()")
    ended, _, errors = run("--prompts", "1", "--decoders", "1", worker)
    assert (ended, f"decoder-0 {words}" in errors) == (status, True)


def test_processes_that_do_not_listen_are_killed(script: Script) -> None:
    worker = script(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("deaf")
        if rank == 0:
            wait_for("deaf-1", "deaf-2")
            sys.exit(5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        sleep()
        """
    )
    began = time.monotonic()
    assert run("--prompts", "1", "--decoders", "2", "--stop-timeout", "0.5", worker)[0] == 5
    assert time.monotonic() - began < 10.0


def test_a_stopped_process_hears_that_it_shall_end(script: Script, tmp_path: Path) -> None:
    worker = script(
        """
        signal.signal(signal.SIGTERM, lambda number, frame: (note("heard"), sys.exit(0)))
        note("pid", os.getpid())
        if rank == 1:
            wait_for("pid-0", "go")
            sys.exit(5)
        sleep()
        """
    )
    with launched("--decoders", "2", worker) as launcher:
        (pid,) = wait_for_notes(tmp_path, "pid-0")
        os.kill(int(pid), signal.SIGSTOP)
        (tmp_path / "go").touch()
        launcher.communicate(timeout=DEADLINE_S)
    assert (launcher.returncode, (tmp_path / "heard-0").exists()) == (5, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(script: Script, tmp_path: Path, number: signal.Signals) -> None:
    worker = script(
        f"""
        def end(number, frame):
            print("got", signal.Signals(number).name)
            sys.exit(4)
        signal.signal({int(number)}, end)
        note("ready")
        sleep()
        """
    )
    with launched("--prompts", "1", "--decoders", "1", worker) as launcher:
        wait_for_notes(tmp_path, "ready-0", "ready-1")
        launcher.send_signal(number)
        output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 128 + number
    assert sorted(output.decode().splitlines()) == [f"decoder-0 | got {number.name}", f"prompt-0  | got {number.name}"]
    assert errors.decode() == f"llm-datadist launch: stopped by {number.name}\n"


def test_a_second_signal_kills(script: Script, tmp_path: Path) -> None:
    worker = script("signal.signal(signal.SIGINT, lambda number, frame: note('heard'))\nnote('ready')\nsleep()")
    with launched("--decoders", "2", "--stop-timeout", "3600", worker) as launcher:
        wait_for_notes(tmp_path, "ready-0", "ready-1")
        launcher.send_signal(signal.SIGINT)
        wait_for_notes(tmp_path, "heard-0", "heard-1")
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 128 + signal.SIGINT


def test_signals_that_were_ignored_stay_ignored(script: Script, tmp_path: Path) -> None:
    worker = script("note('ready')\nwait_for('go')\nprint(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched("--decoders", "1", worker) as launcher:
            wait_for_notes(tmp_path, "ready-0")
            launcher.send_signal(signal.SIGHUP)
            (tmp_path / "go").touch()
            output, _ = launcher.communicate(timeout=DEADLINE_S)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (launcher.returncode, output) == (0, b"decoder-0 | True\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_no_process_outlives_the_launcher(script: Script, tmp_path: Path, number: signal.Signals) -> None:
    worker = script("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('pid', os.getpid())\nsleep()")
    with launched("--prompts", "1", "--decoders", "2", worker) as launcher:
        pids = [int(pid) for pid in wait_for_notes(tmp_path, "pid-0", "pid-1", "pid-2")]
        assert all(is_alive(pid) for pid in pids)
        launcher.send_signal(number)
        assert launcher.wait(DEADLINE_S) == -number
    try:
        wait_until(lambda: not any(is_alive(pid) for pid in pids), f"{pids} outlive their launcher")
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_what_a_worker_leaves_behind_ends_with_it(script: Script, tmp_path: Path) -> None:
    worker = script("note('pid', subprocess.Popen(['sleep', '1000']).pid)\nprint('done')")
    assert run("--decoders", "1", worker)[:2] == (0, "decoder-0 | done\n")
    assert not is_alive(int((tmp_path / "pid-0").read_text()))


def test_who_leaves_the_session_holds_nobody_up(script: Script, tmp_path: Path) -> None:
    """A daemon that keeps the pipes of its worker open, and writes to them without end."""
    worker = script("note('pid', subprocess.Popen(['yes'], start_new_session=True).pid)\nsys.exit(6)")
    with launched("--decoders", "1", worker, stdout=subprocess.DEVNULL) as launcher:
        try:
            launcher.communicate(timeout=DEADLINE_S)
            assert launcher.returncode == 6
        finally:
            os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)


def test_nobody_reads_the_output(script: Script) -> None:
    worker = script("while True: print('text')")
    with launched("--decoders", "2", worker) as launcher:
        assert launcher.stdout.read(1) == b"d"
        launcher.stdout.close()
        assert launcher.wait(DEADLINE_S) == 128 + signal.SIGPIPE
        assert launcher.stderr.read().endswith(b"llm-datadist launch: stopped by SIGPIPE\n")


def test_signals_arrive_while_the_output_is_blocked(script: Script, tmp_path: Path) -> None:
    worker = script(
        """
        signal.signal(signal.SIGINT, lambda number, frame: (note("heard"), os._exit(0)))
        note("ready")
        while True:
            print("text" * 1000)
        """
    )
    with launched("--decoders", "1", worker) as launcher:
        wait_for_notes(tmp_path, "ready-0")
        full = fcntl.fcntl(launcher.stdout, F_GETPIPE_SZ) * 3 // 4
        wait_until(lambda: bytes_in(launcher.stdout) > full, "the launcher writes to a full pipe")
        launcher.send_signal(signal.SIGINT)
        wait_for_notes(tmp_path, "heard-0")
        launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 128 + signal.SIGINT
