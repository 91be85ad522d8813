"""SmolLM2-135M-Instruct in NumPy, with its KV cache in arrays that the caller owns.

The model writes K and V of every layer straight into float16 arrays and attends from them, so the arrays may be the
tensors of a cache of ``llm_datadist``: prefill in one process, pull, and decode in another process.
"""

from __future__ import annotations

from .generate import generate
from .gguf_file import ModelNotFoundError, find_model_file, open_model
from .hyperparameters import Hyperparameters
from .kv_sequence import ContiguousSequence, KvSequence, PagedSequence
from .model import SmolLM2
from .tokenizer import ChatTokenizer, TextStream

__all__ = [
    "ChatTokenizer",
    "ContiguousSequence",
    "Hyperparameters",
    "KvSequence",
    "ModelNotFoundError",
    "PagedSequence",
    "SmolLM2",
    "TextStream",
    "find_model_file",
    "generate",
    "open_model",
]
