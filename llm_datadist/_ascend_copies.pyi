import sys

from llm_datadist._acl import Device
from llm_datadist._local_copies import LocalCopier, LocalOutcome

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    from typing_extensions import Buffer

MOST_LANES: int

class AscendCopier(LocalCopier):
    def __init__(self, device: Device, threads: int = 1) -> None: ...
    @property
    def device(self) -> Device: ...
    def read(self, address: int, into: Buffer, deadline_ns: int) -> LocalOutcome: ...
    def write(self, address: int, data: Buffer, deadline_ns: int) -> LocalOutcome: ...
