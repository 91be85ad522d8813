"""The forward pass: prefill of one prompt, and one decode step of a batch of sequences.

The logits of a sequence have the same bits whatever else is in the batch. A decode step multiplies every row on its
own, in the shapes of a batch of one; a prefill takes one prompt at a time, in chunks of a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from .attention import attend
from .hyperparameters import Hyperparameters, read_hyperparameters
from .kv_sequence import Float32Array, KvSequence
from .rope import RotaryEmbedding
from .weights import LayerWeights, Weights, load_weights

# Large enough for fast matrix products, small enough for a progress bar that moves.
PREFILL_CHUNK = 128

Project = Callable[[Float32Array, Float32Array], Float32Array]


class Span(NamedTuple):
    """Rows of the batch that belong to one sequence, whose first row stands at position `start`."""

    kv: KvSequence
    start: int
    rows: slice


class SmolLM2:
    """A Llama model whose KV cache the caller provides.

    Parameters
    ----------
    sizes : Hyperparameters
        Sizes of the model.
    weights : Weights
        Weights of these sizes.
    """

    def __init__(self, sizes: Hyperparameters, weights: Weights) -> None:
        self.hyperparameters = sizes
        self._weights = weights
        self._rope = RotaryEmbedding(sizes.head_dim, sizes.rope_base, sizes.context_length)

    @classmethod
    def load(cls, reader: GGUFReader) -> SmolLM2:
        """Make the model of an open GGUF file (see `open_model`); its weights are dequantised to float32."""
        sizes = read_hyperparameters(reader)
        return cls(sizes, load_weights(reader, sizes.num_layers))

    def prefill(
        self, token_ids: Sequence[int], kv: KvSequence, on_progress: Callable[[int], None] | None = None
    ) -> Float32Array:
        """Fill `kv` with K and V of a prompt and return the logits ([vocabulary]) that follow its last token.

        Parameters
        ----------
        token_ids : sequence of int
            The prompt; 1 .. ``kv.capacity`` tokens.
        kv : KvSequence
            Receives K and V of all tokens, from position 0 on.
        on_progress : callable, optional
            Called after each chunk with the number of tokens that are done.

        Raises
        ------
        ValueError
            The prompt is empty or does not fit.
        """
        if not 1 <= len(token_ids) <= kv.capacity:
            raise ValueError(f"a prompt of {len(token_ids)} tokens; expected 1 to {kv.capacity}")
        tokens = np.asarray(token_ids, dtype=np.intp)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            spans = [Span(kv, start, slice(0, len(chunk)))]
            hidden = self._forward(chunk, start + np.arange(len(chunk)), spans, np.matmul)
            if on_progress is not None:
                on_progress(start + len(chunk))
        logits: Float32Array = self._logits(hidden[-1:])[0]
        return logits

    def decode(
        self, token_ids: Sequence[int], positions: Sequence[int], sequences: Sequence[KvSequence]
    ) -> Float32Array:
        """Take one step with each sequence of a batch and return the logits ([batch, vocabulary]).

        Row i is token ``token_ids[i]`` at position ``positions[i]`` of ``sequences[i]``: its K and V are written
        there, and it attends to positions ``0 .. positions[i]``.
        """
        spans = [
            Span(kv, position, slice(row, row + 1)) for row, (kv, position) in enumerate(zip(sequences, positions))
        ]
        tokens, places = np.asarray(token_ids, dtype=np.intp), np.asarray(positions, dtype=np.intp)
        return self._logits(self._forward(tokens, places, spans, _multiply_each_row))

    def _forward(
        self, tokens: npt.NDArray[np.intp], positions: npt.NDArray[np.intp], spans: Sequence[Span], project: Project
    ) -> Float32Array:
        hidden = np.ascontiguousarray(self._weights.vocabulary[:, tokens].T)
        for index, layer in enumerate(self._weights.layers):
            hidden += self._attention(index, layer, self._norm(hidden, layer.attention_norm), positions, spans, project)
            hidden += _feed_forward(layer, self._norm(hidden, layer.feed_forward_norm), project)
        return hidden

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        inputs: Float32Array,
        positions: npt.NDArray[np.intp],
        spans: Sequence[Span],
        project: Project,
    ) -> Float32Array:
        sizes = self.hyperparameters
        heads = project(inputs, layer.query_key_value).reshape(len(inputs), -1, sizes.head_dim)
        first_value = sizes.num_heads + sizes.num_kv_heads
        rotated, values = self._rope.rotate(heads[:, :first_value], positions), heads[:, first_value:]
        queries, keys = rotated[:, : sizes.num_heads], rotated[:, sizes.num_heads :]
        mixed = np.empty((len(inputs), sizes.num_heads * sizes.head_dim), np.float32)
        for kv, start, rows in spans:
            kv.write(index, start, keys[rows], values[rows])
            mixed[rows] = attend(queries[rows], *kv.read(index, start + rows.stop - rows.start))
        return project(mixed, layer.attention_output)

    def _norm(self, hidden: Float32Array, weight: Float32Array) -> Float32Array:
        mean_square = np.mean(np.square(hidden), axis=-1, keepdims=True)
        normed: Float32Array = hidden / np.sqrt(mean_square + np.float32(self.hyperparameters.norm_epsilon)) * weight
        return normed

    def _logits(self, hidden: Float32Array) -> Float32Array:
        return _multiply_each_row(self._norm(hidden, self._weights.output_norm), self._weights.vocabulary)


def _multiply_each_row(rows: Float32Array, matrix: Float32Array) -> Float32Array:
    # A stack of single rows is multiplied row by row, and the matrix stays in the processor's cache from one row to
    # the next. One product of all rows would sum in an order that depends on how many they are.
    product: Float32Array = np.matmul(rows[:, None, :], matrix)[:, 0, :]
    return product


def _feed_forward(layer: LayerWeights, inputs: Float32Array, project: Project) -> Float32Array:
    gate, up = np.split(project(inputs, layer.gate_up), 2, axis=-1)
    return project(gate / (1 + np.exp(-gate)) * up, layer.down)
