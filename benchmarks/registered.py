"""Pulls between private tensors of two processes, and the same work done by NIXL beside them.

``python -m benchmarks.registered [--nixl PYTHON]``; PYTHON is the interpreter of an environment that has ``nixl``, as
``make bench-peers`` makes one. Rounds of both are measured in turn, so that a machine whose speed changes is fair.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from llm_datadist import BlocksCacheKey, Cache, CacheDesc, DataType, LLMConfig, LLMDataDist, LLMRole
from llm_datadist.cluster.local import LocalGroup

from .__main__ import answer, free_port, link

OWNER = 1
TENSORS, TENSOR_BYTES = 2, 64 << 20
BLOCKS = (64 << 10, 4 << 10)  # bytes
ROUNDS = 9


def new_tensor() -> tuple[object, int]:
    """Make a tensor of the program, of torch if it is installed; gives it and its address."""
    try:
        import torch
    except ImportError:
        array = np.full(TENSOR_BYTES, 7, np.uint8)
        return array, array.ctypes.data
    tensor = torch.full((TENSOR_BYTES,), 7, dtype=torch.uint8)
    return tensor, tensor.data_ptr()


def new_datadist(cluster_id: int, listen: str = "") -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.sync_kv_timeout = 10_000
    config.listen_ip_info = listen
    datadist = LLMDataDist(LLMRole.MIX, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def register(datadist: LLMDataDist, tensors: list[tuple[object, int]]) -> list[Cache]:
    """Register the same tensors in blocks of each size, as the models 0, 1, ..."""
    addresses = [address for _, address in tensors]
    return [
        datadist.cache_manager.register_blocks_cache(
            CacheDesc(TENSORS, (TENSOR_BYTES // nbytes, nbytes), DataType.DT_UINT8),
            addresses,
            BlocksCacheKey(OWNER, model),
        )
        for model, nbytes in enumerate(BLOCKS)
    ]


def own(connection: Connection, port: int) -> None:
    """Body of the owner: register tensors, and keep them until told to end."""
    datadist = new_datadist(OWNER, f"127.0.0.1:{port}")
    tensors = [new_tensor() for _ in range(TENSORS)]
    register(datadist, tensors)
    connection.send("ready")
    connection.recv()
    datadist.finalize()


class Puller:
    """Pulls every block of the owner once, in random order on both sides."""

    def __init__(self, port: int) -> None:
        self.datadist = new_datadist(OWNER + 1)
        link(self.datadist, port)
        self._tensors = [new_tensor() for _ in range(TENSORS)]
        self._caches = register(self.datadist, self._tensors)

    def pull(self, model: int) -> float:
        """Give the seconds of one pull."""
        count = TENSOR_BYTES // BLOCKS[model]
        choice = random.Random(1)
        source, target = choice.sample(range(count), count), choice.sample(range(count), count)
        key = BlocksCacheKey(OWNER, model)
        started = time.perf_counter()
        self.datadist.cache_manager.pull_blocks(key, self._caches[model], source, target)
        return time.perf_counter() - started


class NixlReader:
    """The processes of `benchmarks.nixl_reader`; they stand still between two reads, since their threads poll."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("nixl_reader.py")
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def read(self, nbytes: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(f"{nbytes}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # the library writes its log there too
                os.killpg(self._process.pid, signal.SIGSTOP)
                found: dict[str, float] = json.loads(line)
                return found
        raise click.ClickException("the process with NIXL ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()


@contextmanager
def pulling() -> Iterator[Puller]:
    with LocalGroup() as group:
        port = free_port()
        owner = group.start("owner", own, port)
        answer(owner)
        puller = Puller(port)
        try:
            yield puller
        finally:
            puller.datadist.finalize()
            owner.connection.send(None)


def measure(puller: Puller, nixl: NixlReader | None) -> list[dict[str, Any]]:
    results = []
    for model, nbytes in enumerate(BLOCKS):
        puller.pull(model)
        rounds = []
        for _ in range(ROUNDS):
            ours = puller.pull(model)
            theirs = nixl.read(nbytes) if nixl is not None else None
            rounds.append((ours, theirs))
        moved = TENSORS * TENSOR_BYTES
        result: dict[str, Any] = {
            "block_bytes": nbytes,
            "bytes": moved,
            "rounds": ROUNDS,
            "gb_per_s": moved / statistics.median(ours for ours, _ in rounds) / 1e9,
        }
        if nixl is not None:
            result["nixl_gb_per_s"] = moved / statistics.median(theirs["transfer_s"] for _, theirs in rounds) / 1e9
            result["ratio"] = statistics.median(theirs["transfer_s"] / ours for ours, theirs in rounds)
            result["ratio_with_preparation"] = statistics.median(
                (theirs["transfer_s"] + theirs["prepare_s"]) / ours for ours, theirs in rounds
            )
        results.append(result)
    return results


@click.command()
@click.option("--nixl", "python", help="Interpreter of an environment that has nixl.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def main(python: str | None, as_json: bool) -> None:
    """Measure pulls of registered blocks, 128 MiB in random order, and NIXL beside them."""
    nixl = NixlReader(python) if python else None
    try:
        with pulling() as puller:
            results = measure(puller, nixl)
    finally:
        if nixl is not None:
            nixl.close()
    if as_json:
        print(json.dumps(results, indent=2))
        return
    table = Table(title="128 MiB between private tensors, medians", title_justify="left")
    columns = ["block", "GB/s"] + (["NIXL GB/s", "x NIXL", "x NIXL with descriptors"] if nixl else [])
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        row = [f"{result['block_bytes'] >> 10} KiB", f"{result['gb_per_s']:.1f}"]
        if nixl:
            row += [f"{result[name]:.1f}" for name in ("nixl_gb_per_s", "ratio", "ratio_with_preparation")]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
