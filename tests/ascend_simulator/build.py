"""Builds the simulator: ``python -m tests.ascend_simulator.build [--sanitize address|thread]`` prints the libraries."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
BUILD = SOURCES.parents[1] / "build" / "ascend_simulator"
SANITIZERS = ("", "address", "thread")
# The whole, and what installations with fewer names look like: <variant>.map says which names leave the library.
VARIANTS = ("", "acl_only", "no_onesided", "old")

_COMPILE = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
]
_LINK = ["-shared", "-pthread", "-Wl,-z,nodelete", "-ldl"]
_SANITIZE = {
    "": ["-O2", "-Wl,--no-undefined"],
    # Undefined behaviour ends the process as bad accesses do.
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-O0", "-fsanitize=thread"],
}


def library(variant: str = "", sanitize: str = "") -> Path:
    """
    Path of the simulator, built if its sources changed.

    Parameters
    ----------
    variant
        One of ``VARIANTS``: which names are exported.
    sanitize
        One of ``SANITIZERS``. A program that loads such a library must be started with ``LD_PRELOAD`` set to
        :func:`sanitizer_runtime`.

    Raises
    ------
    RuntimeError
        With the compiler's words if it fails.
    """
    folder = BUILD / (sanitize or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    # Workers of one test run come at the same time; all but the first find everything done.
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _fingerprint(sanitize)
        stamp = folder / "stamp"
        if not stamp.exists() or stamp.read_text() != wanted:
            _build(folder, sanitize)
            stamp.write_text(wanted)
    return folder / _name(variant)


def sanitizer_runtime(sanitize: str) -> str:
    """Path of the run-time library that must be preloaded for ``sanitize``; empty if none."""
    if not sanitize:
        return ""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
    return _run(["gcc", f"-print-file-name={name}"]).strip()


def _name(variant: str) -> str:
    return f"libascend_simulator{'_' if variant else ''}{variant}.so"


def _fingerprint(sanitize: str) -> str:
    digest = hashlib.sha256(repr((_COMPILE, _LINK, _SANITIZE[sanitize])).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h", ".map"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, sanitize: str) -> None:
    def compile_one(source: Path) -> str:
        made = folder / f"{source.stem}.o"
        _run(["gcc", *_COMPILE, *_SANITIZE[sanitize], "-c", str(source), "-o", str(made)])
        return str(made)

    def link_one(variant: str) -> None:
        exports = SOURCES / f"{variant or 'everything'}.map"
        made = folder / _name(variant)
        fresh = made.with_suffix(".new")
        _run(["gcc", *objects, *_SANITIZE[sanitize], *_LINK, f"-Wl,--version-script={exports}", "-o", str(fresh)])
        os.replace(fresh, made)  # whoever has the old one loaded keeps it

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.c"))))
        list(pool.map(link_one, VARIANTS))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", choices=SANITIZERS, default="")
    chosen = parser.parse_args().sanitize
    for each in VARIANTS:
        print(library(each, chosen))
