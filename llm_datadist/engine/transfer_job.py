"""Layer-wise transfers in the background: a job sends each layer as soon as the model has computed it.

A job knows the order of layers and what its results mean; bytes move in the function that it is given.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Optional

from llm_datadist.devices.base import SynchronizeLayer
from llm_datadist.engine.keys import KeyName
from llm_datadist.engine.mode_codes import KV_MODE
from llm_datadist.status import LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.transfer")

TENSORS_PER_LAYER = 2  # K and V
THREAD_NAME = "llm_datadist-transfer"

# cluster, cache, (first tensor, tensors), addresses, slot, source blocks, destination blocks, bytes of a block, key of
# the destination, its first tensor
PushLayer = Callable[
    [
        int,
        int,
        tuple[int, int],
        list[int],
        Optional[int],
        Optional[list[int]],
        Optional[list[int]],
        int,
        Optional[KeyName],
        int,
    ],
    None,
]


class Destination(NamedTuple):
    """One receiver of a transfer.

    Attributes
    ----------
    cluster_id : int
        Its cluster.
    layers : range
        Layers of the source that it gets.
    addresses : tuple of int
        Where they go in its process, `TENSORS_PER_LAYER` a layer of the range; empty if they go to a key.
    src_slot : int or None
        Slot of the source; None if blocks of the source are sent.
    key : KeyName or None
        Cache that they go to.
    dst_layers : range or None
        Layers of that cache, as many as `layers`.
    """

    cluster_id: int
    layers: range
    addresses: tuple[int, ...]
    src_slot: int | None
    key: KeyName | None = None
    dst_layers: range | None = None


class LayerTransfer(NamedTuple):
    """What a job sends.

    Attributes
    ----------
    cache_id : int
        The source.
    destinations : tuple of Destination
        Receivers, in the order of the results.
    src_blocks, dst_blocks : list of int or None
        Block table of the transfer; None if a slot is sent. Destination blocks alone: the slot is cut into blocks.
    block_nbytes : int
        Bytes of a block at the destination; 0 = as at the source.
    """

    cache_id: int
    destinations: tuple[Destination, ...]
    src_blocks: list[int] | None
    dst_blocks: list[int] | None
    block_nbytes: int


class TransferJob:
    """One transfer: runs in one thread, and tells others how far it is.

    Parameters
    ----------
    transfer : LayerTransfer
        What to send.
    timeout_code : LLMStatusCode
        What a wait says that ends before the job.
    """

    def __init__(self, transfer: LayerTransfer, timeout_code: LLMStatusCode = KV_MODE.timeout) -> None:
        self._transfer = transfer
        self._timeout_code = timeout_code
        self._results: list[LLMStatusCode | None] = [None] * len(transfer.destinations)
        # Guards the three flags; never held while the program's code runs or bytes move. It can be taken twice: a
        # signal handler may finalise while its thread waits in here.
        self._changed = threading.Condition(threading.RLock())
        self._in_synchronizer = False
        self._stopping = False
        self._ended = False

    # ---- for whoever waits

    def get(self, timeout_s: float | None) -> LLMStatusCode:
        """Wait, then give the first failure, or LLM_SUCCESS; the code of a timeout while it runs."""
        if not self._wait(timeout_s):
            return self._timeout_code
        for code in self._results:
            if code is not None and code is not LLMStatusCode.LLM_SUCCESS:
                return code
        return LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_s: float | None) -> list[LLMStatusCode | None]:
        """Wait, then give one result a destination; the code of a timeout for each while it runs."""
        if not self._wait(timeout_s):
            return [self._timeout_code] * len(self._results)
        return list(self._results)

    def stop(self, timeout_s: float) -> bool:
        """Let the job end before its next layer; False if it has not ended.

        Waits while the job is about to end, but not for the program's synchronizer: the job ends when that returns, and
        moves no byte any more.
        """
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: self._ended or self._in_synchronizer, timeout_s)
            return self._ended

    # ---- in the job's thread

    def run(self, synchronize_layer: SynchronizeLayer, push_layer: PushLayer) -> None:
        """Send all layers in ascending order, until one fails.

        Parameters
        ----------
        synchronize_layer : callable
            Waits for a layer of the model; a falsy result says that it failed.
        push_layer : callable
            Moves the bytes of one layer to one destination; raises LLMException with the code of the failure.
        """
        destinations = self._transfer.destinations
        layers = sorted({layer for destination in destinations for layer in destination.layers})
        try:
            for layer in layers:
                wanted = [index for index, destination in enumerate(destinations) if layer in destination.layers]
                code = self._wait_for_layer(layer, synchronize_layer)
                if code is not LLMStatusCode.LLM_SUCCESS:
                    for index in wanted:
                        self._results[index] = code
                    return
                # all() leaves the destinations after a failed one alone
                if not all(self._send(layer, index, push_layer) for index in wanted):
                    return
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_layer(self, layer: int, synchronize_layer: SynchronizeLayer) -> LLMStatusCode:
        """Wait for the model; tells whether the layer may be sent, and if not, why."""
        if self._enter_synchronizer():
            try:
                if not synchronize_layer(layer, None):
                    _log.warning("transfer ends: synchronize_layer(%d) says that the layer failed", layer)
                    return LLMStatusCode.LLM_PARAM_INVALID
            except BaseException:  # SystemExit too: it would end this thread without a word
                _log.exception("transfer ends: synchronize_layer(%d) raised", layer)
                return LLMStatusCode.LLM_FAILED
            finally:
                stopping = self._leave_synchronizer()
            if not stopping:
                return LLMStatusCode.LLM_SUCCESS
        _log.warning("transfer ends before layer %d: the instance is finalized", layer)
        return LLMStatusCode.LLM_FAILED

    def _send(self, layer: int, index: int, push_layer: PushLayer) -> bool:
        """Send a layer to one destination and note the result, if it is one."""
        transfer = self._transfer
        cluster_id, layers, addresses, src_slot, key, dst_layers = transfer.destinations[index]
        nth = layer - layers.start
        try:
            push_layer(
                cluster_id,
                transfer.cache_id,
                (TENSORS_PER_LAYER * layer, TENSORS_PER_LAYER),
                list(addresses[TENSORS_PER_LAYER * nth : TENSORS_PER_LAYER * (nth + 1)]),
                src_slot,
                transfer.src_blocks,
                transfer.dst_blocks,
                transfer.block_nbytes,
                key,
                0 if dst_layers is None else TENSORS_PER_LAYER * dst_layers[nth],
            )
        except LLMException as error:
            _log.warning("transfer of layer %d to cluster %d ends: %s", layer, cluster_id, error)
            self._results[index] = error.status_code
            return False
        except Exception:
            _log.exception("transfer of layer %d to cluster %d ends", layer, cluster_id)
            self._results[index] = LLMStatusCode.LLM_FAILED
            return False
        if layer == layers.stop - 1:
            self._results[index] = LLMStatusCode.LLM_SUCCESS
        return True

    def _enter_synchronizer(self) -> bool:
        """Note that the program's code runs from now on; False if the job has to end instead."""
        with self._changed:
            if self._stopping:
                return False
            self._in_synchronizer = True
            return True

    def _leave_synchronizer(self) -> bool:
        """Note that the program's code has returned; True if the job has to end."""
        with self._changed:
            self._in_synchronizer = False
            return self._stopping

    def _wait(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout_s)


