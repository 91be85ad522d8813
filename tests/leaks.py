"""What a process holds of the system, by name, so that two moments can be compared."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def resources() -> set[str]:
    """Name every process, thread, descriptor and piece of shared memory that this process has now."""
    return {*_children(), *_threads(), *_descriptors(), *_shared_memory()}


def _children() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            # "pid (name) state parent ...": the name may contain anything, also parentheses
            name, _, rest = entry.joinpath("stat").read_text().rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                yield f"process {name})"


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"thread {thread.name} ({thread.native_id})"
    for task in Path("/proc/self/task").iterdir():  # native threads of the library, which Python does not know
        with contextlib.suppress(OSError):  # it ended meanwhile
            name = task.joinpath("comm").read_text().strip()
            if name.startswith("llm_datadist"):
                yield f"native thread {name} ({task.name})"


def _descriptors() -> Iterator[str]:
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the directory
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            yield f"descriptor {descriptor} {target}"


def _shared_memory() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:" in line:
            yield f"mapping {line}"
