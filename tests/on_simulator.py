"""Tests that run in a process of their own, in which the Ascend simulator stands in for the vendor's libraries.

The libraries stay in a process once they are loaded, with memory and threads, and a process starts them once. So the
body of such a test, a top-level function, is called in a new process, and passes if that ends with 0. Misuse of the
interface ends it by a signal.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import importlib
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from tests.ascend_simulator import build
from tests.instrumented import SANITIZER, end_with_coverage

LIMIT_S = 60.0
_LIBRARIES = ("ACL", "HCOMM", "HCCL")

# Forked from a server that has imported what tests need, and nothing of the vendor's: much faster than an interpreter.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        __name__,
        "numpy",
        "pytest",
        "llm_datadist._hccl",
        "llm_datadist.devices.ascend.detection",
        "llm_datadist.devices.ascend.pool",
    ]
)

Body = Callable[..., None]


def on_simulator(variant: str = "", **environment: object) -> Callable[[Body], Callable[..., None]]:
    """Run the decorated test on a variant of the simulator.

    Parameters
    ----------
    variant
        See `tests.ascend_simulator.build.VARIANTS`.
    **environment
        Variables; names without LLMDD_, ASCEND_ or HCCL_ in front get LLMDD_SIM_.
    """

    def decorate(test: Body) -> Callable[..., None]:
        @functools.wraps(test)
        def outside(**arguments: Any) -> None:
            _end(_start([(test, arguments)], variant, environment))

        return outside

    return decorate


def pair_on_simulator(first: Body, second: Body, variant: str = "", **environment: object) -> None:
    """Run two functions in two processes of one simulated server; each gets one end of a connection between them."""
    one, other = _CONTEXT.Pipe()
    with one, other:
        runs = _start([(first, {"peer": one}), (second, {"peer": other})], variant, environment)
    _end(runs)  # each sees the end of the other, since nobody else has the connection any more


def _start(bodies: list[tuple[Body, dict[str, Any]]], variant: str, environment: dict[str, object]) -> list[_Run]:
    variables = {"LLMDD_SIM_WORLD": uuid.uuid4().hex, "LLMDD_SIM_SETDEVICE_MS": "0"}
    for library in _LIBRARIES:
        variables[f"LLM_DATADIST_{library}_LIBRARY"] = str(build.library(variant, SANITIZER))
    for name, value in environment.items():
        full = name if name.startswith(("LLMDD_", "LLM_DATADIST_", "ASCEND_", "HCCL_")) else f"LLMDD_SIM_{name}"
        variables[full] = str(value)
    return [_Run(body, arguments, variables) for body, arguments in bodies]


def _end(runs: list[_Run]) -> None:
    deadline = time.monotonic() + LIMIT_S
    reports = [report for run in runs if (report := run.end(deadline))]
    assert not reports, "\n".join(reports)


class _Run:
    """A process that calls one function."""

    def __init__(self, body: Body, arguments: dict[str, Any], variables: dict[str, str]) -> None:
        self._name = body.__name__
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, it is closed with the process
        path = f"/proc/{os.getpid()}/fd/{self._output.fileno()}"
        body = getattr(body, "__wrapped__", body)
        inside = (body.__module__, body.__qualname__, arguments, variables, path)
        self._process = _CONTEXT.Process(target=_inside, args=inside)
        self._process.start()

    def end(self, deadline: float) -> str:
        """Wait for the end; gives what is wrong."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        ended = self._process.exitcode is not None
        self._process.kill()
        self._process.join()
        status = f"ended with {self._process.exitcode}" if ended else "does not end"
        wrong = not ended or self._process.exitcode != 0
        self._process.close()
        self._output.seek(0)
        output = self._output.read().decode(errors="replace")
        self._output.close()
        return f"{self._name} {status}:\n{output}" if wrong else ""


def _inside(module: str, name: str, arguments: dict[str, Any], variables: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for variable in [each for each in os.environ if each.startswith(("LLMDD_", "ASCEND_", "HCCL_"))]:
        del os.environ[variable]
    os.environ.update(variables)
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT_S - 5.0, exit=True)
    function = getattr(importlib.import_module(module), name)
    status = 0
    try:
        getattr(function, "__wrapped__", function)(**arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    end_with_coverage(status)
    raise SystemExit(status)


def raw() -> ctypes.CDLL:
    """The simulator, as another library of the process would call it."""
    library = ctypes.CDLL(os.environ["LLM_DATADIST_ACL_LIBRARY"])
    library.llmdd_sim_counter.restype = ctypes.c_uint64
    return library


def counter(name: str) -> int:
    """How often something happened: ``calls.<function>``, ``fault.<where>``, ``live.<objects>``."""
    return raw().llmdd_sim_counter(name.encode())


def set_knob(name: str, value: object) -> None:
    """Change a knob of the simulator in this process."""
    assert raw().llmdd_sim_set(name.encode(), str(value).encode()) == 0, f"{name}={value}"


def soon(seconds: float = 20.0) -> int:
    """A deadline for what must be done long before."""
    return time.monotonic_ns() + int(seconds * 1e9)


__all__ = ["Connection", "counter", "on_simulator", "pair_on_simulator", "raw", "set_knob", "soon"]
