"""Which share of a large pull goes into its arguments: block tables of 4096 pairs for 60 tensors."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from llm_datadist import BlocksCacheKey
from llm_datadist._local import block_pairs

from .limits import Limits
from .measurement import Row, Target, time_us
from .prompt_process import PROMPT, bytes_desc, linked_pair
from .work import Work

TOPIC = "arguments"
TENSORS = 60
BLOCK_BYTES = 4096
PAIRS = 4096
MOST_SHARE = 0.10
RUNS = 9


def measure(limits: Limits) -> Iterator[Row]:
    """Pull with long block tables, and unpack the same tables alone."""
    with linked_pair({0: bytes_desc(TENSORS, PAIRS, BLOCK_BYTES)}) as (datadist, _):
        manager = datadist.kv_cache_manager
        cache = manager.allocate_blocks_cache(bytes_desc(TENSORS, PAIRS, BLOCK_BYTES))
        source, target = Work("", BLOCK_BYTES, PAIRS, PAIRS, RUNS).block_lists()
        key = BlocksCacheKey(PROMPT, 0)
        nbytes = TENSORS * PAIRS * BLOCK_BYTES
        whole, limit_us = limits.beside(nbytes, lambda: manager.pull_blocks(key, cache, source, target), RUNS)
        tables = time_us(lambda: block_pairs(source, target), 500)
        share = statistics.median(tables) / statistics.median(whole)
        name = f"pull_blocks, {TENSORS} tensors x {PAIRS} pairs of 4 KiB blocks"
        wanted = Target("of it arguments", share, MOST_SHARE, at_least=False)
        note = f"{limit_us / statistics.median(whole):.2f} of the limit"
        yield Row(TOPIC, name, whole, nbytes, limit_us=limit_us, targets=(wanted,), note=note)
        yield Row(TOPIC, f"block tables of {PAIRS} pairs unpacked", tables)
