"""Reads of blocks between two processes with Mooncake's transfer engine over TCP; runs alone, in its own environment.

It takes the orders of `benchmarks.nixl_reader` and answers in the same form. There is no descriptor to prepare.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from mooncake.engine import TransferEngine

TENSOR_BYTES = 128 << 20
TENSORS = 2
HOST = "127.0.0.1"
BATCH = 1024  # ranges in one call; its queue is full at some thousands
WARM_UP = 1  # runs that do not count


def new_engine() -> tuple[Any, list[Any]]:
    """Make an engine with the tensors registered."""
    engine = TransferEngine()
    require(engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
    tensors = [(ctypes.c_char * TENSOR_BYTES)() for _ in range(TENSORS)]
    for tensor in tensors:
        ctypes.memset(tensor, 7, TENSOR_BYTES)
        require(engine.register_memory(ctypes.addressof(tensor), TENSOR_BYTES), "register_memory")
    return engine, tensors


def require(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} ended with {status}")


def own(connection: Connection) -> None:
    """Body of the owner: tell where the tensors are, and keep them."""
    engine, tensors = new_engine()
    connection.send((f"{HOST}:{engine.get_rpc_port()}", [ctypes.addressof(tensor) for tensor in tensors]))
    connection.recv()


def ranges(addresses: list[int], blocks: list[int], nbytes: int) -> list[int]:
    return [address + block * nbytes for address in addresses for block in blocks]


def main() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,), daemon=True)
    owner.start()
    remote, remote_addresses = ours.recv()
    engine, tensors = new_engine()
    addresses = [ctypes.addressof(tensor) for tensor in tensors]
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        order = json.loads(line)
        nbytes = order["block_bytes"]
        here = ranges(addresses, order["target"], nbytes)
        there = ranges(remote_addresses, order["source"], nbytes)
        sizes = [nbytes] * len(here)
        taken = []
        for _ in range(WARM_UP + order["runs"]):
            started = time.perf_counter()
            for first in range(0, len(here), BATCH):
                batch = slice(first, first + BATCH)
                status = engine.batch_transfer_sync_read(remote, here[batch], there[batch], sizes[batch])
                require(status, "batch_transfer_sync_read")
            taken.append(time.perf_counter() - started)
        print(json.dumps({"transfer_s": taken[WARM_UP:], "prepare_s": [0.0] * order["runs"]}), flush=True)
    ours.send(None)
    owner.join(10)


if __name__ == "__main__":
    main()
