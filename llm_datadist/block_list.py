"""Block numbers as programs hold them: in lists and tuples, or in arrays, which no Python loop looks through."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from llm_datadist.arguments import Classes, check_isinstance, check_list_uint64

if TYPE_CHECKING:
    from llm_datadist._local import BlockList


def is_block_array(blocks: object) -> bool:
    """Tell whether block numbers are in an array of `array` or NumPy; what is in it the engine finds out."""
    kind = type(blocks)
    return kind is array or (kind.__name__ == "ndarray" and kind.__module__ == "numpy")


def check_block_list(name: str, blocks: BlockList, classes: Classes) -> None:
    """Check for block numbers: an array, or an instance of one of `classes` with elements that are ints."""
    if not is_block_array(blocks):
        check_isinstance(name, blocks, classes, int, allow_none=False)


def check_block_numbers(name: str, blocks: BlockList) -> None:
    """Check that the elements of a list or tuple are uint64."""
    if not is_block_array(blocks):
        check_list_uint64(name, blocks)
