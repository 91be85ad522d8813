"""Networks for tests that need hosts; they are skipped where none can be made."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator

import pytest

from tests.hosts.namespace import Namespace
from tests.hosts.network import Network

TOOLS = {"nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2", "nft": "nftables"}  # and their Debian packages
TUN = "/dev/net/tun"


@functools.lru_cache(None)
def obstacle() -> str | None:
    """Tell why this process cannot make hosts; None if it can."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"hosts need {tool}, of the Debian package {package}"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"hosts need {TUN}, for wires that delay and lose"
    try:
        Namespace().close()
    except PermissionError as error:
        return f"hosts need network namespaces, which root may make: {error}"
    return None


@pytest.fixture
def network() -> Iterator[Network]:
    """A network without hosts yet; it goes with the test, and all processes on its hosts."""
    why_not = obstacle()
    if why_not is not None:
        pytest.skip(why_not)
    with Network() as made:
        yield made
