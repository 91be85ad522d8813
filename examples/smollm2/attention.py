"""Causal grouped-query attention of one sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .kv_sequence import Float16Array, Float32Array


def attend(queries: Float32Array, keys: Float16Array, values: Float16Array) -> Float32Array:
    """Attend from the last tokens of a sequence to all of its tokens up to each of them.

    Parameters
    ----------
    queries : array of float32, [tokens, heads, head_dim]
        Queries of the last `tokens` tokens.
    keys, values : arrays of float16, [length, kv_heads, head_dim]
        K and V of the whole sequence. Head ``h`` of the queries reads head ``h // (heads // kv_heads)`` of them.

    Returns
    -------
    array of float32, [tokens, heads * head_dim]
    """
    tokens, heads, head_dim = queries.shape
    length, kv_heads, _ = keys.shape
    grouped = queries.reshape(tokens, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)
    grouped = grouped.reshape(kv_heads, -1, head_dim) * np.float32(head_dim**-0.5)
    scores: Float32Array = grouped @ keys.astype(np.float32).transpose(1, 2, 0)
    if tokens > 1:
        # A key is out of sight if it stands behind the query's own token.
        by_token = scores.reshape(kv_heads, heads // kv_heads, tokens, length)
        by_token[..., _hidden(tokens, length)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed: Float32Array = scores @ values.astype(np.float32).transpose(1, 0, 2)
    mixed /= scores.sum(axis=-1, keepdims=True)
    mixed = mixed.reshape(kv_heads, heads // kv_heads, tokens, head_dim)
    return mixed.transpose(2, 0, 1, 3).reshape(tokens, heads * head_dim)


def _hidden(tokens: int, length: int) -> npt.NDArray[np.bool_]:
    positions = np.arange(length)
    return positions[None, :] > positions[length - tokens :, None]
