"""Rotary position embedding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]


class RotaryEmbedding:
    """Rotates pairs of head dimensions by angles that grow with the position of the token.

    A GGUF file of the Llama architecture stores the rows of the query and key projections so that the two members of
    a pair are neighbours: dimensions 2i and 2i + 1.

    Parameters
    ----------
    head_dim : int
        Dimensions of one attention head; even.
    base : float
        Pair i of position p turns by ``p * base ** (-2 * i / head_dim)``.
    num_positions : int
        Positions 0 .. num_positions - 1 can be rotated.
    """

    def __init__(self, head_dim: int, base: float, num_positions: int) -> None:
        frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        angles = np.arange(num_positions, dtype=np.float64)[:, None] * frequencies
        # The middle axis of length 1 stands for the heads, which all turn alike.
        self._cosine = np.cos(angles).astype(np.float32)[:, None, :]
        self._sine = np.sin(angles).astype(np.float32)[:, None, :]

    def rotate(self, heads: Float32Array, positions: npt.NDArray[np.intp]) -> Float32Array:
        """Return `heads` ([tokens, heads, head_dim]) rotated to `positions` ([tokens])."""
        cosine, sine = self._cosine[positions], self._sine[positions]
        first, second = heads[..., 0::2], heads[..., 1::2]
        rotated = np.empty_like(heads)
        rotated[..., 0::2] = first * cosine - second * sine
        rotated[..., 1::2] = first * sine + second * cosine
        return rotated
