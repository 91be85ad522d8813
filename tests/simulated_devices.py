"""Processes that see devices of the Ascend simulator, for tests whose caches lie on a device.

HCCL links two devices, never one with itself, so every process of a test sees a device of its own as number 0. The
simulator reads most of its variables once in a process: they are set before the process first uses a device.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection

from llm_datadist.cluster.local import LocalGroup
from tests.ascend_simulator import build
from tests.instrumented import SANITIZER
from tests.processes import Member, serve

OPTION = {"llm.DeviceBackend": "simulator"}
HOST_VISIBLE = {"LLMDD_SIM_HOST_VISIBLE": "1"}  # the host may look into the memory, which no hardware allows

_DEVICES = 64
_WORLD = uuid.uuid4().hex  # the processes of this run meet each other and nobody else
_LIBRARIES = ("ACL", "HCOMM", "HCCL")


def variables(*devices: int, **knobs: object) -> dict[str, str]:
    """Give the environment of a process that sees these devices of the simulator; `knobs` stand without LLMDD_SIM_."""
    library = str(build.library("", SANITIZER))
    return {
        **{f"LLM_DATADIST_{name}_LIBRARY": library for name in _LIBRARIES},
        "ASCEND_RT_VISIBLE_DEVICES": ",".join(map(str, devices)),
        "LLMDD_SIM_WORLD": _WORLD,
        "LLMDD_SIM_DEVICES": str(_DEVICES),
        "LLMDD_SIM_SETDEVICE_MS": "0",
        # HCCL's minute for an operation becomes six seconds, which is still longer than a transfer may take.
        "LLMDD_SIM_TIME_SCALE": "0.1",
        **{f"LLMDD_SIM_{name}": str(value) for name, value in knobs.items()},
    }


class DeviceMembers:
    """Starts members in which `llm.DeviceBackend` may be the simulator, each with the next device.

    Parameters
    ----------
    group : LocalGroup
        Owns the processes.
    first : int
        Device of the first one.
    environment : dict of str to str
        Further variables of each of them.
    """

    def __init__(self, group: LocalGroup, first: int, environment: dict[str, str]) -> None:
        self._group = group
        self._devices = itertools.count(first)
        self._environment = environment

    def __call__(self, name: str, **knobs: object) -> Member:
        given = {**variables(next(self._devices), **knobs), **self._environment}
        return Member(self._group, name, _serve_with, given)


def _serve_with(connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    serve(connection)


Members = Callable[..., Member]
