"""How much memory an Ascend device has."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist._acl import AclError, Device
from llm_datadist.devices.ascend.errors import llm_exception


class MemoryFigures(NamedTuple):
    """Memory of a device, in bytes, as its runtime counts it.

    Attributes
    ----------
    free, total : int
        All processes on the device share them.
    """

    free: int
    total: int


def memory_figures(device: Device) -> MemoryFigures:
    """Ask a device how much memory it has.

    Raises
    ------
    LLMException
        The device does not tell, or is closed.
    """
    try:
        return MemoryFigures(*device.memory_info())
    except AclError as error:
        raise llm_exception("memory_figures", error) from error
