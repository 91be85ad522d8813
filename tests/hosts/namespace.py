"""Network namespaces without a name: the kernel takes one away, with all its interfaces, when nobody holds it any more.

So nothing stays behind, however the process ends that made them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CLONE_NEWNET = 0x40000000  # unshare(2)
COMMAND_TIMEOUT_S = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace, held by a descriptor of this process; OSError where this process may not make one."""

    def __init__(self) -> None:
        with ThreadPoolExecutor(1) as thread:  # a namespace is a matter of a thread, and this one ends at once
            self._descriptor = thread.submit(_leave_for_a_new_one).result()

    @property
    def path(self) -> str:
        """Where processes of this user find the namespace, as long as it is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def run(self, *command: str, text: str = "") -> str:
        """Run a command inside, with a text to read; gives what it prints."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{text}"
        return done.stdout

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in a thread that is inside: the sockets it makes belong there."""
        with ThreadPoolExecutor(1, initializer=enter, initargs=(self.path,)) as thread:
            return thread.submit(function, *args).result()

    def close(self) -> None:
        """Let go of the namespace; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def enter(path: str) -> None:
    """Take the calling thread into a namespace."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(_libc.setns(descriptor, CLONE_NEWNET), f"setns to {path}")
    finally:
        os.close(descriptor)


def check(result: int, call: str) -> None:
    """Raise the OSError of a call to the C library that has failed."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")


def unshare(kind: int) -> None:
    """Give the calling thread a fresh namespace of a kind."""
    check(_libc.unshare(kind), f"unshare({kind:#x})")


def _leave_for_a_new_one() -> int:
    unshare(CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
