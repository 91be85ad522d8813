"""The weights in float32, laid out for row vectors: every matrix is [inputs, outputs], contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one transformer layer; projections with the same input stand side by side in one matrix."""

    attention_norm: Float32Array  # [hidden]
    query_key_value: Float32Array  # [hidden, (heads + 2 * kv_heads) * head_dim]
    attention_output: Float32Array  # [heads * head_dim, hidden]
    feed_forward_norm: Float32Array  # [hidden]
    gate_up: Float32Array  # [hidden, 2 * feed_forward]
    down: Float32Array  # [feed_forward, hidden]


@dataclass(frozen=True)
class Weights:
    """All weights; the embedding is tied, so one matrix serves the first step and the last."""

    layers: list[LayerWeights]
    output_norm: Float32Array  # [hidden]
    vocabulary: Float32Array  # [hidden, vocabulary]: column t is the embedding of token t


def load_weights(reader: GGUFReader, num_layers: int) -> Weights:
    """Dequantise the weights of all layers (about half a gigabyte for SmolLM2-135M)."""
    quantised = {tensor.name: tensor for tensor in reader.tensors}

    def vector(name: str) -> Float32Array:
        tensor = quantised[name]
        # A copy: what is stored as float32 would stay a view of the file.
        return np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def matrix(*names: str) -> Float32Array:
        return np.ascontiguousarray(np.concatenate([vector(name) for name in names]).T)

    def layer(index: int) -> LayerWeights:
        prefix = f"blk.{index}."
        return LayerWeights(
            attention_norm=vector(prefix + "attn_norm.weight"),
            query_key_value=matrix(*(prefix + f"attn_{part}.weight" for part in "qkv")),
            attention_output=matrix(prefix + "attn_output.weight"),
            feed_forward_norm=vector(prefix + "ffn_norm.weight"),
            gate_up=matrix(prefix + "ffn_gate.weight", prefix + "ffn_up.weight"),
            down=matrix(prefix + "ffn_down.weight"),
        )

    return Weights(
        layers=[layer(index) for index in range(num_layers)],
        output_norm=vector("output_norm.weight"),
        vocabulary=matrix("token_embd.weight"),
    )
