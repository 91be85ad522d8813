"""Where the device of this process is, by what the runtime and the server say."""

from __future__ import annotations

from llm_datadist._acl import Device
from llm_datadist.devices.ascend.device_address import device_address
from llm_datadist.devices.ascend.rank_table import LocalPart, make_local_part

# Attributes of a device, as the runtime counts them.
_SUPER_DEVICE_ID, _SUPER_POD_ID = 403, 405


def place_of(device: Device) -> LocalPart:
    """Find out the part of a device in the rank tables of its links; may ask a tool of the vendor's for seconds.

    Parameters
    ----------
    device : Device
        Of this process.

    Raises
    ------
    BadRankTable
        The kind of device is not known.
    BadDeviceAddress
        The server's configuration names something that is no address.
    """
    return make_local_part(
        device.soc_name,
        device.physical_id,
        device_ip=device_address(device.physical_id),
        super_device_id=device.attribute(_SUPER_DEVICE_ID),
        super_pod_id=device.attribute(_SUPER_POD_ID),
    )
