"""What the workers of this host say, as one stream, and what becomes of a worker that fails or dies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from llm_datadist.cluster.local import LocalWorker
from llm_datadist.tools.demo.errors import BadInputError, DemoError
from llm_datadist.tools.demo.messages import Failed

_SILENCE_S = 120.0  # without a message from any worker, the run has failed
_ENDING_S = 10.0  # for a worker to end after its last message


def local_messages(workers: Sequence[LocalWorker]) -> Iterator[tuple[LocalWorker, Any]]:
    """Yield what the workers say, until all of them have ended; a failure of one of them is raised.

    Raises
    ------
    DemoError
        A worker failed, died, or fell silent.
    """
    running = {worker.connection: worker for worker in workers}
    while running:
        ready = wait(list(running), timeout=_SILENCE_S)
        if not ready:
            names = " and ".join(worker.name for worker in running.values())
            raise DemoError(f"no message from {names} within {_SILENCE_S:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            worker = running[connection]
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                del running[connection]
                _require_success(worker)
                continue
            if isinstance(message, Failed):
                raise _failure(worker, message)
            yield worker, message


def _failure(worker: LocalWorker, failed: Failed) -> DemoError:
    if failed.bad_input:
        return BadInputError(failed.text)
    return DemoError(f"the {worker.name} process failed:\n{failed.text}")


def _require_success(worker: LocalWorker) -> None:
    if not worker.wait(_ENDING_S):
        raise DemoError(f"the {worker.name} process closed its connection but did not end within {_ENDING_S:.0f} s")
    if worker.exitcode != 0:
        raise DemoError(f"the {worker.name} process ended unexpectedly, exit status {worker.exitcode}")
