"""Greedy generation in one process, with the KV cache in plain arrays of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .kv_sequence import ContiguousSequence, Float32Array
from .model import SmolLM2


class Step(NamedTuple):
    """A generated token, and the logits ([vocabulary]) of which it is the greatest."""

    token: int
    logits: Float32Array


def generate(model: SmolLM2, prompt: Sequence[int], max_new_tokens: int, end_token: int) -> Iterator[Step]:
    """Yield the most likely next tokens one by one, up to `max_new_tokens` or up to `end_token` and with it."""
    sizes = model.hyperparameters
    shape = (1, len(prompt) + max_new_tokens, *sizes.kv_token_shape)
    kv = ContiguousSequence([np.zeros(shape, np.float16) for _ in range(sizes.num_kv_tensors)], slot=0)
    logits = model.prefill(prompt, kv)
    token = int(np.argmax(logits))
    yield Step(token, logits)
    for position in range(len(prompt), len(prompt) + max_new_tokens - 1):
        if token == end_token:
            return
        logits = model.decode([token], [position], [kv])[0]
        token = int(np.argmax(logits))
        yield Step(token, logits)
