"""What there is of Ascend on this machine, for diagnosis: libraries, versions, and the state of a device.

`describe_software` only opens the libraries. `describe_device` starts the vendor's runtime in this process, which then
cannot be forked any more.

This module is an addition to the documented interface.
"""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist.arguments import check_int32
from llm_datadist.status import LLMException, LLMStatusCode

__all__ = ["DeviceState", "Software", "describe_device", "describe_software", "why_no_device"]


class Software(NamedTuple):
    """What the vendor's software on this machine offers.

    Attributes
    ----------
    libraries : tuple of str
        Files that were opened.
    missing : tuple of str
        Optional functions that this release lacks; what they are for is done in another way.
    versions : dict of str to str
        Packages of the vendor and their versions, as far as they say.
    simulator : str or None
        Version of the simulator, if the libraries are not the vendor's.
    no_links : str
        Why links between devices cannot be made; empty if the libraries for them are there.
    """

    libraries: tuple[str, ...]
    missing: tuple[str, ...]
    versions: dict[str, str]
    simulator: str | None
    no_links: str


class DeviceState(NamedTuple):
    """A device, at the moment in which it was asked.

    Attributes
    ----------
    visible : int
        Devices that this process sees, numbered from 0.
    physical_id : int
        Of this one, among the devices of the server.
    soc_name : str
    free, total : int
        Bytes of its memory; all processes on it share them.
    address : str
        Of its own network port; empty if there is none.
    no_address : str
        What is wrong with the configured address; empty if nothing is.
    """

    visible: int
    physical_id: int
    soc_name: str
    free: int
    total: int
    address: str
    no_address: str


def why_no_device() -> str:
    """Say why ``auto`` chooses memory of the host; empty if it chooses an Ascend device. May start the runtime."""
    from llm_datadist.devices.ascend.detection import why_unavailable

    return why_unavailable()


def describe_software() -> Software:
    """Open the vendor's libraries, and describe them.

    Raises
    ------
    LLMException
        LLM_FEATURE_NOT_ENABLED: there is no ACL runtime, or it is too old.
    """
    from llm_datadist import _hccl
    from llm_datadist._shared_library import LibraryMissing
    from llm_datadist.devices.ascend.detection import installation

    try:
        runtime = installation()
    except LibraryMissing as error:
        raise LLMException(str(error), status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED) from error
    libraries, missing, no_links = list(runtime.paths), list(runtime.missing), ""
    try:
        paths, lacking = _hccl.load()
        libraries += paths
        missing += lacking
    except LibraryMissing as error:
        no_links = str(error)
    return Software(
        tuple(dict.fromkeys(libraries)), tuple(missing), dict(runtime.versions), runtime.simulator, no_links
    )


def describe_device(device_id: int) -> DeviceState:
    """Open a device, ask it, and close it again.

    Parameters
    ----------
    device_id : int
        Index among the devices that this process sees.

    Raises
    ------
    LLMException
        LLM_FEATURE_NOT_ENABLED: the libraries are missing or too old. LLM_PARAM_INVALID: there are fewer devices.
        LLM_FAILED: there is no driver or no device, or it reports an error; with the vendor's text.
    """
    from llm_datadist._acl import Device, device_count
    from llm_datadist._shared_library import VendorError
    from llm_datadist.devices.ascend.detection import require_device
    from llm_datadist.devices.ascend.errors import llm_exception
    from llm_datadist.devices.ascend.memory_figures import memory_figures

    require_device(check_int32("device_id", device_id))
    try:
        visible = device_count()
        device = Device(device_id)
    except VendorError as error:
        raise llm_exception(f"opening device {device_id}", error) from error
    try:
        free, total = memory_figures(device)
        address, no_address = _address(device.physical_id)
        return DeviceState(visible, device.physical_id, device.soc_name, free, total, address, no_address)
    finally:
        device.close()


def _address(physical_id: int) -> tuple[str, str]:
    from llm_datadist.devices.ascend.device_address import BadDeviceAddress, device_address

    try:
        return device_address(physical_id), ""
    except BadDeviceAddress as error:
        return "", str(error)
