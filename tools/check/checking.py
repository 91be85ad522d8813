"""The parent process: has the steps carried out one by one, each with a deadline, and stops at the first that fails."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_datadist.cluster.local import LocalGroup, LocalWorker
from llm_datadist.device_diagnosis import DeviceState, Software
from llm_datadist.tools.check.shapes import BLOCK_BYTES, MOVED_BLOCKS, TENSORS
from llm_datadist.tools.check.side import HOST, Done, Failed, serve

HOST_MEMORY, ASCEND, SIMULATOR, AUTOMATIC = "host", "ascend", "simulator", "auto"

_OF_DEADLINE = 0.75  # what a call of the library gets, so that it can say what is wrong before the step is over
_START_S = 60.0  # for an interpreter to start on a busy machine; it touches no device
_STOP_S = 2.0
_NOTES_S = 2.0
_FIRST, _SECOND = "first", "second"


@dataclass(frozen=True)
class Plan:
    """What to check.

    Attributes
    ----------
    kind : str
        ``auto``, ``host``, ``ascend`` or ``simulator``.
    device_id : int
        Index among the devices that are visible.
    peer_device_id : int or None
        That of the second process; None: the one after the first.
    local : bool
        Only one device, without a link.
    nbytes : int
        Of the large cache.
    timeout_s : float
        For each step.
    """

    kind: str
    device_id: int
    peer_device_id: int | None
    local: bool
    nbytes: int
    timeout_s: float


@dataclass(frozen=True)
class Step:
    """A step that was taken.

    Attributes
    ----------
    name : str
    seconds : float
        The whole step: with filling, comparing, and repeated runs.
    detail : str
        What was measured or found.
    gb_per_s : float or None
        10^9 bytes a second, where bytes were moved.
    failure : str
        Empty if it succeeded.
    """

    name: str
    seconds: float
    detail: str = ""
    gb_per_s: float | None = None
    failure: str = ""


@dataclass
class Result:
    """What was found, and the steps that were taken."""

    kind: str
    software: Software | None = None
    devices: dict[int, DeviceState] = field(default_factory=dict)  # by device id
    no_device: str = ""  # why "auto" has chosen the host
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the library said on the way, after a failure

    @property
    def passed(self) -> bool:
        return bool(self.steps) and not any(step.failure for step in self.steps)


class _StepFailed(Exception):
    pass


def run_check(plan: Plan, result: Result, begin_step: Callable[[str], object]) -> None:
    """Take the steps; `result` is filled on the way, and `begin_step` is told of each."""
    with LocalGroup(stop_timeout_s=_STOP_S) as group:
        check = _Check(plan, result, group, begin_step)
        try:
            check.run()
        except _StepFailed:
            result.notes = check.notes()
        else:
            check.dismiss()


class _Check:
    def __init__(self, plan: Plan, result: Result, group: LocalGroup, begin_step: Callable[[str], object]) -> None:
        self._plan = plan
        self._result = result
        self._group = group
        self._begin_step = begin_step
        self._sides: dict[str, LocalWorker] = {}
        self._limit_s = 0.0  # of the step
        self._deadline = 0.0

    def run(self) -> None:
        """Take all steps; raises _StepFailed."""
        nbytes, plan = self._plan.nbytes, self._plan
        size = f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes} bytes"
        with _free_port() as port:
            self._step("first process", lambda: self._start(_FIRST), _START_S)
            self._look()
            cache_id = self._step("allocate", lambda: self._open(_FIRST, plan.device_id, port))
            self._measure("host to device", nbytes, size, lambda: self._ask(_FIRST, "copy_in", 1))
            self._measure("device to host", nbytes, size, lambda: self._ask(_FIRST, "copy_out", 1))
            self._measure("inside the device", nbytes, size, lambda: self._ask(_FIRST, "copy_inside", 1))
            swapped = MOVED_BLOCKS * BLOCK_BYTES * TENSORS
            what = f"{MOVED_BLOCKS} blocks of {BLOCK_BYTES >> 10} KiB in {TENSORS} tensors"
            self._measure("swap_blocks", 2 * swapped, f"{what}, out and in", lambda: self._ask(_FIRST, "swap", 2))
            if not plan.local:
                self._check_link(port, cache_id, size, swapped, what)
            self._step("finalize", self._close)

    def _check_link(self, port: int, cache_id: int, size: str, block_bytes: int, blocks: str) -> None:
        nbytes = self._plan.nbytes
        device_id = self._step("second process", self._start_second, _START_S)
        self._step("second device", lambda: self._open_second(device_id, port))
        self._step("link", lambda: self._link(port))
        self._step("fill caches", lambda: self._ask(_FIRST, "fill", 3))
        self._measure("pull_cache", nbytes, size, lambda: self._ask(_SECOND, "pull", 3, cache_id))
        self._measure("pull_blocks", block_bytes, blocks, lambda: self._ask(_SECOND, "pull_blocks", 3))
        self._step("small pulls", self._small_pulls)
        self._measure("push by layer", nbytes, size, self._push)
        self._step("unlink", lambda: self._ask(_SECOND, "unlink", port))

    def notes(self) -> list[str]:
        """Give what the library said in the processes that still answer."""
        notes = []
        for name in list(self._sides):
            self._set_limit(_NOTES_S)
            with contextlib.suppress(_StepFailed):
                notes += [f"{name} process: {line}" for line in self._ask(name, "notes")]
        return notes

    def dismiss(self) -> None:
        for worker in self._sides.values():
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        for worker in self._sides.values():
            worker.wait(_STOP_S)

    # ---- steps

    def _look(self) -> None:
        result, device_id = self._result, self._plan.device_id
        if result.kind == AUTOMATIC:
            result.no_device = self._step("choose", lambda: self._ask(_FIRST, "why_no_device"))
            result.kind = HOST_MEMORY if result.no_device else ASCEND
        if result.kind == HOST_MEMORY:
            return
        result.software = self._step("libraries", lambda: self._ask(_FIRST, "software"))
        result.devices[device_id] = self._step("device", lambda: self._ask(_FIRST, "device", device_id))

    def _open(self, name: str, device_id: int, port: int) -> Any:
        role = "PROMPT" if name == _FIRST else "DECODER"
        return self._ask(name, "open", self._result.kind, device_id, role, port, self._plan.nbytes)

    def _start(self, name: str) -> None:
        timeout_ms = max(1, int(self._plan.timeout_s * _OF_DEADLINE * 1000))
        self._sides[name] = self._group.start(name, serve, timeout_ms)
        self._ask(name, "notes")

    def _start_second(self) -> int:
        device_id = self._peer_device_id()
        self._start(_SECOND)
        return device_id

    def _open_second(self, device_id: int, port: int) -> None:
        if self._result.kind != HOST_MEMORY:
            self._result.devices[device_id] = self._ask(_SECOND, "device", device_id)
        self._open(_SECOND, device_id, port)

    def _peer_device_id(self) -> int:
        plan = self._plan
        if plan.peer_device_id is not None or self._result.kind == HOST_MEMORY:
            return plan.peer_device_id or 0
        visible = self._result.devices[plan.device_id].visible
        if visible < 2:
            raise _StepFailed("this process sees one device, a link joins two; --local checks one alone")
        return (plan.device_id + 1) % visible

    def _link(self, port: int) -> str:
        software = self._result.software
        if software is not None and software.no_links:
            raise _StepFailed(software.no_links)
        transport: str = self._ask(_SECOND, "link", port)
        if self._result.kind != HOST_MEMORY and not transport.startswith("hccl"):
            raise _StepFailed(f"the link is over {transport}, should be over hccl")
        return f"over {transport}"

    def _small_pulls(self) -> str:
        taken = self._ask(_SECOND, "pull_one_block", 3)
        median, most = taken[len(taken) // 2] * 1e6, taken[-1] * 1e6
        size = f"{BLOCK_BYTES >> 10} KiB in {TENSORS} tensors"
        return f"{size}: median {median:,.0f} us, the slowest of {len(taken)} {most:,.0f} us"

    def _push(self) -> float:
        addresses = self._ask(_SECOND, "expect_push")
        seconds: float = self._ask(_FIRST, "push", 4, addresses)
        self._ask(_SECOND, "compare_pushed", 4)
        return seconds

    def _close(self) -> None:
        for name in reversed(list(self._sides)):
            self._ask(name, "close")

    # ---- how a step is taken

    def _measure(self, name: str, nbytes: int, what: str, run: Callable[[], float]) -> None:
        """Take a step that gives the seconds in which it moved so many bytes."""

        def measured() -> tuple[str, float]:
            return what, nbytes / run() / 1e9

        self._step(name, measured)

    def _step(self, name: str, run: Callable[[], Any], least_s: float = 0.0) -> Any:
        """Take a step and note it; a text that it gives is its detail, with a number the speed."""
        self._begin_step(name)
        started = time.monotonic()
        self._set_limit(max(least_s, self._plan.timeout_s))
        try:
            answer = run()
        except _StepFailed as failure:
            self._result.steps.append(Step(name, time.monotonic() - started, failure=str(failure)))
            raise
        detail, speed = "", None
        if isinstance(answer, tuple) and not isinstance(answer, (Software, DeviceState)):
            detail, speed = answer
        elif isinstance(answer, str) and name != "choose":
            detail = answer
        self._result.steps.append(Step(name, time.monotonic() - started, detail, speed))
        return answer

    def _set_limit(self, seconds: float) -> None:
        self._limit_s, self._deadline = seconds, time.monotonic() + seconds

    def _ask(self, name: str, *order: Any) -> Any:
        worker = self._sides[name]
        try:
            worker.connection.send(order)
            if not worker.connection.poll(max(0.0, self._deadline - time.monotonic())):
                raise _StepFailed(self._out_of_time(name, worker))
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._sides.pop(name)
            worker.wait(_STOP_S)
            raise _StepFailed(f"the {name} process has died{_how(worker.exitcode)}") from None
        if isinstance(answer, Failed):
            raise _StepFailed(answer.reason)
        assert isinstance(answer, Done)
        return answer.answer

    def _out_of_time(self, name: str, worker: LocalWorker) -> str:
        self._sides.pop(name)
        worker.kill()
        return f"the {name} process did not answer within the {self._limit_s:g} s of a step, and was killed"


def _how(status: int | None) -> str:
    if status is None:
        return ""
    return f" of signal {-status}" if status < 0 else f" with exit status {status}"


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """Give a port of the loopback address that nobody else gets until the block ends."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        yield int(holder.getsockname()[1])