class TransferJobs:
    """The running transfers of an engine; each has a thread that ends with it.

    Parameters
    ----------
    timeout_code : LLMStatusCode
        As for `TransferJob`.
    """

    def __init__(self, timeout_code: LLMStatusCode = KV_MODE.timeout) -> None:
        self._timeout_code = timeout_code
        self._lock = threading.RLock()  # can be taken twice, as the lock of a job
        self._running: dict[TransferJob, threading.Thread] = {}

    def start(
        self, transfer: LayerTransfer, synchronize_layer: SynchronizeLayer, push_layer: PushLayer, source: object
    ) -> TransferJob:
        """Begin a transfer in a thread of its own; one without destinations has ended when this returns.

        Parameters
        ----------
        transfer : LayerTransfer
            What to send.
        synchronize_layer, push_layer : callable
            As for `TransferJob.run`.
        source : object
            Handle of the source cache; kept alive until the transfer has ended.

        Raises
        ------
        LLMException
            LLM_FAILED: no thread could be started.
        """
        job = TransferJob(transfer, self._timeout_code)
        if not transfer.destinations:
            job.run(synchronize_layer, push_layer)
            return job
        thread = threading.Thread(
            target=self._run, args=(job, synchronize_layer, push_layer, source), name=THREAD_NAME, daemon=True
        )
        with self._lock:
            self._running[job] = thread
        try:
            thread.start()
        except RuntimeError as error:
            self._forget(job)
            raise LLMException(
                f"transfer_cache_async failed, error code is {LLMStatusCode.LLM_FAILED}: {error}",
                status_code=LLMStatusCode.LLM_FAILED,
            ) from error
        return job

    def close(self, timeout_s: float) -> None:
        """Let all transfers end; waits `timeout_s` at most, and not for those that wait for the program."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            running = list(self._running.items())
        for job, thread in running:
            if job.stop(max(0.0, deadline - time.monotonic())):
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(
        self, job: TransferJob, synchronize_layer: SynchronizeLayer, push_layer: PushLayer, source: object
    ) -> None:
        """Body of a job's thread; its argument `source` keeps the cache that the job reads."""
        try:
            job.run(synchronize_layer, push_layer)
        finally:
            self._forget(job)

    def _forget(self, job: TransferJob) -> None:
        with self._lock:
            del self._running[job]
