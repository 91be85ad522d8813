"""The address of a device's own network port: from the server's configuration, else from the vendor's tool."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from llm_datadist.arguments import check_int32

CONFIGURATION = Path("/etc/hccn.conf")
TOOL = "hccn_tool"
TOOL_OF_DRIVER = Path("/usr/local/Ascend/driver/tools/hccn_tool")

_log = logging.getLogger("llm_datadist")

_TIMEOUT_S = 5.0
_FAMILIES = ((4, "address_{}", ("-ip", "-g")), (6, "IPv6address_{}", ("-ip", "-inet6", "-g")))
_ANSWER = re.compile(r"^\s*ipaddr\s*:\s*([^\s/]+)", re.MULTILINE)
_GRACE_S = 1.0  # for the end of a process that was killed


class BadDeviceAddress(ValueError):
    """The configuration names something that is no address; the text says where."""


def device_address(
    physical_id: int,
    *,
    configuration: Path = CONFIGURATION,
    tool: str | Path | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> str:
    """Find the address of the network port of a device.

    Parameters
    ----------
    physical_id : int
        Index of the device on the server, as in the rank table; not the id within ``ASCEND_RT_VISIBLE_DEVICES``.
    configuration : Path
        File with a line ``address_<id>=...`` or ``IPv6address_<id>=...`` for each device.
    tool : str or Path, optional
        Program that is asked where the file does not exist or says nothing of the device. If it is not given:
        ``hccn_tool`` from ``PATH``, else the one of the driver.
    timeout_s : float
        Seconds that the tool may take, > 0.

    Returns
    -------
    str
        IPv4, else IPv6; empty if there is none.

    Raises
    ------
    ValueError
        `physical_id` is negative.
    BadDeviceAddress
        The file names something that is no address.
    """
    if check_int32("physical_id", physical_id) < 0:
        raise ValueError(f"physical_id is {physical_id}, should be >= 0")
    return _from_configuration(physical_id, configuration) or _from_tool(physical_id, tool, timeout_s)


def _from_configuration(physical_id: int, configuration: Path) -> str:
    try:
        lines = configuration.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    except OSError as error:
        _log.warning("addresses of devices cannot be read: %s", error)
        return ""
    values = {name.strip(): value.strip() for name, equals, value in (line.partition("=") for line in lines) if equals}
    for family, name, _ in _FAMILIES:
        text = values.get(name.format(physical_id), "")
        if not text:
            continue
        address = _valid(text, family)
        if address is None:
            raise BadDeviceAddress(
                f"{configuration} has {name.format(physical_id)}={text!r}, should be an IPv{family} address"
            )
        if address:
            return address
    return ""


def _from_tool(physical_id: int, tool: str | Path | None, timeout_s: float) -> str:
    program = tool or shutil.which(TOOL) or (str(TOOL_OF_DRIVER) if os.access(TOOL_OF_DRIVER, os.X_OK) else None)
    if program is None:
        return ""
    deadline = time.monotonic() + timeout_s
    for family, _, question in _FAMILIES:
        answer = _run([str(program), "-i", str(physical_id), *question], deadline - time.monotonic())
        for text in _ANSWER.findall(answer):
            address = _valid(text, family)
            if address:
                return address
    return ""


def _run(command: list[str], timeout_s: float) -> str:
    """Give what a program writes, or nothing if it fails or takes too long."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that what it starts can be ended with it
        )
    except OSError as error:
        _log.warning("%s cannot be started: %s", command[0], error)
        return ""
    try:
        output, _ = process.communicate(timeout=max(0.0, timeout_s))
    except subprocess.TimeoutExpired:
        _log.warning("%s took longer than its %.1f s", " ".join(command), timeout_s)
        return ""
    finally:
        _end(process)
    if process.returncode:
        _log.info("%s ended with exit status %d", " ".join(command), process.returncode)
        return ""
    return output.decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind: no process, and no pipe that somebody may still hold the other end of."""
    assert process.stdout is not None
    process.stdout.close()
    if process.returncode is None:  # not waited for yet, so its id is still that of its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the driver; nothing more can be done
            process.wait(_GRACE_S)


def _valid(text: str, family: int) -> str | None:
    """Give an address in its usual spelling; empty if it stands for none, None if it is no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version != family:
        return None
    return "" if address.is_unspecified else str(address)
