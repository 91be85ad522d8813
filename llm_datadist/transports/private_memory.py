"""Memory of a peer that cannot be mapped, because it belongs to the peer's program: which way leads to it.

The kernel copies between processes (process_vm_readv(2)) where it lets one of them trace the other: same user, and the
Yama module not in the way. Otherwise the owner's data server moves the bytes.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

_log = logging.getLogger("llm_datadist.link")

PROCESS_VM = "process_vm"
DATA_SERVER = "data_server"
VARIABLE = "LLM_DATADIST_PRIVATE_MEMORY"  # environment: forces one of the two

_YAMA_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_RESTRICTED = "1"  # only descendants, and whom a process names
_PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def may_use_kernel() -> bool:
    """Tell whether this process may try to reach a peer's memory through the kernel.

    Raises
    ------
    ValueError
        The environment variable has another value than the two ways.
    """
    wanted = os.environ.get(VARIABLE, PROCESS_VM)
    if wanted not in (PROCESS_VM, DATA_SERVER):
        raise ValueError(f"{VARIABLE} is {wanted!r}, should be {PROCESS_VM!r} or {DATA_SERVER!r}")
    return wanted == PROCESS_VM


def let_peers_in() -> None:
    """Let processes of the same user reach the memory of this one, where Yama would only let its parents.

    That is what Linux allows without Yama. With the environment variable set to ``data_server`` nothing is changed.
    """
    try:
        scope = _YAMA_SCOPE.read_text(encoding="ascii").strip()
    except OSError:
        return  # no Yama
    if scope != _RESTRICTED or not may_use_kernel():
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0) != 0:
        _log.info("peers cannot reach private memory through the kernel: %s", os.strerror(ctypes.get_errno()))
