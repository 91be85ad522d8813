"""The result of a check: what was found, a line for each step, and the verdict; or one JSON document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_datadist.device_diagnosis import DeviceState
from llm_datadist.tools.ascend_simulator import NOTICE
from llm_datadist.tools.check.checking import HOST_MEMORY, Result

_VARIABLES = ("ASCEND_", "HCCL_", "LLM_DATADIST_", "LLMDD_SIM_")
_KINDS = {HOST_MEMORY: "memory of the host", "ascend": "Ascend", "simulator": "SIMULATOR of Ascend"}


def print_report(console: Console, result: Result) -> None:
    """Print everything."""
    found = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")
    for name, value in findings(result):
        found.add_row(name, Text(value))
    console.print(found)
    steps = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, justify in (("step", "left"), ("", "left"), ("s", "right"), ("GB/s", "right"), ("what", "left")):
        steps.add_column(column, justify=justify, no_wrap=column != "what", overflow="fold")  # type: ignore[arg-type]
    for step in result.steps:
        mark = Text("FAILED", "bold red") if step.failure else Text("ok", "green")
        speed = "" if step.gb_per_s is None else f"{step.gb_per_s:.2f}"
        steps.add_row(step.name, mark, f"{step.seconds:.2f}", speed, Text(step.failure or step.detail))
    console.print(steps)
    for note in result.notes:
        console.print(Text(note), soft_wrap=True)
    if is_simulated(result):
        console.print(NOTICE, style="bold yellow")
    console.print(verdict(result), style="bold green" if result.passed else "bold red", soft_wrap=True)


def findings(result: Result) -> Iterator[tuple[str, str]]:
    """Give what was found, as names and values."""
    yield "caches in", _KINDS.get(result.kind, result.kind)
    if result.no_device:
        yield "no Ascend device", result.no_device
    software = result.software
    if software is not None:
        if software.simulator is not None:
            yield "SIMULATOR", f"version {software.simulator}, in place of the vendor's libraries"
        for path in software.libraries:
            yield "library", path
        yield "versions", ", ".join(f"{name} {version}" for name, version in software.versions.items()) or "not told"
        yield "missing functions", ", ".join(software.missing) or "none"
        if software.no_links:
            yield "no links", software.no_links
    for device_id, device in sorted(result.devices.items()):
        yield f"device {device_id}", _device(device)
    yield from environment().items()


def environment() -> dict[str, str]:
    """Give the variables that Ascend, HCCL and this library read."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}


def is_simulated(result: Result) -> bool:
    """Tell whether the libraries are the simulator; whatever was asked for."""
    return result.software is not None and result.software.simulator is not None


def verdict(result: Result) -> str:
    """Say in one line how it went."""
    if result.passed:
        return f"OK: {len(result.steps)} steps, every byte compared"
    failed = [step.name for step in result.steps if step.failure]
    return f"FAILED at: {failed[0] if failed else 'the start'}; the steps behind it were not taken"


def as_document(result: Result) -> dict[str, Any]:
    """Return the result as plain values for JSON."""
    return {
        "device": result.kind,
        "simulator": is_simulated(result),
        "no_device": result.no_device,
        "software": None if result.software is None else result.software._asdict(),
        "devices": {str(device_id): device._asdict() for device_id, device in result.devices.items()},
        "environment": environment(),
        "steps": [
            {
                "step": step.name,
                "ok": not step.failure,
                "seconds": round(step.seconds, 6),
                "gb_per_s": step.gb_per_s,
                "detail": step.detail,
                "failure": step.failure,
            }
            for step in result.steps
        ],
        "notes": result.notes,
        "passed": result.passed,
    }


def _device(device: DeviceState) -> str:
    address = device.address or device.no_address or "none, links to other servers are not possible"
    free, total = device.free / (1 << 30), device.total / (1 << 30)
    return (
        f"{device.soc_name}, physical id {device.physical_id}, one of {device.visible} visible, {free:.1f} of"
        f" {total:.1f} GiB free, network address: {address}"
    )
