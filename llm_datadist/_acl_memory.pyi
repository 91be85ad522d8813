import sys

from llm_datadist._acl_device import Device
from llm_datadist._segment import Memory

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    from typing_extensions import Buffer

class DeviceMemory(Memory):
    def __init__(self, device: Device, nbytes: int) -> None: ...
    @property
    def device(self) -> Device: ...

class PinnedMemory(Memory, Buffer):
    def __init__(self, device: Device, nbytes: int) -> None: ...
    @property
    def device(self) -> Device: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
