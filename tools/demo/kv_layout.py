"""Shapes and sizes of the KV caches on both sides."""

from __future__ import annotations

from llm_datadist import CacheDesc, DataType
from llm_datadist.examples.smollm2 import Hyperparameters

PROMPT_CLUSTER = 1  # of the two processes of one host
DECODER_CLUSTER = 2

MAX_TOKENS = 1024  # of one request: prompt and answer
BLOCK_SIZE = 16  # tokens
PROMPTS_IN_FLIGHT = 4  # prefilled, or being prefilled, and not yet pulled
DECODE_SLOTS = 4  # requests that are decoded at the same time

_BYTES_PER_NUMBER = 2  # float16


def contiguous_desc(sizes: Hyperparameters, slots: int) -> CacheDesc:
    """Describe a cache with room for `slots` whole requests."""
    return CacheDesc(sizes.num_kv_tensors, (slots, MAX_TOKENS, *sizes.kv_token_shape), DataType.DT_FLOAT16)


def blocks_desc(sizes: Hyperparameters, requests: int) -> CacheDesc:
    """Describe a blocks cache with room for `requests` requests of the greatest length."""
    shape = (requests * blocks_of(MAX_TOKENS), BLOCK_SIZE, *sizes.kv_token_shape)
    return CacheDesc(sizes.num_kv_tensors, shape, DataType.DT_FLOAT16)


def blocks_of(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


def token_bytes(sizes: Hyperparameters) -> int:
    """Bytes of one token in one tensor."""
    return sizes.num_kv_heads * sizes.head_dim * _BYTES_PER_NUMBER


def pool_bytes(sizes: Hyperparameters, requests: int) -> int:
    """Bytes of a pool that holds `requests` requests of the greatest length."""
    return requests * MAX_TOKENS * token_bytes(sizes) * sizes.num_kv_tensors
