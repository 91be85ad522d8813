"""The simulator itself has no race, no bad access, no undefined behaviour and no leak."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ascend_simulator import build


@pytest.mark.skipif(not os.environ.get("LLM_DATADIST_SANITIZE"), reason="compiled anew for it; make sanitize runs it")
@pytest.mark.timeout(300)  # compiles the library, on a machine that may be busy
@pytest.mark.parametrize("sanitize", ["thread", "address"])
@pytest.mark.skipif("SANITIZE" in os.environ, reason="everything runs under a sanitizer already")
def test_stress(world, sanitize):
    environment = {
        **os.environ,
        "LD_PRELOAD": build.sanitizer_runtime(sanitize),
        "LLMDD_SIM_WORLD": world,
        "LLMDD_SIM_JITTER_US": "300",
        "LLMDD_SIM_PIECE_KIB": "32",
        "LLMDD_SIM_QUARANTINE_MIB": "1",
        "PYTHONMALLOC": "malloc",
        # The interpreter's own leaks must not decide; those of the simulator are looked for below.
        "LSAN_OPTIONS": "exitcode=0",
    }
    if subprocess.run([sys.executable, "-c", ""], env=environment, check=False).returncode:
        pytest.skip(f"this interpreter does not start with the {sanitize} sanitizer's library")
    command = [sys.executable, "-m", "tests.ascend_simulator.stress", str(build.library("", sanitize))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "libascend_simulator" not in done.stderr, done.stderr
