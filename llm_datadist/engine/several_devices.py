"""One process with several devices: an engine for each, driven together.

Every cache has a part on each device, under one id; every link joins device i here to device i there. A call succeeds
when it succeeded on all devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from llm_datadist.devices.base import SynchronizeLayer
from llm_datadist.engine.caches import PoolStatistics
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.failures import check_device_index, failure
from llm_datadist.engine.geometry import TensorRange
from llm_datadist.engine.keys import KeyName
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.link_calls import LinkResult, check_clusters, check_local_addresses
from llm_datadist.engine.link_table import LinkDescription
from llm_datadist.engine.options import EngineOptions
from llm_datadist.engine.transfer_job import LayerTransfer, TransferJob, TransferJobs
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist._local import BlockList

_Result = TypeVar("_Result")

_SUCCESS = LLMStatusCode.LLM_SUCCESS


class SeveralDevices:
    """The engine of a process that drives more than one device; the same calls as `Engine`.

    Parameters
    ----------
    options : EngineOptions
        With two devices or more, and for a PROMPT as many addresses. Each device has a pool of `pool_bytes`.

    Raises
    ------
    LLMException
        As `Engine`; nothing is left open.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.role = options.role
        self.is_open = True
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # one allocation at a time, so that all devices give the same id
        self._transfers = TransferJobs()
        self._engines: list[Engine] = []
        try:
            for index, device_id in enumerate(options.device_ids):
                listen = options.listen[index : index + 1]
                self._engines.append(Engine(dataclasses.replace(options, device_ids=(device_id,), listen=listen)))
        except BaseException:
            for engine in self._engines:
                engine.close()
            raise
        self._workers = ThreadPoolExecutor(len(self._engines), "llm_datadist-device")

    def close(self) -> None:
        """End everything on all devices; may be called twice."""
        if not self.is_open:
            return
        self.is_open = False
        for engine in self._engines:
            engine.close()
        if os.getpid() == self._pid:
            self._transfers.close(0.0)
            self._workers.shutdown()

    # ---- caches

    def allocate(
        self,
        num_tensors: int,
        tensor_nbytes: int,
        slots: int,
        keys: Sequence[KeyName | None] = (),
        blocks_model: int | None = None,
    ) -> tuple[int, list[range]]:
        """Allocate a cache on every device, all or nothing; see `Engine.allocate`."""
        with self._lock:
            cache_id = next(self._ids)
            addresses: list[range] = []
            try:
                for engine in self._engines:
                    _, parts = engine.allocate(num_tensors, tensor_nbytes, slots, keys, blocks_model, cache_id)
                    addresses += parts
            except BaseException:
                for engine in self._engines[: len(addresses)]:
                    engine.deallocate(cache_id)
                    for key in filter(None, keys):
                        engine.remove_key(key)
                raise
        return cache_id, addresses

    def deallocate(self, cache_id: int) -> None:
        """Give up the id of a cache on every device."""
        for engine in self._engines:
            engine.deallocate(cache_id)

    def deallocate_later(self, cache_id: int) -> None:
        """Give up an id from a destructor: never blocks, never raises."""
        for engine in self._engines:
            engine.deallocate_later(cache_id)

    def remove_key(self, key: KeyName) -> None:
        """Unbind a key on every device."""
        for engine in self._engines:
            engine.remove_key(key)

    def tensor_contents(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        """Give what one tensor holds, one view a device; see `Engine.tensor_contents`."""
        return [view for engine in self._engines for view in engine.tensor_contents(cache_id, tensor_index)]

    def tensor_memory(self, cache_id: int, tensor_index: int) -> list[memoryview]:
        """Give one tensor as writable bytes, one view a device."""
        return [view for engine in self._engines for view in engine.tensor_memory(cache_id, tensor_index)]

    def statistics(self) -> PoolStatistics:
        """Tell the level of all pools together; `largest_free` is what fits on every device."""
        levels = [engine.statistics() for engine in self._engines]
        return PoolStatistics(
            sum(level.capacity for level in levels),
            sum(level.used for level in levels),
            sum(level.free for level in levels),
            min(level.largest_free for level in levels),
            levels[0].caches,
            levels[0].keys,
        )

    # ---- transfers

    def pull_cache(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        batch_index: int,
        size: int,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
        src_offset: int,
        dst_offset: int,
        consume: bool,
    ) -> None:
        """Pull on every device at the same time; see `Engine.pull_cache`."""
        self._on_each(
            lambda _, engine: engine.pull_cache(
                cluster_id,
                key,
                cache_id,
                batch_index,
                size,
                src_tensors,
                dst_tensors,
                src_offset,
                dst_offset,
                consume,
            )
        )

    def pull_blocks(
        self,
        cluster_id: int,
        key: KeyName,
        cache_id: int,
        src_blocks: BlockList | None,
        dst_blocks: BlockList,
        src_tensors: TensorRange,
        dst_tensors: TensorRange,
        token: bytes | None = None,
    ) -> None:
        """Pull on every device at the same time; see `Engine.pull_blocks`."""
        self._on_each(
            lambda _, engine: engine.pull_blocks(
                cluster_id, key, cache_id, src_blocks, dst_blocks, src_tensors, dst_tensors, token
            )
        )

    def transfer(self, transfer: LayerTransfer, synchronize_layer: SynchronizeLayer, source: object) -> TransferJob:
        """Run a transfer whose every push fails: layer-wise transfers are for one device."""

        def push_layer(*_: object) -> None:
            reason = f"this process drives {len(self._engines)} devices, a transfer needs a process with one"
            raise failure("transfer_cache_async", LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)

        return self._transfers.start(transfer, synchronize_layer, push_layer, source)

    def reserve_memory(self, nbytes: int, host: bool = False) -> int:
        """Raise LLM_FEATURE_NOT_ENABLED: a process with several devices has several pools."""
        raise self._only_one("reserve_memory")

    def publish_blocks(self, cache_id: int, blocks: list[int], lease_s: float | None = None) -> bytes:
        """Raise LLM_FEATURE_NOT_ENABLED: blocks are sealed in processes with one device."""
        raise self._only_one("publish_blocks")

    def retire_blocks(self, token: bytes) -> None:
        """Raise as `publish_blocks`."""
        raise self._only_one("retire_blocks")

    def retire_expired(self, cache_id: int) -> list[int]:
        """Raise as `publish_blocks`."""
        raise self._only_one("retire_expired")

    def _only_one(self, call: str) -> LLMException:
        reason = f"this process drives {len(self._engines)} devices, the call needs a process with one"
        return failure(call, LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)

    def copy_cache(
        self, dst_cache_id: int, src_cache_id: int, dst_slot: int, src_slot: int, offset: int, size: int
    ) -> None:
        """Copy on every device; see `Engine.copy_cache`."""
        self._on_each(lambda _, engine: engine.copy_cache(dst_cache_id, src_cache_id, dst_slot, src_slot, offset, size))

    def copy_blocks(self, cache_id: int, src_blocks: list[int], dst_blocks: list[int]) -> None:
        """Copy on every device; see `Engine.copy_blocks`."""
        self._on_each(lambda _, engine: engine.copy_blocks(cache_id, src_blocks, dst_blocks))

    def swap_blocks(
        self,
        cache_id: int,
        host_addresses: list[list[int]],
        block_nbytes: int,
        src_blocks: list[int],
        dst_blocks: list[int],
        swap_in: bool,
    ) -> None:
        """Copy on every device, device i with the i-th list of addresses; see `Engine.swap_blocks`."""
        self._on_each(
            lambda index, engine: engine.swap_blocks(
                cache_id, [host_addresses[index]], block_nbytes, src_blocks, dst_blocks, swap_in
            )
        )

    def copy_range(
        self,
        call: str,
        cache_id: int,
        tensor_index: int,
        device_index: int,
        offset: int,
        host: int,
        nbytes: int,
        into_cache: bool,
    ) -> None:
        """Copy on one of the devices; see `Engine.copy_range`."""
        check_device_index(call, device_index, len(self._engines))
        engine = self._engines[device_index]
        engine.copy_range(call, cache_id, tensor_index, 0, offset, host, nbytes, into_cache)

    # ---- links

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int) -> LinkResult:
        """Link device i to device i of each cluster; a cluster is linked when all its devices are."""
        call = "link_clusters"
        if self.role is LLMRole.DECODER:
            refusal = check_clusters(call, clusters, len(self._engines)) or check_local_addresses(call, clusters)
            if refusal is not None:
                return refusal
        answers = self._on_each(lambda index, engine: engine.link(_of_device(clusters, index), timeout_ms))
        merged = _merge(answers, len(clusters))
        for number, code in enumerate(merged):
            if code is not _SUCCESS:
                self._roll_back(clusters, number, answers, timeout_ms)
        good = (_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)
        if merged and all(code in good for code in merged):
            return _SUCCESS, merged
        return _first_failure(overall for overall, _ in answers), merged

    def _roll_back(
        self, clusters: Sequence[ClusterAddress], number: int, answers: list[LinkResult], timeout_ms: int
    ) -> None:
        """Take down what was linked of a cluster that could not be linked on every device."""
        for index, (_, codes) in enumerate(answers):
            if number < len(codes) and codes[number] is _SUCCESS:
                self._engines[index].unlink(_of_device(clusters[number : number + 1], index), timeout_ms, False)

    def unlink(self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool) -> LinkResult:
        """Take the links of all devices down."""
        refusal = check_clusters("unlink_clusters", clusters, len(self._engines))
        if refusal is not None:
            return refusal
        answers = self._on_each(lambda index, engine: engine.unlink(_of_device(clusters, index), timeout_ms, force))
        return _first_failure(overall for overall, _ in answers), _merge(answers, len(clusters))

    def check_link(self, remote_cluster_id: int) -> None:
        """Ask the peer on every device."""
        self._on_each(lambda _, engine: engine.check_link(remote_cluster_id))

    def describe_links(self) -> list[LinkDescription]:
        """List the links of all devices."""
        return [link for engine in self._engines for link in engine.describe_links()]

    def switch_role(self, role: LLMRole, listen: tuple[str, int] | None) -> None:
        """Raise LLM_FEATURE_NOT_ENABLED: roles change in processes with one device."""
        reason = f"this process drives {len(self._engines)} devices, {role} needs a process with one"
        raise failure("switch_role", LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)

    def _on_each(self, work: Callable[[int, Engine], _Result]) -> list[_Result]:
        """Do something on all devices at the same time; raises the first failure when all have ended."""
        if not self.is_open:
            work(0, self._engines[0])  # says that the engine is finalized
        futures: list[Future[_Result]] = [
            self._workers.submit(work, index, engine) for index, engine in enumerate(self._engines)
        ]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


def _of_device(clusters: Sequence[ClusterAddress], index: int) -> list[ClusterAddress]:
    return [
        ClusterAddress(cluster.remote_cluster_id, cluster.local[index : index + 1], cluster.remote[index : index + 1])
        for cluster in clusters
    ]


def _merge(answers: list[LinkResult], clusters: int) -> list[LLMStatusCode]:
    """Make one answer a cluster of the answers of the devices: what all say, else the first that is no success."""
    if any(len(codes) != clusters for _, codes in answers):
        return []  # a device refused the whole call
    return [_first_failure(codes[number] for _, codes in answers) for number in range(clusters)]


def _first_failure(codes: Iterable[LLMStatusCode]) -> LLMStatusCode:
    return next((code for code in codes if code is not _SUCCESS), _SUCCESS)
