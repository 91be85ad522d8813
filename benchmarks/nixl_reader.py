"""Reads of blocks between two processes with NIXL; runs alone, in an environment that has ``nixl``.

Each line of standard input is an order in JSON: ``block_bytes``, the blocks ``source`` and ``target`` (moved in each of
the two tensors), and ``runs``. The answer is one line of JSON with the seconds of each transfer, and of the preparation
of its descriptors. A first answer, which is empty, says that all is ready. The memory is another process's.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from nixl._api import nixl_agent, nixl_agent_config

TENSOR_BYTES = 128 << 20
TENSORS = 2
WARM_UP = 2  # runs that do not count


def new_agent(name: str) -> tuple[nixl_agent, list[torch.Tensor]]:
    """Make an agent with the tensors registered."""
    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    tensors = [torch.full((TENSOR_BYTES,), 7, dtype=torch.uint8) for _ in range(TENSORS)]
    agent.register_memory([(tensor.data_ptr(), TENSOR_BYTES, 0, "") for tensor in tensors], "DRAM")
    return agent, tensors


def own(connection: Connection) -> None:
    """Body of the owner: tell where the tensors are, and keep them."""
    agent, tensors = new_agent("owner")
    connection.send((agent.get_agent_metadata(), [tensor.data_ptr() for tensor in tensors]))
    connection.recv()


class Reader:
    """The reading agent, and the addresses of the tensors on both sides."""

    def __init__(self, connection: Connection) -> None:
        metadata, self._theirs = connection.recv()
        self._agent, self._tensors = new_agent("reader")
        self._remote = self._agent.add_remote_agent(metadata)
        self._ours = [tensor.data_ptr() for tensor in self._tensors]

    def serve(self, order: dict[str, Any]) -> dict[str, list[float]]:
        """Carry an order out."""
        ours = ranges(self._ours, order["target"], order["block_bytes"])
        theirs = ranges(self._theirs, order["source"], order["block_bytes"])
        taken = [self._read(ours, theirs) for _ in range(WARM_UP + order["runs"])][WARM_UP:]
        return {"prepare_s": [prepare for prepare, _ in taken], "transfer_s": [transfer for _, transfer in taken]}

    def _read(self, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
        started = time.perf_counter()
        here = self._agent.get_xfer_descs(ours, "DRAM")
        there = self._agent.get_xfer_descs(theirs, "DRAM")
        handle = self._agent.initialize_xfer("READ", here, there, self._remote, b"")
        prepared = time.perf_counter()
        state = self._agent.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                raise RuntimeError("the transfer failed")
            state = self._agent.check_xfer_state(handle)
        ended = time.perf_counter()
        self._agent.release_xfer_handle(handle)
        return prepared - started, ended - prepared


def ranges(addresses: list[int], blocks: list[int], nbytes: int) -> np.ndarray:
    """Describe the blocks of every tensor as NIXL wants them: address, bytes, device. Arrays are its fastest form."""
    rows = [(address + block * nbytes, nbytes, 0) for address in addresses for block in blocks]
    return np.array(rows, dtype=np.uint64)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,), daemon=True)
    owner.start()
    reader = Reader(ours)
    print("{}", flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(reader.serve(json.loads(line))), flush=True)
    ours.send(None)
    owner.join(10)


if __name__ == "__main__":
    main()
