"""What the worker processes of the demo have in common: how they fail, wait, and get their engine."""

from __future__ import annotations

import contextlib
import socket
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Callable

from llm_datadist import LLMConfig, LLMDataDist, LLMRole
from llm_datadist.tools.demo.messages import Failed
from llm_datadist.tools.demo.prompt_tokens import InputError

HOST = "127.0.0.1"
_WAIT_S = 600.0  # the parent notices dead and silent workers earlier; this ends a worker that it has forgotten


def run_worker(connection: Connection, body: Callable[..., None], *args: object) -> None:
    """Run ``body(connection, *args)``; tell the parent what went wrong if it raises."""
    try:
        body(connection, *args)
    except InputError as error:
        connection.send(Failed(str(error), bad_input=True))
    except Exception:
        connection.send(Failed(traceback.format_exc(), bad_input=False))


def receive(connection: Connection) -> Any:
    """Wait for the next message of the parent.

    Raises
    ------
    TimeoutError
        None came within ten minutes.
    """
    if not connection.poll(_WAIT_S):
        raise TimeoutError(f"no message from the parent process within {_WAIT_S:.0f} s")
    return connection.recv()


@contextlib.contextmanager
def open_datadist(
    role: LLMRole, cluster_id: int, pool_bytes: int, listen_ip_info: str = "", device_id: int = 0
) -> Iterator[LLMDataDist]:
    """Give an initialised LLMDataDist with a pool of `pool_bytes`; a PROMPT needs to know where to listen."""
    config = LLMConfig()
    config.device_id = device_id
    config.mem_utilization = 1.0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(pool_bytes)}
    if listen_ip_info:
        config.listen_ip_info = listen_ip_info
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    try:
        yield datadist
    finally:
        datadist.finalize()


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
