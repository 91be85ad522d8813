"""The other process: holds the remote cache of each case."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from llm_datadist import LLMException
from llm_datadist.tools.bench.case import Case
from llm_datadist.tools.bench.endpoint import Endpoint, has_arrived

PEER, MEASURING = 1, 2  # cluster ids


@dataclass(frozen=True)
class Ready:
    """The process listens, or its cache is there; `cache_id` is 0 before the first case."""

    cache_id: int = 0


@dataclass(frozen=True)
class Arrived:
    """End of a case: whether the remote cache holds the message."""

    whole: bool


@dataclass(frozen=True)
class Failed:
    """The process gives up."""

    text: str


def serve(connection: Connection, memory: str, pool_bytes: int, tensors: int, port: int, pushed_to: bool) -> None:
    """Body of the process: offer a cache for each case that it is sent, until it is sent None."""
    try:
        endpoint = Endpoint(PEER, memory, pool_bytes, tensors, port)
        try:
            connection.send(Ready())
            while (case := connection.recv()) is not None:
                _offer(endpoint, case, connection, pushed_to)
        finally:
            endpoint.close()
    except (LLMException, MemoryError) as error:
        connection.send(Failed(str(error)))
    except EOFError:
        pass  # the other process has ended


def _offer(endpoint: Endpoint, case: Case, connection: Connection, pushed_to: bool) -> None:
    with endpoint.cache(case, filled=not pushed_to) as (cache, arrays):
        connection.send(Ready(cache.cache_id))
        connection.recv()
        connection.send(Arrived(has_arrived(arrays)))
        del arrays
