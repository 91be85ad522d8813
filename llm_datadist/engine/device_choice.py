"""Where the caches of an instance are: in host memory, or on an Ascend device."""

from __future__ import annotations

import os
from enum import Enum

from llm_datadist.engine.failures import invalid

OPTION = "llm.DeviceBackend"
VARIABLE = "LLM_DATADIST_DEVICE"  # environment, for what the option does not say


class DeviceKind(Enum):
    """Kind of memory that caches are in; the values are those of the option.

    ASCEND_SIMULATOR is a library that pretends to be an Ascend device, for development and tests: everything goes as on
    ASCEND, and nothing else is accepted.
    """

    HOST = "host"
    ASCEND = "ascend"
    ASCEND_SIMULATOR = "simulator"


_AUTOMATIC = "auto"


def choose_device(option: str | None) -> DeviceKind:
    """Choose by the option, else the environment, else by what is there: Ascend if its libraries and a device are.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: no such kind.
    """
    wanted, name = (option, OPTION) if option else (os.environ.get(VARIABLE) or _AUTOMATIC, VARIABLE)
    if wanted == _AUTOMATIC:
        from llm_datadist.devices.ascend.detection import is_available

        return DeviceKind.ASCEND if is_available() else DeviceKind.HOST
    try:
        return DeviceKind(wanted)
    except ValueError:
        kinds = ", ".join([_AUTOMATIC, *(kind.value for kind in DeviceKind)])
        raise invalid("init", f"{name} is {wanted!r}, should be one of {kinds}") from None
