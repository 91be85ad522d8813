"""Every program in examples/ runs and ends well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("program", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "__init__.py"))
def test_example(program: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
