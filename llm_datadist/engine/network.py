"""What an instance was told about the network: in its options, else in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llm_datadist.engine.failures import invalid
from llm_datadist.engine.options import NetworkOptions
from llm_datadist.transports import hccl, shared_memory, tcp
from llm_datadist.transports.network_interface import interface_address

# Environment, for what the options do not say.
TRANSPORT = "LLM_DATADIST_TRANSPORT"
DATA_PORTS = "LLM_DATADIST_DATA_PORTS"
DATA_ADDRESS = "LLM_DATADIST_DATA_ADDRESS"
DATA_CHECKSUM = "LLM_DATADIST_DATA_CHECKSUM"

AUTOMATIC = "auto"
# By the kind of memory that caches are in.
_OF_HOST = {
    AUTOMATIC: (shared_memory.NAME, tcp.NAME),
    shared_memory.NAME: (shared_memory.NAME,),
    tcp.NAME: (tcp.NAME,),
}
_OF_ASCEND = {
    AUTOMATIC: (hccl.NAME,),
    hccl.NAME: (hccl.NAME,),
    hccl.ONE_SIDED: (hccl.ONE_SIDED, hccl.NAME),
}
_CHECKSUMS = {"none": False, "crc32c": True}
_MAX_PORT = 65535


@dataclass(frozen=True)
class Network:
    """How links of one instance may move bytes.

    Attributes
    ----------
    transports : tuple of str
        Names of the transports that may be used, best first.
    reason : str
        Why one that the settings ask for is not among them; empty if all are.
    data_ports : (int, int) or None
        First and last port that the data listener may take; None = any.
    data_address : str or None
        Address or name that it binds, and that peers are told; None = the address that links are accepted at.
    summed : bool
        Whether bytes over data connections are summed and compared.
    """

    transports: tuple[str, ...] = _OF_HOST[AUTOMATIC]
    reason: str = ""
    data_ports: tuple[int, int] | None = None
    data_address: str | None = None
    summed: bool = False


def network(options: NetworkOptions, *, on_ascend: bool = False, cache_manager: bool = False) -> Network:
    """Read the settings of an instance, whose caches are on the host or on an Ascend device.

    Parameters
    ----------
    options : NetworkOptions
        What the program has said.
    on_ascend : bool
        Whether caches are on an Ascend device.
    cache_manager : bool
        Whether the instance is in cache-manager mode.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: a setting has no possible value.
    """
    transport, name = _setting(options.transport, TRANSPORT)
    possible = _OF_ASCEND if on_ascend else _OF_HOST
    if transport is not None and transport not in possible:
        where = "on an Ascend device" if on_ascend else "in host memory"
        raise invalid("init", f"{name} is {transport!r}, should be one of {', '.join(possible)}: caches are {where}")
    checksum, name = _setting(options.data_checksum, DATA_CHECKSUM)
    if checksum is not None and checksum not in _CHECKSUMS:
        raise invalid("init", f"{name} is {checksum!r}, should be one of {', '.join(_CHECKSUMS)}")
    ports, name = _setting(options.data_ports, DATA_PORTS)
    address, _ = _setting(options.data_address, DATA_ADDRESS)
    transports, reason = possible[transport or AUTOMATIC], ""
    if hccl.ONE_SIDED in transports:
        reason = _why_not_one_sided(cache_manager)
    return Network(
        transports=tuple(each for each in transports if each != hccl.ONE_SIDED) if reason else transports,
        reason=reason,
        data_ports=None if ports is None else _port_range(name, ports),
        data_address=None if address is None else interface_address(address) or address,
        summed=_CHECKSUMS[checksum or "none"],
    )


def _why_not_one_sided(cache_manager: bool) -> str:
    """Say why this process cannot have one-sided links; empty if it can."""
    from llm_datadist.devices.ascend.detection import one_sided_links

    if cache_manager:
        return "links in cache-manager mode send and receive, since they also reach memory that is not in the pool"
    if not one_sided_links():
        return "the HCCL that is installed at one end has no one-sided transfers"
    return ""


def _setting(option: str | None, variable: str) -> tuple[str | None, str]:
    """Give a setting and where it comes from; an empty text is none."""
    if option:
        return option, f"llm.{''.join(word.title() for word in variable.split('_')[2:])}"
    return os.environ.get(variable) or None, variable


def _port_range(name: str, text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    numbers = [number.strip() for number in ((first, last) if dash else (first, first))]
    if all(number.isascii() and number.isdigit() and len(number) <= 5 for number in numbers):
        low, high = int(numbers[0]), int(numbers[1])
        if 1 <= low <= high <= _MAX_PORT:
            return low, high
    raise invalid("init", f'{name} is {text!r}, should be a port, or a range of ports such as "26100-26199"')
