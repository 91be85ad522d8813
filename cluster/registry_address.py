"""Addresses of the registry as text: ``tcp://host:port``, with IPv4, IPv6 in brackets, or a host name."""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_PORT = 5510

_SCHEME = "tcp://"


class RegistryAddress(NamedTuple):
    """Where a registry is; `host` has no brackets."""

    host: str
    port: int

    @property
    def endpoint(self) -> str:
        """The address as ZeroMQ takes it."""
        return f"{_SCHEME}{bracketed(self.host)}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is a literal IPv6 address."""
        return ":" in self.host


def parse_registry_address(text: str) -> RegistryAddress:
    """Read an address of a registry.

    Parameters
    ----------
    text : str
        ``tcp://host:port``; the scheme and the port may be left out (`DEFAULT_PORT`). An IPv6 address with a port
        stands in brackets.

    Raises
    ------
    TypeError
        `text` is no str.
    ValueError
        It cannot be read.

    Examples
    --------
    >>> parse_registry_address("tcp://[::1]:6000")
    RegistryAddress(host='::1', port=6000)
    >>> parse_registry_address("registry").endpoint
    'tcp://registry:5510'
    """
    if not isinstance(text, str):
        raise TypeError(f"the address of a registry only supports str, but got {type(text).__name__} {text!r}")
    rest = text[len(_SCHEME) :] if text.startswith(_SCHEME) else text
    host, port = _split(rest)
    if not host or any(character in host for character in "/ []@") or (host.count(":") == 1):
        raise ValueError(f"cannot read the address {text!r} of a registry, should be tcp://host:port")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(f"the address {text!r} of a registry has the port {port!r}, should be in [1, 65535]")
    return RegistryAddress(host, int(port))


def bracketed(host: str) -> str:
    """Put an IPv6 address into brackets, leave other hosts as they are."""
    return f"[{host}]" if ":" in host else host


def _split(rest: str) -> tuple[str, str]:
    default = str(DEFAULT_PORT)
    if rest.startswith("["):
        host, bracket, port = rest[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return "", default
        return host, port[1:] if port else default
    if rest.count(":") > 1:  # an IPv6 address alone
        return rest, default
    host, colon, port = rest.partition(":")
    return host, port if colon else default
