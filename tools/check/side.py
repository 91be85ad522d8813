"""One of the two processes: does what it is told on its device."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    Placement,
    TransferConfig,
)
from llm_datadist.device_copies import copy_from_cache, copy_to_cache
from llm_datadist.device_diagnosis import DeviceState, Software, describe_device, describe_software, why_no_device
from llm_datadist.introspection import describe_links
from llm_datadist.layer_events import LayerEvents
from llm_datadist.tools.check.shapes import (
    BLOCK_BYTES,
    BLOCKS,
    LAYERS,
    TENSORS,
    Bytes,
    WrongBytes,
    block_lists,
    blocks_desc,
    compare,
    pattern,
    pool_bytes,
    whole_desc,
)

HOST = "127.0.0.1"
PROMPT, DECODER = 1, 2  # cluster ids

_BEFORE = 0x5A  # in every byte of a target, before something is to come there
_RUNS = 3  # of which the fastest counts
_SMALL_RUNS = 50
_MOST_NOTES = 20


class Done(NamedTuple):
    """An order was carried out."""

    answer: Any


class Failed(NamedTuple):
    """It was not; says why."""

    reason: str


def serve(connection: Connection, timeout_ms: int) -> None:
    """Body of a process: carry out orders ``(name, *arguments)``, methods of a `Side`, until None comes."""
    side = Side(timeout_ms)
    with contextlib.suppress(EOFError, BrokenPipeError), contextlib.closing(side):
        while (order := connection.recv()) is not None:
            connection.send(_carry_out(getattr(side, order[0]), order[1:]))


def _carry_out(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Done | Failed:
    try:
        return Done(call(*arguments))
    except (LLMException, WrongBytes) as error:
        return Failed(str(error))
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


class Side:
    """A device, and from `open` on an instance on it.

    Parameters
    ----------
    timeout_ms : int
        How long a call of the library may take: less than the order, so that the library says what is wrong.
    """

    def __init__(self, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self._datadist: LLMDataDist | None = None
        self._notes = _Notes()

    def close(self) -> None:
        if self._datadist is not None:
            datadist, self._datadist = self._datadist, None
            datadist.finalize()

    def notes(self) -> list[str]:
        """Give what the library has said on the way: what it met while it did something for the other process."""
        return self._notes.lines[-_MOST_NOTES:]

    # ---- the device

    def why_no_device(self) -> str:
        return why_no_device()

    def software(self) -> Software:
        return describe_software()

    def device(self, device_id: int) -> DeviceState:
        return describe_device(device_id)

    def open(self, kind: str, device_id: int, role: str, port: int, nbytes: int) -> int:
        """Make an instance and allocate its caches; gives the id of the large one that others pull."""
        config = LLMConfig()
        config.device_id = device_id
        config.sync_kv_timeout = self._timeout_ms
        config.mem_utilization = 1.0
        config.ge_options = {"ge.flowGraphMemMaxSize": str(pool_bytes(nbytes))}
        if role == "PROMPT":
            config.listen_ip_info = f"{HOST}:{port}"
        cluster_id = PROMPT if role == "PROMPT" else DECODER
        self._datadist = LLMDataDist(LLMRole[role], cluster_id)
        self._datadist.init({**config.generate_options(), "llm.DeviceBackend": kind})
        self._notes.listen()
        manager = self._manager = self._datadist.kv_cache_manager
        self._whole = manager.allocate_cache(whole_desc(nbytes))
        self._other = manager.allocate_cache(whole_desc(nbytes))
        key = BlocksCacheKey(PROMPT) if role == "PROMPT" else None
        self._paged = manager.allocate_blocks_cache(blocks_desc(), key)
        return self._whole.cache_id

    # ---- copies of one process

    def copy_in(self, seed: int) -> float:
        """Fill the large cache from the host, and compare; gives the seconds."""
        tensors = [pattern(seed, tensor, self._whole.cache_desc.size) for tensor in range(TENSORS)]
        return _fastest(
            lambda: self._clear(self._whole),
            lambda: _copy_all(copy_to_cache, self._whole, tensors),
            lambda: self._compare("after copies to the device and back", self._whole, seed),
        )

    def copy_out(self, seed: int) -> float:
        """Copy the large cache to the host, and compare; gives the seconds."""
        wanted = [pattern(seed, tensor, self._whole.cache_desc.size) for tensor in range(TENSORS)]
        tensors = [np.empty(each.size, np.uint8) for each in wanted]
        return _fastest(
            lambda: _fill_all(tensors),
            lambda: _copy_all(copy_from_cache, self._whole, tensors),
            lambda: _compare_all("in host memory", tensors, wanted),
        )

    def copy_inside(self, seed: int) -> float:
        """Copy the large cache into the other one, and compare; gives the seconds."""
        return _fastest(
            lambda: self._clear(self._other),
            lambda: self._manager.copy_cache(self._other, self._whole),
            lambda: self._compare("after a copy on the device", self._other, seed),
        )

    def swap(self, seed: int) -> float:
        """Swap blocks out and in again elsewhere, and compare; gives the seconds of both together."""
        memory = [np.empty((BLOCKS, BLOCK_BYTES), np.uint8) for _ in range(TENSORS)]
        desc = CacheDesc(TENSORS, (BLOCKS, BLOCK_BYTES), DataType.DT_UINT8, Placement.HOST)
        on_host = KvCache.create_cpu_cache(desc, [each.ctypes.data for each in memory])
        sources, targets = block_lists()
        back = targets[::-1]

        def fill() -> None:
            self._fill(self._paged, seed)
            _fill_all(memory)

        seconds = _fastest(
            fill,
            lambda: self._manager.swap_blocks(self._paged, on_host, dict(zip(sources, targets))),
            lambda: _compare_all(
                "after a swap out",
                [got[targets] for got in memory],
                [self._blocks(seed, tensor)[sources] for tensor in range(TENSORS)],
            ),
        )
        return seconds + _fastest(
            lambda: self._clear(self._paged),
            lambda: self._manager.swap_blocks(on_host, self._paged, dict(zip(targets, back))),
            lambda: _compare_all(
                "after a swap in",
                [self._read_blocks(tensor)[back] for tensor in range(TENSORS)],
                [wanted[targets] for wanted in memory],
            ),
        )

    # ---- of two: as the prompt

    def fill(self, seed: int) -> None:
        """Fill both caches that the decoder pulls."""
        self._fill(self._whole, seed)
        self._fill(self._paged, seed)

    def push(self, seed: int, addresses: list[int]) -> float:
        """Push the large cache layer by layer, and give the seconds from the first layer to the answer."""
        self._fill(self._whole, seed)
        layers = LayerEvents(LAYERS, timeout_in_millis=self._timeout_ms)
        started = time.perf_counter()
        task = self._manager.transfer_cache_async(self._whole, layers, [TransferConfig(DECODER, addresses)])
        for layer in range(LAYERS):
            layers.record(layer)
        status = task.synchronize(self._timeout_ms)
        _require(status, "transfer_cache_async")
        return time.perf_counter() - started

    # ---- of two: as the decoder

    def link(self, port: int) -> str:
        """Link to the prompt; gives the transport."""
        assert self._datadist is not None
        _require(self._datadist.link_clusters([_prompt(port)], self._timeout_ms)[0], "link_clusters")
        return describe_links(self._datadist)[0].transport

    def pull(self, seed: int, cache_id: int) -> float:
        """Pull the large cache, and compare; gives the seconds."""
        key = CacheKeyByIdAndIndex(PROMPT, cache_id, 0)
        return _fastest(
            lambda: self._clear(self._whole),
            lambda: self._manager.pull_cache(key, self._whole),
            lambda: self._compare("after pull_cache", self._whole, seed),
        )

    def pull_blocks(self, seed: int) -> float:
        """Pull blocks in random order into others, and compare; gives the seconds.

        Each time other blocks: what is left of the last run in a buffer on the way would be wrong.
        """
        sources, targets = block_lists()

        def begin() -> None:
            sources.append(sources.pop(0))
            self._clear(self._paged)

        return _fastest(
            begin,
            lambda: self._manager.pull_blocks(BlocksCacheKey(PROMPT), self._paged, sources, targets),
            lambda: self._compare_blocks("after pull_blocks", seed, sources, targets),
        )

    def pull_one_block(self, seed: int) -> list[float]:
        """Pull one block, each time another one, and compare; gives the seconds of each pull, in ascending order."""
        sources = list(range(BLOCKS))
        return _times(
            _SMALL_RUNS,
            lambda: sources.insert(0, sources.pop()),
            lambda: self._manager.pull_blocks(BlocksCacheKey(PROMPT), self._paged, sources[:1], [0]),
            lambda: self._compare_first_block(seed, sources[0]),
        )

    def expect_push(self) -> list[int]:
        """Make ready for a push; gives the addresses."""
        self._clear(self._whole)
        return list(self._whole.per_device_tensor_addrs[0])

    def compare_pushed(self, seed: int) -> None:
        self._compare("after a push layer by layer", self._whole, seed)

    def unlink(self, port: int) -> None:
        assert self._datadist is not None
        _require(self._datadist.unlink_clusters([_prompt(port)], self._timeout_ms)[0], "unlink_clusters")

    # ---- bytes

    def _fill(self, cache: KvCache, seed: int) -> None:
        nbytes = cache.cache_desc.size
        _copy_all(copy_to_cache, cache, [pattern(seed, tensor, nbytes) for tensor in range(TENSORS)])

    def _clear(self, cache: KvCache) -> None:
        _copy_all(copy_to_cache, cache, [np.full(cache.cache_desc.size, _BEFORE, np.uint8)] * TENSORS)

    def _read(self, cache: KvCache, tensor: int) -> Bytes:
        data = np.zeros(cache.cache_desc.size, np.uint8)
        copy_from_cache(cache, tensor, data)
        return data

    def _compare(self, where: str, cache: KvCache, seed: int) -> None:
        for tensor in range(TENSORS):
            compare(where, tensor, self._read(cache, tensor), pattern(seed, tensor, cache.cache_desc.size))

    def _read_blocks(self, tensor: int) -> Bytes:
        return self._read(self._paged, tensor).reshape(BLOCKS, BLOCK_BYTES)

    def _compare_blocks(self, where: str, seed: int, sources: list[int], targets: list[int]) -> None:
        """Check that blocks came from where they should have, and that all others are as they were."""
        others = sorted(set(range(BLOCKS)) - set(targets))
        for tensor in range(TENSORS):
            got = self._read_blocks(tensor)
            compare(where, tensor, got[targets], self._blocks(seed, tensor)[sources])
            compare(f"{where}, in other blocks", tensor, got[others], np.full_like(got[others], _BEFORE))

    def _compare_first_block(self, seed: int, source: int) -> None:
        got = np.empty(BLOCK_BYTES, np.uint8)
        for tensor in range(TENSORS):
            copy_from_cache(self._paged, tensor, got)
            compare("after a pull of one block", tensor, got, self._blocks(seed, tensor)[source])

    def _blocks(self, seed: int, tensor: int) -> Bytes:
        return pattern(seed, tensor, BLOCKS * BLOCK_BYTES).reshape(BLOCKS, BLOCK_BYTES)


class _Notes(logging.Handler):
    """Keeps warnings of the library; with a level in the environment its messages go to the standard error too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        handlers: list[logging.Handler] = [self]
        if os.environ.get("ASCEND_GLOBAL_LOG_LEVEL"):
            handlers.append(logging.StreamHandler(sys.stderr))
        logging.basicConfig(format="%(name)s: %(message)s", handlers=handlers)

    def listen(self) -> None:
        """Hear warnings: an instance lets errors through alone, unless the environment wants more."""
        logger = logging.getLogger("llm_datadist")
        logger.setLevel(min(logger.level, logging.WARNING))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def _copy_all(copy: Callable[[KvCache, int, Bytes], None], cache: KvCache, tensors: list[Bytes]) -> None:
    for tensor, data in enumerate(tensors):
        copy(cache, tensor, data)


def _fill_all(tensors: list[Bytes]) -> None:
    for data in tensors:
        data.fill(_BEFORE)


def _compare_all(where: str, tensors: list[Bytes], wanted: list[Bytes]) -> None:
    for tensor, (data, should_be) in enumerate(zip(tensors, wanted)):
        compare(where, tensor, data, should_be)


def _fastest(before: Callable[[], object], call: Callable[[], object], after: Callable[[], object]) -> float:
    return _times(_RUNS, before, call, after)[0]


def _times(
    runs: int, before: Callable[[], object], call: Callable[[], object], after: Callable[[], object]
) -> list[float]:
    """Make a call so often, between what makes it ready and what compares; gives its seconds, in ascending order."""
    taken = []
    for _ in range(runs):
        before()
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
        after()
    return sorted(taken)


def _prompt(port: int) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT
    cluster.append_local_ip_info(HOST, 0)
    cluster.append_remote_ip_info(HOST, port)
    return cluster


def _require(status: LLMStatusCode, call: str) -> None:
    if status is not LLMStatusCode.LLM_SUCCESS:
        raise LLMException(f"{call} failed, error code is {status}", status_code=status)
