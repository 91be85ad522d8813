"""IPv4 addresses as text and as the integers that link calls use."""

from __future__ import annotations

import socket
import struct


def trans_str_ip(ip: str | int) -> int:
    """Give the integer form of an address: its four bytes read as a little-endian uint32.

    Parameters
    ----------
    ip : str or int
        Dotted text, also in the shortened forms of inet_aton(3) such as ``"127.1"``; an int passes unchanged.

    Raises
    ------
    RuntimeError
        The text is no IPv4 address.

    Examples
    --------
    >>> trans_str_ip("127.0.0.1")
    16777343
    """
    if isinstance(ip, int):
        return ip
    try:
        return int(struct.unpack("<I", socket.inet_aton(ip))[0])
    except (OSError, UnicodeError, ValueError):
        raise RuntimeError(f"Can not parse ip str: {ip!r}, should be an IPv4 address such as 192.168.1.1") from None


def dotted_ip(ip: int) -> str:
    """Give the dotted text of an address in integer form, which is in [0, 2**32)."""
    return socket.inet_ntoa(struct.pack("<I", ip))
