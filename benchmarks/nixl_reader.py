"""Reads of blocks between two processes with NIXL, for a comparison; runs alone, in an environment that has ``nixl``.

Each line of standard input is the size of a block in bytes; the answer is one line of JSON with the seconds of the
transfer and of the preparation of its descriptors. The owner of the memory is a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
import torch
from nixl._api import nixl_agent, nixl_agent_config

TENSOR_BYTES = 64 << 20
TENSORS = 2


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


def blocks_of(addresses: list[int], order: np.ndarray, nbytes: int) -> list[tuple[int, int, int]]:
    return [(address + int(block) * nbytes, nbytes, 0) for address in addresses for block in order]


def read(agent: nixl_agent, remote: str, local: list[int], theirs: list[int], nbytes: int) -> dict[str, float]:
    """Read every block of the owner once, in random order on both sides."""
    choice = np.random.default_rng(1)
    count = TENSOR_BYTES // nbytes
    source, target = choice.permutation(count), choice.permutation(count)
    started = time.perf_counter()
    here = agent.get_xfer_descs(blocks_of(local, target, nbytes), "DRAM")
    there = agent.get_xfer_descs(blocks_of(theirs, source, nbytes), "DRAM")
    handle = agent.initialize_xfer("READ", here, there, remote, b"")
    prepared = time.perf_counter()
    state = agent.transfer(handle)
    while state != "DONE":
        if state == "ERR":
            raise RuntimeError("the transfer failed")
        state = agent.check_xfer_state(handle)
    ended = time.perf_counter()
    agent.release_xfer_handle(handle)
    return {"transfer_s": ended - prepared, "prepare_s": prepared - started}


def main() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs,), daemon=True)
    owner.start()
    metadata, addresses = ours.recv()
    agent, tensors = new_agent("reader")
    remote = agent.add_remote_agent(metadata)
    local = [tensor.data_ptr() for tensor in tensors]
    for line in sys.stdin:
        print(json.dumps(read(agent, remote, local, addresses, int(line))), flush=True)
    ours.send(None)
    owner.join(10)


if __name__ == "__main__":
    main()
