"""The tests with native code that is compiled for looking at it, in a tree of its own in build/.

    python -m tests.instrumented coverage [arguments of pytest]     which lines were run
    python -m tests.instrumented address [arguments of pytest]      AddressSanitizer and UndefinedBehaviorSanitizer
    python -m tests.instrumented thread [arguments of pytest]       ThreadSanitizer

Without arguments the tests of Ascend run. The simulator is built in the same way. Only gcc is needed, and the package
`coverage` for the first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = os.environ.get("SANITIZE", "")  # that this process runs under
VARIABLE = "LLM_DATADIST_INSTRUMENT"
_COPIED = ("llm_datadist", "llm_datadist_v1", "cluster", "tools", "examples", "tests", "docs")
_FILES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE")
_INSIDE = ("cluster", "tools", "examples")  # live beside the package, and are installed in it
# What the project promises of: nine lines of ten.
_NATIVE = ("_acl_", "_hccl", "_ascend_", "_shared_library")
_PYTHON = ("llm_datadist/devices/ascend/*", "llm_datadist/transports/hccl/*")
_RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
_OPTIONS = {
    # Python frees little of what it has at its end; a host that touches device memory is the simulator's to report.
    "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:suppressions={tree}/tsan.supp",
}


# ZeroMQ is not compiled for it: what orders its threads is not seen.
_SUPPRESSIONS = """called_from_lib:libzmq
called_from_lib:_zmq.cpython
race:libzmq
"""


def end_with_coverage(status: int) -> None:
    """End this process so that its counters are written down, if they are counted: one that was forked does not."""
    if os.environ.get(VARIABLE) != "coverage":
        return
    import coverage

    current = coverage.Coverage.current()
    if current is not None:
        current.stop()
        current.save()
    ctypes.CDLL(None).exit(status)


def main() -> int:
    """Build the tree, run the tests in it, and say what was covered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("coverage", "address", "thread"))
    kind, arguments = parser.parse_known_args()
    tree = ROOT / "build" / kind.kind
    _copy(tree)
    environment = {**os.environ, VARIABLE: kind.kind, "PYTHONPATH": str(tree)}
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], tree, environment, check=True)
    for data in tree.rglob("*.gcda"):
        data.unlink()
    if kind.kind != "coverage":
        (tree / "tsan.supp").write_text(_SUPPRESSIONS)
        options = {name: value.format(tree=tree) for name, value in _OPTIONS.items()}
        environment.update(options, SANITIZE=kind.kind, LD_PRELOAD=_runtime(kind.kind))
    command = [sys.executable, "-m", "pytest", *(arguments or _of_ascend(tree))]
    if kind.kind == "coverage":
        (tree / ".coveragerc").write_text(_COVERAGE)
        command[1:2] = ["-m", "coverage", "run", "-m"]
        environment["COVERAGE_PROCESS_START"] = str(tree / ".coveragerc")
    status = _run(command, tree, environment)
    if kind.kind == "coverage":
        _report(tree, environment)
    return status


_COVERAGE = """[run]
branch = false
parallel = true
concurrency = multiprocessing, thread
source = llm_datadist
"""


def _of_ascend(tree: Path) -> list[str]:
    found = [str(path.relative_to(tree)) for path in sorted((tree / "tests").rglob("test_*a*.py")) if _is_ascend(path)]
    return ["-q", "-n", "auto", *found]


def _is_ascend(path: Path) -> bool:
    return path.name.startswith(("test_acl", "test_ascend", "test_hccl", "test_vendor", "test_layer_order")) and (
        path.parent.name != "ascend_simulator"
    )


def _copy(tree: Path) -> None:
    """Bring the tree up to date; what was built in it stays."""
    for name in _COPIED:
        for source in (ROOT / name).rglob("*"):
            if source.is_dir() or source.suffix in (".so", ".pyc") or "__pycache__" in source.parts:
                continue
            target = tree / source.relative_to(ROOT)
            if not target.exists() or target.stat().st_mtime != source.stat().st_mtime:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    for name in _FILES:
        shutil.copy2(ROOT / name, tree / name)
    for name in _INSIDE:
        link = tree / "llm_datadist" / name
        if not link.is_symlink():
            link.symlink_to(tree / name)


def _run(command: list[str], tree: Path, environment: dict[str, str], *, check: bool = False) -> int:
    return subprocess.run(command, cwd=tree, env=environment, check=check).returncode


def _runtime(kind: str) -> str:
    """Path of the sanitizer's library, which must be loaded before everything else."""
    return subprocess.check_output(["gcc", f"-print-file-name={_RUNTIMES[kind]}"], text=True).strip()


def _report(tree: Path, environment: dict[str, str]) -> None:
    covered: dict[str, dict[int, int]] = defaultdict(dict)
    for data in tree.rglob("*.gcda"):
        if not data.name.startswith(_NATIVE):
            continue
        text = subprocess.check_output(["gcov", "--json-format", "--stdout", str(data)], cwd=tree, text=True)
        for file in json.loads(text)["files"]:
            if file["file"].endswith(".pyx"):
                lines = covered[file["file"]]
                written = len((tree / file["file"]).read_text().splitlines())
                for line in file["lines"]:
                    if line["line_number"] <= written:  # what is beyond is code that Cython puts into every module
                        lines[line["line_number"]] = max(lines.get(line["line_number"], 0), line["count"])
    for name, lines in sorted(covered.items()):
        missing = [number for number, count in sorted(lines.items()) if count == 0]
        share = 100 * (1 - len(missing) / len(lines))
        print(f"{name:45} {len(lines):5} lines {share:6.1f} %   not run: {missing}")
    _run([sys.executable, "-m", "coverage", "combine", "-q"], tree, environment)
    _run([sys.executable, "-m", "coverage", "report", "-m", f"--include={','.join(_PYTHON)}"], tree, environment)


if __name__ == "__main__":
    raise SystemExit(main())
