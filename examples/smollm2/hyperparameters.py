"""The sizes of the model, as its GGUF file states them."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGUFReader

from .gguf_file import metadata


@dataclass(frozen=True)
class Hyperparameters:
    """Sizes of a Llama model with grouped-query attention."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward_size: int
    context_length: int
    rope_base: float
    norm_epsilon: float

    @property
    def num_kv_tensors(self) -> int:
        """Tensors of a KV cache: K and V of every layer."""
        return 2 * self.num_layers

    @property
    def kv_token_shape(self) -> tuple[int, int]:
        """Shape of K (or V) of one token in one layer."""
        return (self.num_kv_heads, self.head_dim)


def read_hyperparameters(reader: GGUFReader) -> Hyperparameters:
    """Read the sizes from the header of a GGUF file of the Llama architecture."""
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"the GGUF file holds a model of architecture {architecture!r}; expected 'llama'")
    num_heads = int(metadata(reader, "llama.attention.head_count"))
    hidden_size = int(metadata(reader, "llama.embedding_length"))
    return Hyperparameters(
        num_layers=int(metadata(reader, "llama.block_count")),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(metadata(reader, "llama.attention.head_count_kv")),
        head_dim=hidden_size // num_heads,
        feed_forward_size=int(metadata(reader, "llama.feed_forward_length")),
        context_length=int(metadata(reader, "llama.context_length")),
        rope_base=float(metadata(reader, "llama.rope.freq_base")),
        norm_epsilon=float(metadata(reader, "llama.attention.layer_norm_rms_epsilon")),
    )
