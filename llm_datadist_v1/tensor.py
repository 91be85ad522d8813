"""Tensors, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.tensor import Tensor, TensorDesc

__all__ = ["Tensor", "TensorDesc"]
