"""A prompt and a decoder in processes of their own, each with a device of the Ascend simulator.

For functions that `tests.on_simulator.pair_on_simulator` runs: the prompt says its port, the decoder asks it for things
over the connection between them, and at the end nothing may live on the simulator.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, KvCache, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests.datadist_member import MIB, cluster_info, make_options, payload
from tests.on_simulator import counter

PROMPT, DECODER = 1, 2  # cluster ids
OK = LLMStatusCode.LLM_SUCCESS
LINKED = (OK, [OK])
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
LITTLE_S = 1.0  # beyond a deadline, on a busy machine
NO_REQUEST = (1 << 64) - 1
SHAPE, TENSORS = (4, MIB), 4  # of the caches that most tests move: a slot is an item of its own
FAULT = "LLM_DATADIST_TEST_FAULT"  # environment: what a test wants to fail

Outcome = tuple[LLMStatusCode, str, float]


def start(role: LLMRole, cluster_id: int, port: int | None = None, timeout_s: float = 1.0) -> LLMDataDist:
    """Initialise an instance: a prompt on device 0, a decoder on device 1."""
    made = make_options(role, port=port, pool_bytes=96 * MIB, sync_kv_timeout=int(timeout_s * 1000))
    datadist = LLMDataDist(role, cluster_id)
    datadist.init({**made, "ge.exec.deviceId": "0" if role is LLMRole.PROMPT else "1"})
    return datadist


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Give a port that nobody else gets, and that the instance can listen on."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def allocate(datadist: LLMDataDist, *keys: CacheKey) -> KvCache:
    desc = CacheDesc(TENSORS, SHAPE, DataType.DT_UINT8)
    return datadist.kv_cache_manager.allocate_cache(desc, list(keys))


def prefix(number: int) -> CacheKey:
    """Key of a slot of the prompt that pulls do not release."""
    return CacheKey(PROMPT, NO_REQUEST, prefix_id=number)


def fill(datadist: LLMDataDist, cache: KvCache, seed: int) -> None:
    pool = datadist._engine._caches.device
    for tensor, address in enumerate(cache.per_device_tensor_addrs[0]):
        pool.write(address, payload(seed, tensor, int(np.prod(cache.cache_desc.shape))).tobytes())


def bytes_of(datadist: LLMDataDist, cache: KvCache, tensor: int) -> np.ndarray:
    return datadist.kv_cache_manager.get_cache_tensors(cache, tensor)[0].numpy()


def holds(datadist: LLMDataDist, cache: KvCache, seed: int, slots: dict[int, int], tensors: int | None = None) -> bool:
    """Whether slots or blocks (of the cache: of the payload) have their bytes, in each tensor."""
    shape = tuple(cache.cache_desc.shape)
    for tensor in range(cache.cache_desc.num_tensors if tensors is None else tensors):
        wanted = payload(seed, tensor, int(np.prod(shape))).reshape(shape)
        found = bytes_of(datadist, cache, tensor)
        if (found[list(slots)] != wanted[list(slots.values())]).any():
            return False
    return True


def code_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Code and text that a call ends with, and how long it took."""
    began = time.monotonic()
    try:
        call(*args, **kwargs)
    except LLMException as error:
        return error.status_code, str(error), time.monotonic() - began
    return OK, "", time.monotonic() - began


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def assert_nothing_lives() -> None:
    live = ("allocations", "imports", "exports", "host", "streams", "events", "communicators", "registrations")
    left = {name: count for name in live if (count := counter(f"live.{name}"))}
    assert not left, left


class Decoder:
    """The decoder's process: an instance with a cache, and the connection to a prompt that offers `prefix` keys.

    The payload of the prompt's cache has the seed 7.
    """

    def __init__(self, peer: Connection, datadist: LLMDataDist) -> None:
        self.peer = peer
        self.port, self.prompt_pid = peer.recv()
        self.datadist = datadist
        self.manager = datadist.kv_cache_manager
        self.cache = allocate(datadist)

    def link(self, timeout: int = 5000) -> Any:
        return self.datadist.link_clusters([cluster_info(PROMPT, self.port)], timeout)

    def unlink(self) -> Any:
        return self.datadist.unlink_clusters([cluster_info(PROMPT, self.port)], 5000)

    def pull(self, number: int = 0, slot: int = 0) -> Outcome:
        return code_of(self.manager.pull_cache, prefix(number), self.cache, slot)

    def works(self, seconds: float = 20.0) -> bool:
        """Pull until it works: a communicator that was lost is made anew, which may take longer than one pull."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            if self.pull(2, 1)[0] is OK:
                return holds(self.datadist, self.cache, 7, {1: 2})
        return False

    def ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Let the prompt do something; it names what it can do."""
        self.peer.send((what, arguments, named))
        return self.peer.recv()

    def end(self, *, prompt_lives: bool = True) -> None:
        if prompt_lives:
            self.peer.send(None)
        self.datadist.finalize()
        assert_nothing_lives()


def offer(peer: Connection, start_prompt: Callable[[int], LLMDataDist], offering: Callable[[LLMDataDist], Any]) -> None:
    """Be the prompt: do what the decoder asks of `offering`, until it says the end.

    Parameters
    ----------
    start_prompt : callable
        Makes the instance, given its port.
    offering : callable
        Makes the object whose methods the decoder calls by their names.
    """
    with held_port() as port:
        datadist = start_prompt(port)
        offered = offering(datadist)
        peer.send((port, os.getpid()))
        while (asked := peer.recv()) is not None:
            what, arguments, named = asked
            peer.send(getattr(offered, what)(*arguments, **named))
        datadist.finalize()
    assert_nothing_lives()
