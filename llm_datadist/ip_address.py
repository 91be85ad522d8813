"""Addresses of processes: IPv4 as the integers that link calls use, IPv6 as text, names as what they resolve to."""

from __future__ import annotations

import re
import socket
import struct
from typing import Union

# An address as link calls hold it: IPv4 in integer form, IPv6 as text.
Ip = Union[int, str]

_NAME = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?$")
_ONLY_NUMBERS = re.compile(r"[0-9.]*$")  # no name, though a resolver would be asked for it


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
        raise _no_address(ip, "should be an IPv4 address such as 192.168.1.1") from None


def find_ip(ip: str | int) -> Ip:
    """Give the address that text stands for.

    Parameters
    ----------
    ip : str or int
        IPv4 text or integer form, as of `trans_str_ip`; IPv6 text; or the name of a host, which is resolved now: its
        first IPv4 address, else its first IPv6 address.

    Raises
    ------
    RuntimeError
        The text is nothing of these, or a name that cannot be resolved.
    """
    if isinstance(ip, int):
        return ip
    try:
        return trans_str_ip(ip)
    except RuntimeError:
        if ":" in ip:
            return _ipv6(ip)
    if not _NAME.match(ip) or _ONLY_NUMBERS.match(ip):
        raise _no_address(ip, "should be an IPv4 or IPv6 address, or the name of a host")
    return _resolve(ip)


def _ipv6(text: str) -> str:
    address, percent, zone = text.partition("%")
    try:
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address)) + percent + zone
    except (OSError, UnicodeError, ValueError):
        raise _no_address(text, "should be an IPv6 address such as fd00::1") from None


def _resolve(name: str) -> Ip:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _no_address(name, f"nor is it the name of a host ({error})") from None
    found.sort(key=lambda entry: entry[0] is not socket.AF_INET)
    address = str(found[0][4][0])
    return _ipv6(address) if ":" in address else trans_str_ip(address)


def _no_address(text: str, reason: str) -> RuntimeError:
    return RuntimeError(f"Can not parse ip str: {text!r}, {reason}")


def host_text(ip: Ip) -> str:
    """Give the text of an address: dotted, or IPv6 without brackets."""
    return socket.inet_ntoa(struct.pack("<I", ip)) if isinstance(ip, int) else ip


def split_host_port(text: str) -> tuple[str, str] | None:
    """Split ``host:port``; an IPv6 address stands in brackets. None if the text has another form."""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]:")
        return (host, port) if bracket and ":" not in port else None
    if text.count(":") != 1:
        return None
    host, _, port = text.partition(":")
    return host, port
