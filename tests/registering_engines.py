"""Engines in cache-manager mode whose caches are tensors of the program, in processes of their own.

Functions for `Member.call`, each with the member's state first. Tensors are NumPy arrays; `payload` gives their bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_datadist.engine.engine import Engine
from llm_datadist.engine.keys import KeyName
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode
from tests.datadist_member import payload
from tests.many_engines import HOST, address_of

State = dict[str, Any]


def open_engine(state: State, cluster_id: int, port: int | None = None, timeout_ms: int = 5000, **options: Any) -> None:
    """Open an engine; with a port it listens."""
    state["engine"] = Engine(
        EngineOptions(
            LLMRole.DECODER if port is None else LLMRole.PROMPT,
            cluster_id,
            listen=() if port is None else ((HOST, port),),
            sync_kv_timeout_ms=timeout_ms,
            cache_manager=CacheManagerOptions(**options),
        )
    )
    state["tensors"] = {}


def close_engine(state: State) -> None:
    state["engine"].close()


def link(state: State, cluster_id: int, port: int) -> Any:
    return state["engine"].link([address_of(cluster_id, port)], 5000)


def register(
    state: State,
    tensors: int,
    shape: tuple[int, ...],
    seed: int = 0,
    keys: Sequence[KeyName | None] = (),
    blocks_model: int | None = None,
    in_pool: bool = False,
    accessible: bool = True,
) -> int:
    """Register fresh tensors, filled with the payload of a seed (0: with zeros); gives the id."""
    engine: Engine = state["engine"]
    nbytes = int(np.prod(shape))
    if in_pool:
        views = [engine.memory(engine.reserve_memory(nbytes), nbytes) for _ in range(tensors)]
        arrays = [np.frombuffer(view, np.uint8) for view in views]
    else:
        arrays = [np.zeros(nbytes, np.uint8) for _ in range(tensors)]
    for index, array in enumerate(arrays):
        array[:] = payload(seed, index, nbytes) if seed else 0
    cache_id = engine.register(
        tensors, nbytes, shape[0], [array.ctypes.data for array in arrays], keys, blocks_model, accessible
    )
    state["tensors"][cache_id] = arrays
    return cache_id


def unregister(state: State, cache_id: int) -> None:
    state["engine"].unregister(cache_id)
    del state["tensors"][cache_id]


def read(state: State, cache_id: int, tensor: int) -> bytes:
    return bytes(state["tensors"][cache_id][tensor].tobytes())


def addresses(state: State, cache_id: int) -> list[int]:
    return [array.ctypes.data for array in state["tensors"][cache_id]]


def do(state: State, call: str, *args: Any) -> Any:
    """Call a method of the engine; an exception of the library comes back as its code."""
    try:
        return getattr(state["engine"], call)(*args)
    except LLMException as error:
        return error.status_code


def outcome(state: State, call: str, *args: Any) -> LLMStatusCode:
    result = do(state, call, *args)
    return LLMStatusCode.LLM_SUCCESS if result is None else result


def map_pages(state: State, pages: int) -> int:
    """Map fresh pages and give their address."""
    state["pages"] = mmap.mmap(-1, pages * mmap.PAGESIZE)
    view = np.frombuffer(state["pages"], np.uint8)
    return int(view.ctypes.data)


def unmap_pages(state: State) -> None:
    state.pop("pages").close()
