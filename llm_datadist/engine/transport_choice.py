"""Which transport a link gets: shared memory where both ends can map it, else data connections."""

from __future__ import annotations

from typing import NamedTuple

from llm_datadist.control.messages import Hello
from llm_datadist.engine.link import Identity
from llm_datadist.transports import shared_memory, tcp


class Choice(NamedTuple):
    """What a server decides about a link.

    Attributes
    ----------
    transport : str or None
        Name; None if the two have none in common.
    reason : str
        Why, for the log and the description of the link.
    """

    transport: str | None
    reason: str


def choose(hello: Hello, identity: Identity, allowed: tuple[str, ...]) -> Choice:
    """Choose among what the client offers, in its order, and what this process allows."""
    same_host = hello.host == identity.host
    for offer in hello.transports:
        if offer not in allowed:
            continue
        if offer == shared_memory.NAME and same_host:
            return Choice(offer, "same host and network name space")
        if offer == tcp.NAME:
            return Choice(offer, _why_not_mapped(hello, same_host))
    if shared_memory.NAME in hello.transports and shared_memory.NAME in allowed:
        return Choice(None, f"memory cannot be shared between this host and the client's ({hello.host})")
    return Choice(None, f"the client offers {hello.transports}, this process allows {list(allowed)}")


def _why_not_mapped(hello: Hello, same_host: bool) -> str:
    if hello.reason:
        return hello.reason
    if not same_host:
        return "the peer is on another host or in another network name space"
    whose = "server" if shared_memory.NAME in hello.transports else "client"
    return f"the settings of the {whose} allow tcp alone"
