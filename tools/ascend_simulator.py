"""The environment in which a tool and its processes find the Ascend simulator in place of the vendor's libraries."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

NOTICE = "SIMULATOR: no number of this run means anything for hardware."

_BUILD = Path("tests", "ascend_simulator", "build.py")  # in the source tree, beside the folder of the tools
_LIBRARIES = ("LLM_DATADIST_ACL_LIBRARY", "LLM_DATADIST_HCOMM_LIBRARY", "LLM_DATADIST_HCCL_LIBRARY")
_DEVICE = "LLM_DATADIST_DEVICE"
# What a tool that chooses for itself does not need to be told; whoever sets one of them is obeyed.
_DEFAULTS = {"LLMDD_SIM_DEVICES": "2"}
_WORLD = "LLMDD_SIM_WORLD"  # processes of one world see each other's devices, and nobody else's


class SimulatorMissing(Exception):
    """There is no simulator; says why."""


@contextlib.contextmanager
def simulator(library: Path | None = None) -> Iterator[None]:
    """Set environment variables, for this process and those that it starts, until the block ends.

    Parameters
    ----------
    library : Path or None
        Simulator to use; None: the one of the source tree, which is built if its sources have changed.

    Raises
    ------
    SimulatorMissing
        There is no source tree, the compiler fails, or there is no such file.
    """
    path = str(_checked(library) if library is not None else _built())
    variables = {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}
    variables.update(dict.fromkeys(_LIBRARIES, path))
    variables[_DEVICE] = "simulator"
    variables[_WORLD] = secrets.token_hex(8)
    with environment(variables):
        yield


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _checked(library: Path) -> Path:
    if not library.is_file():
        raise SimulatorMissing(f"there is no library {library}")
    return library.resolve()


def _built() -> Path:
    build = Path(__file__).resolve().parents[1] / _BUILD
    if not build.is_file():
        raise SimulatorMissing(
            "the simulator is built from the source tree, and this is an installed package: run the command in a source"
            " tree, or name a library that was built in one (python -m tests.ascend_simulator.build prints it)"
        )
    # By its path: "tests" may be another package where the command is run.
    spec = importlib.util.spec_from_file_location("llm_datadist_ascend_simulator_build", build)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        library: Path = module.library()
    except (OSError, RuntimeError) as error:
        raise SimulatorMissing(f"the simulator cannot be built: {error}") from error
    return library
