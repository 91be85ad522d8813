"""A registry as people run it: the command, in a process of its own, that can be killed and started again."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

COMMAND = [sys.executable, "-m", "llm_datadist.tools.cli", "registry"]
START_S = 20.0
END_S = 10.0
LOCK_LEASE_S = 2.0  # so that no test waits long for the grace after a start


class RegistryProcess:
    """A registry on this host. Its port stays the same when it is started again."""

    def __init__(self, *options: str) -> None:
        self._options = ["--lock-lease", str(LOCK_LEASE_S), "--least-lease", "0.1", *options]
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.printed = ""

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert self._process is None
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen([*COMMAND, "--port", str(self.port), *self._options], **pipes)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        assert ready, "the registry says nothing"
        self.printed = self._process.stdout.readline()
        found = re.search(r"listens at tcp://\S+:(\d+)$", self.printed)
        assert found, f"the registry printed {self.printed!r}, exit status {self._process.poll()}"
        self.port = int(found[1])

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it by SIGTERM; gives the exit status."""
        return self._end(signal.SIGTERM)

    def end_with(self, number: signal.Signals) -> int:
        """End it by a signal; gives the exit status."""
        return self._end(number)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(number)
        try:
            return process.wait(END_S)
        finally:
            process.kill()
            process.wait(END_S)
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        if self._process is not None:
            self.kill()

    def resident_kib(self) -> int:
        with open(f"/proc/{self.pid}/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def wait_until(condition: Any, seconds: float = 10.0, what: str = "") -> Any:
    """Wait until a function gives something true; gives that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what or condition}"
        time.sleep(0.01)
    return found
