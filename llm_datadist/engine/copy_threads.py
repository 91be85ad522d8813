"""How many threads one copy may use: what the process may run on, unless it is told otherwise."""

from __future__ import annotations

import math
import os
from pathlib import Path

from llm_datadist.engine.failures import invalid

VARIABLE = "LLM_DATADIST_COPY_THREADS"  # environment
MAX_THREADS = 64  # of one copy, its caller included

# Where control groups keep the share of the processors: quota and period, in microseconds. Version 2, then 1.
_QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def copy_threads(wanted: int | None = None) -> int:
    """Give the number of threads that a large copy uses, the caller's included.

    Parameters
    ----------
    wanted : int or None
        What the instance was initialised with; None = the environment variable, else the processors that the process
        may run on, as its affinity and the quota of its control group say.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: the environment variable is no number from 1 to 64.
    """
    if wanted is not None:
        return wanted
    text = os.environ.get(VARIABLE)
    if text is not None:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_THREADS):
            raise invalid("init", f"{VARIABLE} is {text!r}, should be a number from 1 to {MAX_THREADS}")
        return int(text)
    return max(1, min(len(os.sched_getaffinity(0)), _quota(), MAX_THREADS))


def _quota() -> int:
    """Processors that the quota of the control group comes to, rounded up."""
    try:
        quota, period = _QUOTA_V2.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text(encoding="ascii").strip() for path in _QUOTA_V1)
        except OSError:
            return MAX_THREADS
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return MAX_THREADS  # "max", or -1: no quota
    return math.ceil(int(quota) / int(period))
