"""Whether this machine has an Ascend device, and if not, which of the things that it takes is missing.

Four steps, each with a message of its own: the library, its functions, the driver, a visible device. The outcome of
each is kept. The first two only look, and may serve diagnosis; the third starts the runtime in this process, with
threads of the vendor's, so it comes only when somebody asks for a device.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from llm_datadist import _acl, _hccl
from llm_datadist._acl import VISIBLE_DEVICES, AclError, LibraryMissing
from llm_datadist.status import LLMException, LLMStatusCode


class Installation(NamedTuple):
    """What the vendor's software on this machine offers.

    Attributes
    ----------
    paths : tuple of str
        Files of the ACL runtime that were opened.
    missing : tuple of str
        Functions that this release lacks, without which something is done in another way.
    simulator : str or None
        Version of the simulator that stands in for the vendor's library, if one does.
    versions : dict of str to str
        Installed packages of the vendor and their versions, as far as they are known.
    """

    paths: tuple[str, ...]
    missing: tuple[str, ...]
    simulator: str | None
    versions: dict[str, str]


class _Verdict(NamedTuple):
    code: LLMStatusCode
    reason: str  # empty: nothing is missing


_FINE = _Verdict(LLMStatusCode.LLM_SUCCESS, "")
_PACKAGES = ("runtime", "hccl", "hcomm", "driver", "firmware")


def is_available() -> bool:
    """Tell whether an Ascend device can be used; starts the runtime if its library is there."""
    return not (_look_for_library().reason or _start().reason or _count()[1].reason)


def why_unavailable() -> str:
    """Say what is missing for an Ascend device; empty if nothing is. As `is_available` otherwise."""
    return _look_for_library().reason or _start().reason or _count()[1].reason


def require_device(device_id: int) -> None:
    """Make sure that a device can be opened.

    Parameters
    ----------
    device_id : int
        Index among the devices that this process sees.

    Raises
    ------
    LLMException
        LLM_FEATURE_NOT_ENABLED: the vendor's library is missing or too old. LLM_PARAM_INVALID: there are fewer devices.
        LLM_FAILED: there is no driver or no device.
    """
    for step in (_look_for_library, _start):
        _raise_if_missing(step())
    count, verdict = _count()
    _raise_if_missing(verdict)
    if not 0 <= device_id < count:
        reason = f"device {device_id} is not visible: this process sees {count}, numbered from 0; {_visible_devices()}"
        _raise_if_missing(_Verdict(LLMStatusCode.LLM_PARAM_INVALID, f"{reason} (aclrtSetDevice would give 107001)"))


def installation() -> Installation:
    """Describe what is installed, without starting it.

    Raises
    ------
    LibraryMissing
        The ACL runtime is not there, or too old.
    """
    paths, missing = _acl.load()
    found = ((package, _acl.version_of(package)) for package in _PACKAGES)
    return Installation(paths, missing, _acl.simulator(), {name: version for name, version in found if version})


def one_sided_links() -> bool:
    """Tell whether the installed HCCL has the functions of one-sided transfers; False also where there is no HCCL."""
    try:
        return _hccl.one_sided()
    except LibraryMissing:
        return False


def _raise_if_missing(verdict: _Verdict) -> None:
    if verdict.reason:
        raise LLMException(f"an Ascend device cannot be used: {verdict.reason}", status_code=verdict.code)


@functools.cache
def _look_for_library() -> _Verdict:
    """Take steps 1 and 2, which the exception tells apart."""
    try:
        _acl.load()
    except LibraryMissing as error:
        return _Verdict(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, str(error))
    return _FINE


@functools.cache
def _start() -> _Verdict:
    try:
        _acl.initialise()
    except AclError as error:
        reason = f"the driver is missing, or this user may not open its nodes (/dev/davinci*): {error}"
        return _Verdict(LLMStatusCode.LLM_FAILED, reason)
    return _FINE


@functools.cache
def _count() -> tuple[int, _Verdict]:
    try:
        count = _acl.device_count()
    except AclError as error:
        return 0, _Verdict(LLMStatusCode.LLM_FAILED, f"no NPU is visible: {error}")
    if count == 0:
        return 0, _Verdict(LLMStatusCode.LLM_FAILED, f"no NPU is visible; {_visible_devices()}")
    return count, _FINE


def _visible_devices() -> str:
    visible = os.environ.get(VISIBLE_DEVICES)
    return f"{VISIBLE_DEVICES} is not set" if visible is None else f"{VISIBLE_DEVICES} is {visible!r}"
