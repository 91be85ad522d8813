"""Addresses of this host's network interfaces."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_address(interface: str) -> str | None:
    """Give the first address of a network interface of this host; None if there is no such interface."""
    if interface not in [name for _, name in socket.if_nameindex()]:  # not from /sys, which may show another name space
        return None
    return _ipv4_of(interface) or _ipv6_of(interface)


def _ipv4_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _ipv6_of(interface: str) -> str | None:
    with open("/proc/net/if_inet6", encoding="ascii") as table:
        for line in table:
            raw, _, _, scope, _, name = line.split()
            if name == interface and int(scope, 16) == 0:  # global: usable from other hosts without a zone
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(raw))
    return None
