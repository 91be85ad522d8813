"""Which machine the numbers are from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, memory, kernel, Python and version of the package."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(_first("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "kernel": platform.release(),
        "huge_pages_of_shared_memory": _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "python": platform.python_version(),
        "llm_datadist": version("llm_datadist"),
    }


def _first(path: str, name: str) -> str:
    """Give the value of a line ``name: value``; processors of some architectures have no name there."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
