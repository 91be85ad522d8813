"""The KV cache of a model as a framework holds it: torch tensors of blocks, with contents that any process knows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch

from llm_datadist import CacheDesc, DataType
from llm_datadist._acl import Device, DeviceMemory
from llm_datadist.engine.device_choice import VARIABLE
from llm_datadist.torch_tensors import create_cpu_tensors
from tests.datadist_member import payload

torch.set_num_threads(1)  # a process here is one of several on few cores

DATA_TYPES = {
    torch.float16: DataType.DT_FLOAT16,
    torch.bfloat16: DataType.DT_BF16,
    torch.float32: DataType.DT_FLOAT,
    torch.int8: DataType.DT_INT8,
}

# Of a block: the seed of the cache that it comes from, and its number there.
Origin = tuple[int, int]


class KvTensors:
    """Tensors of the same shape; dimension 0 counts the blocks. At first all bytes are zero.

    They lie in memory of the host, or of a simulated device if `LLM_DATADIST_DEVICE` says so.

    Parameters
    ----------
    count : int
        Number of tensors.
    shape : tuple of int
        Of each of them.
    dtype : torch.dtype
        One of `DATA_TYPES`.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._memory: DeviceMemory | None = None
        if os.environ.get(VARIABLE) == "simulator":
            self.tensors = self._on_device(count, shape, dtype)
        else:
            self.tensors = [torch.zeros(shape, dtype=dtype) for _ in range(count)]
        self.desc = CacheDesc(count, self.tensors[0].shape, DATA_TYPES[dtype])

    def _on_device(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """Take one piece of memory, as the caching allocator of a framework does; the tensors see it as host memory."""
        nbytes = math.prod(shape) * dtype.itemsize
        step = nbytes + -nbytes % 512
        self._memory = DeviceMemory(Device(0), count * step)
        addresses = [self._memory.address + index * step for index in range(count)]
        tensors = create_cpu_tensors(shape, dtype, addresses)
        for tensor in tensors:
            tensor.zero_()
        return tensors

    @property
    def addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors]

    def fill(self, seed: int) -> None:
        """Give every block of every tensor the contents of a seed."""
        for index, tensor in enumerate(self.tensors):
            tensor.copy_(self._content(seed, index))

    def fill_blocks(self, seed: int, index: int, blocks: list[int]) -> None:
        """Give blocks of one tensor the contents of a seed, as a model does that computes this layer now."""
        self.tensors[index][blocks] = self._content(seed, index)[blocks]

    def clear(self) -> None:
        for tensor in self.tensors:
            tensor.zero_()

    def wrong_blocks(self, expected: Mapping[int, Origin], first: int = 0) -> list[tuple[int, int]]:
        """List the blocks (tensor, block) that are not as expected, byte by byte.

        Parameters
        ----------
        expected : mapping of int to Origin
            Where the bytes of a block come from; blocks that are not in it must be zero.
        first : int
            Tensor at the source that tensor 0 of these comes from.
        """
        wrong = []
        for index, tensor in enumerate(self.tensors):
            contents = {seed: self._content(seed, first + index) for seed, _ in expected.values()}
            nothing = torch.zeros_like(tensor[0])
            for block in range(len(tensor)):
                seed, source = expected.get(block, (None, 0))
                wanted = nothing if seed is None else contents[seed][source]
                if not torch.equal(_bits(tensor[block]), _bits(wanted)):
                    wrong.append((index, block))
        return wrong

    def _content(self, seed: int, index: int) -> torch.Tensor:
        like = self.tensors[0]
        data = torch.from_numpy(payload(seed, index, like.nbytes))
        return data.view(like.dtype).reshape(like.shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Give the bytes of a tensor: numbers may be NaN, which is equal to nothing."""
    return tensor.contiguous().view(torch.uint8)


def mha(layers: int, blocks: int) -> list[KvTensors]:
    """Make keys and values of multi-head attention: two tensors for each layer, one cache."""
    return [KvTensors(2 * layers, (blocks, 16, 4, 32), torch.float16)]


def mla(layers: int, blocks: int) -> list[KvTensors]:
    """Make latent and rotary part of multi-head latent attention: tensors of two sizes, so two caches."""
    return [
        KvTensors(layers, (blocks, 16, 1, 128), torch.bfloat16),
        KvTensors(layers, (blocks, 16, 1, 24), torch.bfloat16),
    ]


def one_for_each_layer(layers: int, blocks: int) -> KvTensors:
    """Make keys and values in one quantised tensor for each layer."""
    return KvTensors(layers, (blocks, 8, 2, 24), torch.int8)
