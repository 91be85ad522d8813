"""The image under test.

Where an image registry can be reached it is built as it comes; else its base is made of Debian's packages, and its
wheels are made outside, since a container then has no way to a package index either.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.compose.daemon import Daemon
from tests.compose.steps import Failed, run, say, step

ROOT = Path(__file__).parents[2]
IMAGE = "llm-datadist-compose-test"

_PUBLIC_BASE = "python:3.11-slim-bookworm"
_OWN_BASE = "llm-datadist-base"
_ARCHIVE = ROOT / "build" / "base-image.tar.gz"  # kept for the next run
_WHEELS = "build/wheels"

_PULL_S = 120.0
_BASE_S = 300.0
_WHEELS_S = 600.0
_BUILD_S = 900.0


def build_image(daemon: Daemon, wheel: Path | None) -> None:
    """Build `IMAGE`; where its wheels are made outside, `wheel` may be that of the package.

    Raises
    ------
    Failed
        Something of it cannot be made.
    """
    arguments: list[str] = []
    if not (daemon.reaches_registries and _pulled(daemon)):
        base = _own_base(daemon)
        _check_python(daemon, base)
        with step("make the wheels"):
            run([str(ROOT / "docker" / "make-wheels"), *([str(wheel)] if wheel else [])], _WHEELS_S)
        arguments = ["--build-arg", f"BASE={base}", "--build-arg", f"WHEELS={_WHEELS}"]
    with step("build the image"):
        file = str(ROOT / "docker" / "Dockerfile")
        build = ["docker", "build", "--file", file, *arguments, "--tag", IMAGE, str(ROOT)]
        run(build, _BUILD_S, daemon.environment)


def remove_image(daemon: Daemon) -> None:
    """Remove what `build_image` has built; a base that was pulled stays."""
    subprocess.run(["docker", "rmi", "--force", IMAGE, _OWN_BASE], env=daemon.environment, capture_output=True)


def _pulled(daemon: Daemon) -> bool:
    say(f"pull {_PUBLIC_BASE} ...")
    try:
        run(["docker", "pull", "--quiet", _PUBLIC_BASE], _PULL_S, daemon.environment)
    except Failed as error:
        say(f"no image registry can be reached: {str(error).splitlines()[-1]}")
        return False
    return True


def _own_base(daemon: Daemon) -> str:
    if not _ARCHIVE.exists():
        with step("make a base image of Debian's packages"):
            run([str(ROOT / "docker" / "make-base-image"), str(_ARCHIVE)], _BASE_S)
    run(["docker", "import", str(_ARCHIVE), _OWN_BASE], _BASE_S, daemon.environment)
    return _OWN_BASE


def _check_python(daemon: Daemon, base: str) -> None:
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    theirs = run(["docker", "run", "--rm", "--network", "none", base, "python3", "-c", asked], 60, daemon.environment)
    ours = run([str(ROOT / ".venv" / "bin" / "python"), "-c", asked], 60)
    if theirs != ours:
        raise Failed(
            f".venv has Python {ours.strip()}, the image Python {theirs.strip()}: wheels of one do not fit the other. "
            f"Make .venv anew with: make setup PYTHON=python{theirs.strip()}"
        )
