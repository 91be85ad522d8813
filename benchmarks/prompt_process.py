"""The prompt of the benchmarks: offers caches to pull, and can hold its interpreter lock."""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, KvCache, KvCacheManager, LLMDataDist, LLMRole
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

from .instances import WAIT_S, answer, free_port, link, new_datadist

PROMPT, DECODER = 1, 2
ANY_REQUEST = 2**64 - 1
PREFIX = 1  # a prefix key stays when it was pulled
END = None

HELD_IN_C = "C call"
HELD_IN_PYTHON = "Python loop"
_TURNS = 10_000  # of the loop between two looks at the connection


def bytes_desc(num_tensors: int, slots: int, slot_bytes: int) -> CacheDesc:
    return CacheDesc(num_tensors, (slots, slot_bytes), DataType.DT_UINT8)


IDLE = bytes_desc(1, 1, 512)


@contextmanager
def linked_pair(
    offers: dict[int, CacheDesc], copies: int = 1, idle_caches: int = 0
) -> Iterator[tuple[LLMDataDist, Connection]]:
    """Run a prompt that offers caches, and a decoder in this process that is linked to it.

    Parameters
    ----------
    offers : dict of int to CacheDesc
        Caches by the model that their keys have. Those with one slot are pulled as caches, others as blocks.
    copies : int
        How many of each the decoder has room for.
    idle_caches : int
        Further small caches of the prompt, each with an ordinary key; the requests count from 0.
    """
    port = free_port()
    with LocalGroup() as group:
        worker = group.start("prompt", serve, port, offers, idle_caches)
        answer(worker.connection)
        datadist = new_datadist(LLMRole.DECODER, DECODER, copies * pool_for(offers))
        try:
            link(datadist, PROMPT, port)
            yield datadist, worker.connection
            worker.connection.send(END)
            worker.wait(WAIT_S)
        finally:
            datadist.finalize()


def pool_for(offers: dict[int, CacheDesc]) -> int:
    """Bytes of a pool that holds one of each cache."""
    total = 1 << 20
    for desc in offers.values():
        nbytes = 1
        for dimension in desc.shape:
            nbytes *= dimension
        total += desc.num_tensors * (nbytes + 512)
    return total


def serve(connection: Connection, port: int, offers: dict[int, CacheDesc], idle_caches: int) -> None:
    """Offer the caches, then hold the interpreter lock in the way that the other end names, until it says something."""
    pool_bytes = pool_for(offers) + idle_caches * IDLE.shape[1]
    datadist = new_datadist(LLMRole.PROMPT, PROMPT, pool_bytes, port)
    manager = datadist.kv_cache_manager
    held = [manager.allocate_cache(IDLE, [CacheKey(PROMPT, request)]) for request in range(idle_caches)]
    held += [_offer(manager, model, desc) for model, desc in offers.items()]
    connection.send("ready")
    while True:
        order = connection.recv()
        if order is END:
            break
        connection.send("holding")
        _hold(order, connection.fileno())
        connection.recv()
        connection.send("free")
    del held
    datadist.finalize()


def _offer(manager: KvCacheManager, model: int, desc: CacheDesc) -> KvCache:
    if desc.shape[0] == 1:
        cache = manager.allocate_cache(desc, [cache_key(model)])
    else:
        cache = manager.allocate_blocks_cache(desc, BlocksCacheKey(PROMPT, model))
    for tensor in range(desc.num_tensors):
        tensor_view(cache, tensor)[...] = tensor % 120 + 1
    return cache


def cache_key(model: int) -> CacheKey:
    return CacheKey(PROMPT, ANY_REQUEST, model, PREFIX)


@contextmanager
def holding(connection: Connection, way: str) -> Iterator[None]:
    """Let the prompt hold its interpreter lock inside of the ``with`` block."""
    connection.send(way)
    answer(connection)
    try:
        yield
        if connection.poll():
            raise RuntimeError("the prompt let its lock go before the measurement ended")
    finally:
        connection.send("enough")
        answer(connection)


def _hold(way: str, descriptor: int) -> None:
    """Hold the lock until there is something to read: in a C call that keeps it, or in a Python loop."""
    receive = ctypes.PyDLL(None).recv  # unlike CDLL, PyDLL calls with the lock held
    byte = ctypes.create_string_buffer(1)
    if way == HELD_IN_C:
        receive(descriptor, byte, 1, socket.MSG_PEEK)
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5.0)
    while receive(descriptor, byte, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT) < 0:
        for _ in range(_TURNS):
            pass
    sys.setswitchinterval(interval)
