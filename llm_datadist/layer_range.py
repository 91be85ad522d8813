"""Layer ranges of pulls, and the tensors that they choose."""

from __future__ import annotations

from typing import NamedTuple, Optional

from llm_datadist.arguments import UINT32_MAX, check_isinstance
from llm_datadist.status import InvalidArgument

TensorRange = Optional[tuple[int, int]]  # first tensor, number of tensors; None = all


class TensorRanges(NamedTuple):
    """Tensors that a pull takes at the source and fills at the destination."""

    src: TensorRange
    dst: TensorRange


def tensor_ranges(
    src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int
) -> TensorRanges:
    """Turn layer ranges into ranges of tensors.

    Parameters
    ----------
    src_layer_range, dst_layer_range : range or None
        Layers; None and an empty range mean all.
    tensor_num_per_layer : int
        Tensors that make one layer, >= 1.

    Raises
    ------
    TypeError
        A range is of another type.
    ValueError
        A layer is beyond uint32.
    LLMException
        LLM_PARAM_INVALID: the step is not 1, or the first layer is negative.
    """
    check_isinstance("src_layer_range", src_layer_range, range)
    check_isinstance("dst_layer_range", dst_layer_range, range)
    for name, layers in (("src_layer_range", src_layer_range), ("dst_layer_range", dst_layer_range)):
        if layers is not None and layers.step != 1:
            raise InvalidArgument(f"{name} is {layers}, step must be 1")
    return TensorRanges(
        _tensor_range("src_layer_range", src_layer_range, tensor_num_per_layer),
        _tensor_range("dst_layer_range", dst_layer_range, tensor_num_per_layer),
    )


def layer_range_to_tensor_indices(
    src_layer_range: range | None, dst_layer_range: range | None, tensor_num_per_layer: int = 2
) -> tuple[list[int], list[int]]:
    """List the tensors of two layer ranges; an empty list means all. Raises what `tensor_ranges` raises.

    Examples
    --------
    >>> from llm_datadist.layer_range import layer_range_to_tensor_indices
    >>> layer_range_to_tensor_indices(range(1, 2), range(2, 3))
    ([2, 3], [4, 5])
    """
    ranges = tensor_ranges(src_layer_range, dst_layer_range, tensor_num_per_layer)
    return _indices(ranges.src), _indices(ranges.dst)


def _tensor_range(name: str, layers: range | None, tensor_num_per_layer: int) -> TensorRange:
    if layers is None or layers.start >= layers.stop:
        return None
    if layers.start < 0:
        raise InvalidArgument(f"{name} is {layers}, start value should be >= 0")
    if layers.stop - 1 > UINT32_MAX:
        raise ValueError(f"{name} {layers} is out of range of uint32, layers should be in [0, {UINT32_MAX}]")
    return layers.start * tensor_num_per_layer, (layers.stop - layers.start) * tensor_num_per_layer


def _indices(tensors: TensorRange) -> list[int]:
    if tensors is None:
        return []
    first, count = tensors
    return list(range(first, first + count))
