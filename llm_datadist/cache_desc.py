"""Description of a cache: how many tensors, of which shape and type, and where."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.arguments import INT64_MAX, check_int32, check_int64, check_isinstance, check_list_int64, check_uint32
from llm_datadist.data_type import ELEMENT_NBYTES, DataType
from llm_datadist.qualified_enum import QualifiedIntEnum
from llm_datadist.status import InvalidArgument


class Placement(QualifiedIntEnum):
    """Where the tensors of a cache lie."""

    HOST = 0
    DEVICE = 1


def tensor_nbytes(shape: Sequence[int], data_type: DataType) -> int:
    """Give the bytes of one tensor.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: a dimension is not positive, or the product is beyond int64.
    """
    nbytes = ELEMENT_NBYTES[data_type]
    for dimension in shape:
        if dimension <= 0:
            raise InvalidArgument(f"shape {list(shape)} has dimension {dimension}, each should be greater than 0")
        nbytes *= dimension
        # Looked at in each step: a product of many dimensions would be too long a number even for a message.
        if nbytes > INT64_MAX:
            raise InvalidArgument(f"shape {list(shape)} of {data_type} is too large, its bytes do not fit into int64")
    return nbytes


class CacheDesc:
    """Description of a cache of equal tensors.

    Parameters
    ----------
    num_tensors : int
        Number of tensors, uint32; an allocation needs at least 1.
    shape : tuple or list of int
        Shape of each tensor, int64 each. Dimension 0 counts the slots: batch entries, or blocks.
    data_type : DataType
        Type of the elements.
    placement : Placement
        DEVICE for caches that are allocated, HOST for `KvCache.create_cpu_cache`.
    batch_dim_index : int
        Dimension that `batch_size` is read from.
    seq_len_dim_index : int
        Dimension of the sequence length, or -1; carried along.
    kv_tensor_format : str, optional
        Carried along.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        An integer is out of the range of its width.
    LLMException
        LLM_PARAM_INVALID: an index names no dimension.

    Examples
    --------
    >>> from llm_datadist import CacheDesc, DataType
    >>> desc = CacheDesc(num_tensors=32, shape=[4, 1024, 8, 128], data_type=DataType.DT_FLOAT16)
    >>> desc.batch_size
    4
    >>> desc.size == 4 * 1024 * 8 * 128 * 2
    True
    """

    def __init__(
        self,
        num_tensors: int,
        shape: tuple[int, ...] | list[int],
        data_type: DataType,
        placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0,
        seq_len_dim_index: int = -1,
        kv_tensor_format: str | None = None,
    ) -> None:
        check_uint32("num_tensors", num_tensors)
        check_isinstance("shape", shape, [list, tuple], int, allow_none=False)
        check_isinstance("data_type", data_type, DataType, allow_none=False)
        check_isinstance("placement", placement, Placement, allow_none=False)
        check_isinstance("batch_dim_index", batch_dim_index, int, allow_none=False)
        check_int32("seq_len_dim_index", seq_len_dim_index)
        check_isinstance("kv_tensor_format", kv_tensor_format, str)
        if not 0 <= batch_dim_index < len(shape):
            raise InvalidArgument(
                f"batch_dim_index {batch_dim_index} is out of range, shape has {len(shape)} dimensions"
            )
        if not -1 <= seq_len_dim_index < len(shape):
            raise InvalidArgument(
                f"seq_len_dim_index {seq_len_dim_index} is out of range, should be -1 or in [0, {len(shape)})"
            )
        check_list_int64("shape", shape)
        self._num_tensors = num_tensors
        self._shape = shape
        self._data_type = data_type
        self._placement = placement
        self._batch_dim_index = batch_dim_index
        self._seq_len_dim_index = seq_len_dim_index
        self._kv_tensor_format = kv_tensor_format
        self._batch_size = shape[batch_dim_index]
        self._size: int | None = None

    @property
    def num_tensors(self) -> int:
        """Number of tensors."""
        return self._num_tensors

    @property
    def shape(self) -> tuple[int, ...] | list[int]:
        """Shape of each tensor; the very object that was given."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """Type of the elements."""
        return self._data_type

    @property
    def placement(self) -> Placement:
        """Where the tensors lie."""
        return self._placement

    @property
    def batch_dim(self) -> int:
        """Dimension of the batch, as given by ``batch_dim_index``."""
        return self._batch_dim_index

    @property
    def batch_size(self) -> int:
        """Size of the dimension of the batch when the description was made."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        """Dimension of the sequence length, or -1."""
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> str | None:
        """Format as given."""
        return self._kv_tensor_format

    @property
    def size(self) -> int:
        """Bytes of one tensor; computed at first use and remembered.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a dimension is not positive, or the product is beyond int64.
        """
        if self._size is None:
            self._size = tensor_nbytes(self._shape, self._data_type)
        return self._size

    def update_dim(self, dim_index: int, dim_value: int) -> None:
        """Change one dimension in place; `batch_size` stays as it was.

        Parameters
        ----------
        dim_index : int
            Index of the dimension.
        dim_value : int
            Its new size, int64.

        Raises
        ------
        TypeError
            An argument is no int, or the shape is a tuple.
        ValueError
            `dim_value` is out of range.
        LLMException
            LLM_PARAM_INVALID: `dim_index` names no dimension.
        """
        check_isinstance("dim_index", dim_index, int, allow_none=False)
        check_int64("dim_value", dim_value)
        if not isinstance(self._shape, list):
            raise TypeError(f"shape {self._shape} is a tuple, only support list for update_dim")
        if not 0 <= dim_index < len(self._shape):
            raise InvalidArgument(f"dim_index {dim_index} is out of range, shape has {len(self._shape)} dimensions")
        self._shape[dim_index] = dim_value
        self._size = None

    def __repr__(self) -> str:
        # Programs compare this text: there is no space before the last name.
        return (
            f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, data_type={self._data_type}, "
            f"placement={self._placement}, batch_dim_index={self._batch_dim_index}, "
            f"seq_len_dim_index={self._seq_len_dim_index},kv_tensor_format={self._kv_tensor_format})"
        )
