"""Processes for tests that start in a few milliseconds: forked from a server that has imported what tests need.

Most tests start processes, and an interpreter that imports pytest and NumPy takes longer than most tests. The server is
a fresh interpreter without threads, one for each process that runs tests. What it forks is handed on to that process,
which is then its parent: it waits for it, stops it, and takes it along when it dies, as if it had started it.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from llm_datadist.cluster.death_signal import die_with_parent
from llm_datadist.cluster.local import LocalGroup, LocalWorker
from tests.instrumented import VARIABLE

PRELOADED = ("numpy", "pytest", "llm_datadist", "llm_datadist.engine.engine", "tests.processes", "tests.peer_engine")
START_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_MAP_NORESERVE = 0x4000  # mmap(2)
_MOST = 1 << 16  # bytes of one message
_libc = ctypes.CDLL(None, use_errno=True)


def process_group() -> LocalGroup:
    """Give a group whose workers start quickly; lines are counted only in processes that `multiprocessing` starts."""
    return LocalGroup() if os.environ.get(VARIABLE) == "coverage" else WarmGroup()


class WarmGroup(LocalGroup):
    """A `LocalGroup` whose workers are forked from the server: they are no fresh interpreters."""

    def start(self, name: str, target: Callable[..., None], *args: object) -> LocalWorker:
        assert self._entered
        assert name not in self._workers
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            pid = process_server().fork(theirs, (name, target, args))
        worker = LocalWorker(name, _Forked(pid), ours)
        self._workers[name] = worker
        return worker


class _Forked:
    """A child of this process, with what `LocalWorker` needs of a process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._exitcode: int | None = None

    @property
    def exitcode(self) -> int | None:
        if self._exitcode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._exitcode = os.waitstatus_to_exitcode(status)
        return self._exitcode

    def join(self, timeout: float) -> None:
        wait([self._descriptor], timeout)

    def close(self) -> None:
        os.close(self._descriptor)


class _Server:
    """The server, as the process sees it that runs tests."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.warm_group", str(theirs.fileno()), str(os.getpid())]
            folder = Path(__file__).parents[1]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=folder, stdin=subprocess.DEVNULL)
        self._one_at_a_time = threading.Lock()
        self._socket.settimeout(START_S)
        assert self._socket.recv(1) == b"r", "the server does not start"
        atexit.register(self.close)

    def fork(self, theirs: Connection, what: tuple[str, Callable[..., None], tuple[object, ...]]) -> int:
        """Have a child of this process call ``target(theirs, *args)``."""
        # What is imported depends on the rest, so it is unpacked last.
        request = pickle.dumps((os.getpid(), os.getcwd(), dict(os.environ), sys.path, pickle.dumps(what)))
        descriptors = array.array("i", [theirs.fileno(), 1, 2])
        head, rights = len(request).to_bytes(8, "little"), [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        with self._one_at_a_time, _taking_orphans():
            self._socket.sendmsg([head], rights)
            for begin in range(0, len(request), _MOST):
                self._socket.send(request[begin : begin + _MOST])
            pid = int.from_bytes(self._socket.recv(8), "little")
        assert pid, "the server has ended"
        return pid

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@contextlib.contextmanager
def _taking_orphans() -> Iterator[None]:
    """Have what is orphaned below this process become its child, and not that of the first process of the system."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@functools.lru_cache(None)
def process_server() -> _Server:
    """Give the server of this process, and start it if it does not run yet."""
    return _Server()


# ---- in the server


def _serve(requests: socket.socket) -> None:
    """Fork until nobody asks any more; in a child, become what was asked for."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    requests.send(b"r")
    while True:
        head, rights, _, _ = requests.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        if not head:
            return
        descriptors = array.array("i", rights[0][2])
        request, left = b"", int.from_bytes(head, "little")
        while len(request) < left:
            request += requests.recv(_MOST)
        pid = _fork_twice()
        if pid == 0:
            requests.close()
            _be_child(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(pid.to_bytes(8, "little"))


def _fork_twice() -> int:
    """Fork a process whose parent is gone when this returns; gives its id, and 0 in that process."""
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(writing, child.to_bytes(8, "little"))
            os._exit(0)
    os.close(writing)
    if between == 0:
        os.close(reading)
        return 0
    os.waitpid(between, 0)
    pid = int.from_bytes(os.read(reading, 8), "little")
    os.close(reading)
    return pid


def _be_child(request: bytes, theirs: int, output: int, errors: int) -> NoReturn:
    """Become what the request says, and end as a program does."""
    for source, target in ((output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    parent, folder, environment, sys.path[:], what = pickle.loads(request)
    os.chdir(folder)
    for variable in os.environ.keys() - environment.keys():
        del os.environ[variable]
    os.environ.update(environment)
    _wait_for(parent)
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Two children of one server would map memory at the same addresses, and hide who mistakes one for the other.
    globals()["_shift"] = mmap.mmap(-1, random.randrange(1, 1 << 15) << 21, mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=0)
    name, body, arguments = pickle.loads(what)
    multiprocessing.current_process().name = name
    with Connection(theirs) as to_parent:
        body(to_parent, *arguments)
    sys.exit(0)


def _wait_for(parent: int) -> None:
    give_up = time.monotonic() + START_S
    while os.getppid() != parent and time.monotonic() < give_up:
        time.sleep(0.0001)


def _main() -> None:
    descriptor, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who runs the tests decides
    with socket.socket(fileno=descriptor) as requests:
        _serve(requests)


if __name__ == "__main__":
    _main()
