"""Ties the life of a process to that of the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
# Loaded by the import: a child between fork and exec calls it, and must not load libraries there.
_libc = ctypes.CDLL(None, use_errno=True)

__all__ = ["die_with_parent"]


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process (SIGKILL) when its parent ends, however that happens.

    It holds across exec, and not for children of this process. To the kernel the parent is the thread that started this
    process, so a process that starts others does so in a thread that lives as long as they shall.

    Parameters
    ----------
    parent_pid : int
        Process id of the parent, taken before this process was started. If it has ended meanwhile, this process ends at
        once, with status 1.

    Raises
    ------
    OSError
        The kernel refuses.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}: cannot tie the worker to the life of its parent")
    if os.getppid() != parent_pid:  # the parent died before the request above took effect
        os._exit(1)
