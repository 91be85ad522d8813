"""Where the caches of an instance are, in host memory or on an Ascend device, and what goes with that.

What belongs to Ascend is imported when it is asked for.
"""

from __future__ import annotations

import logging
import os
from enum import Enum
from typing import TYPE_CHECKING

from llm_datadist.devices.base import DevicePool
from llm_datadist.devices.host import HostPool
from llm_datadist.engine.failures import invalid

if TYPE_CHECKING:
    from llm_datadist.transports.hccl.hccl_device import HcclDevice

_log = logging.getLogger("llm_datadist")

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


def open_device(
    kind: DeviceKind, device_id: int, nbytes: int, host_nbytes: int = 0, *, peers_write: bool
) -> DevicePool:
    """Reserve memory for caches.

    Parameters
    ----------
    kind, device_id : DeviceKind, int
        Where; the id has no meaning on the host.
    nbytes, host_nbytes : int
        Bytes for caches on the device, and for those that the program wants in host memory.
    peers_write : bool
        Whether peers that share host memory may write it.

    Raises
    ------
    LLMException
        LLM_DEVICE_OUT_OF_MEMORY; for Ascend those of `llm_datadist.devices.ascend.pool.open_pool`.
    """
    if kind is DeviceKind.HOST:
        # A segment must have a page, also if every cache is memory of the program.
        return HostPool(max(nbytes + host_nbytes, 1), peers_may_write=peers_write)
    from llm_datadist.devices.ascend.pool import open_pool

    return open_pool(device_id, nbytes, host_nbytes, simulated=kind is DeviceKind.ASCEND_SIMULATOR)


def hccl_device(pool: DevicePool, sync_kv_timeout_ms: int, transports: tuple[str, ...]) -> HcclDevice | None:
    """Make what links over HCCL share; None if the caches are on the host.

    Parameters
    ----------
    pool : DevicePool
        Of the caches.
    sync_kv_timeout_ms : int
        How long a transfer may take, in milliseconds.
    transports : tuple of str
        That may be used: for one-sided links the place of the device must be known.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: a setting has no possible value, or the place of the device is not known.
    """
    if isinstance(pool, HostPool):
        return None
    from llm_datadist import _hccl
    from llm_datadist.devices.ascend.place import place_of
    from llm_datadist.devices.ascend.pool import AscendPool
    from llm_datadist.transports.hccl import ONE_SIDED
    from llm_datadist.transports.hccl.hccl_device import HcclDevice, hccl_settings

    assert isinstance(pool, AscendPool)
    for warning in _hccl.sets_defaults(sync_kv_timeout_ms / 1000):
        _log.warning("%s", warning)
    try:
        settings = hccl_settings(sync_kv_timeout_ms)
        part = place_of(pool.device) if ONE_SIDED in transports else None
    except ValueError as error:
        raise invalid("init", str(error)) from None
    return HcclDevice(pool.device, pool.segment, settings, part)
