"""Pulls between tensors that two programs registered: private memory, copied by the kernel from process to process."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from llm_datadist import BlocksCacheKey, Cache
from llm_datadist.cache_manager import CacheManager
from llm_datadist.cluster.local import LocalGroup

from .instances import WAIT_S, answer, free_port, link, new_cache_manager
from .limits import Limits
from .measurement import Row, time_us
from .peer_reads import PeerReads, PeerRounds
from .prompt_process import DECODER, PROMPT
from .work import BLOCKS_4K, BLOCKS_64K, FEW_BLOCKS, ONE_BLOCK, TENSORS, Work

TOPIC = "registered memory"
WORKS = (BLOCKS_64K, BLOCKS_4K, FEW_BLOCKS, ONE_BLOCK)


def register(manager: CacheManager) -> tuple[list[npt.NDArray[np.uint8]], dict[Work, Cache]]:
    """Make tensors for each piece of work and register them; the models are the places in the list."""
    tensors, caches = [], {}
    for model, work in enumerate(WORKS):
        mine = [np.full(work.blocks * work.block_bytes, 7, np.uint8) for _ in range(TENSORS)]
        key = BlocksCacheKey(PROMPT, model)
        caches[work] = manager.register_blocks_cache(work.desc, [tensor.ctypes.data for tensor in mine], key)
        tensors += mine
    return tensors, caches


def serve(connection: Connection, port: int) -> None:
    """Body of the owner: register tensors, and keep them until told to end."""
    datadist = new_cache_manager(PROMPT, port)
    tensors, _ = register(datadist.cache_manager)
    connection.send("ready")
    connection.recv()
    datadist.finalize()
    del tensors


def measure(limits: Limits, peers: list[PeerReads]) -> Iterator[Row]:
    """Pull registered blocks."""
    port = free_port()
    with LocalGroup() as group:
        worker = group.start("owner", serve, port)
        answer(worker.connection)
        datadist = new_cache_manager(DECODER)
        try:
            link(datadist, PROMPT, port)
            tensors, caches = register(datadist.cache_manager)
            for model, work in enumerate(WORKS):
                yield _measure(datadist.cache_manager, model, work, caches[work], limits, peers)
            worker.connection.send(None)
            worker.wait(WAIT_S)
        finally:
            datadist.finalize()
            del tensors


def _measure(
    manager: CacheManager, model: int, work: Work, cache: Cache, limits: Limits, peers: list[PeerReads]
) -> Row:
    pull = partial(manager.pull_blocks, BlocksCacheKey(PROMPT, model), cache, *work.block_lists())
    rounds = PeerRounds(peers, work)

    def run_round() -> list[float]:
        taken = time_us(pull, work.runs_a_round)
        rounds.run()
        return taken

    taken, limit_us = limits.around(work.nbytes, run_round)
    notes = [] if work.is_small else [f"{limit_us / statistics.median(taken):.2f} of the limit"]
    for name in rounds.times:
        notes.append(f"{rounds.times_ours(name, statistics.median(taken)):.1f} x {name}")
    limit = None if work.is_small else limit_us
    return Row(TOPIC, f"registered: {work.name}", taken, work.nbytes, limit_us=limit, note=", ".join(notes))
