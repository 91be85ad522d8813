"""The check for leaks sees what it is there to see."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from llm_datadist._segment import Segment
from tests.leaks import resources


@contextmanager
def child_process() -> Iterator[None]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE):
        yield


@contextmanager
def thread() -> Iterator[None]:
    done = threading.Event()
    running = threading.Thread(target=done.wait, args=(10,), name="forgotten")
    running.start()
    try:
        yield
    finally:
        done.set()
        running.join()


@contextmanager
def open_socket() -> Iterator[None]:
    with socket.socket():
        yield


@contextmanager
def open_memfd() -> Iterator[None]:
    descriptor = os.memfd_create("forgotten")
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def mapping_without_descriptor() -> Iterator[None]:
    segment = Segment.create("forgotten", 4096, peers_may_write=False)
    view = memoryview(segment)
    segment.close()
    try:
        yield
    finally:
        view.release()


@pytest.mark.parametrize(
    ("hold", "named"),
    [
        (child_process, "process "),
        (thread, "thread forgotten"),
        (open_socket, "socket:["),
        (open_memfd, "/memfd:forgotten"),
        (mapping_without_descriptor, "mapping "),
    ],
)
def test_is_seen_while_it_is_there(hold: Callable, named: str) -> None:
    before = resources()
    with hold():
        assert any(named in left for left in resources() - before)
    assert resources() <= before
