"""The ACL runtime of Ascend devices: one room for all that others use of it; `_acl.pxd` is the same for native code.

The vendor's library is looked for when an Ascend device is first asked for. Every handle is given back exactly once,
with its device current, from whatever thread drops it; the device itself goes when its last handle is gone.
"""

from __future__ import annotations

from llm_datadist._acl_device import Device
from llm_datadist._acl_memory import DeviceMemory, PinnedMemory
from llm_datadist._acl_runtime import (
    LIBRARIES,
    VARIABLE,
    VISIBLE_DEVICES,
    AclError,
    device_count,
    initialise,
    load,
    simulator,
    version_of,
)
from llm_datadist._acl_stream import Event, Stream
from llm_datadist._shared_library import LibraryMissing

__all__ = [
    "LIBRARIES",
    "VARIABLE",
    "VISIBLE_DEVICES",
    "AclError",
    "Device",
    "DeviceMemory",
    "Event",
    "LibraryMissing",
    "PinnedMemory",
    "Stream",
    "device_count",
    "initialise",
    "load",
    "simulator",
    "version_of",
]
