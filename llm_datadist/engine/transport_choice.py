"""Which transport a link gets: shared memory where both ends can map it, else data connections."""

from __future__ import annotations

from typing import NamedTuple, Union

from llm_datadist.control.messages import Hello, MemberHello
from llm_datadist.engine.link import Identity
from llm_datadist.transports import hccl, shared_memory, tcp

SAME_HOST = "same host and network name space"

_Hello = Union[Hello, MemberHello]


class Choice(NamedTuple):
    """What the side decides that somebody has come to.

    Attributes
    ----------
    transport : str or None
        Name; None if the two have none in common.
    reason : str
        Why, for the log and the description of the link.
    """

    transport: str | None
    reason: str


def choose(
    hello: _Hello,
    identity: Identity,
    allowed: tuple[str, ...],
    other: str = "the client",
    own: str = "the server",
    *,
    shortfall: str = "",
) -> Choice:
    """Choose among what the one that has come offers, in its order, and what this process allows.

    Parameters
    ----------
    hello : Hello or MemberHello
        What it has said.
    identity : Identity
        Of this process.
    allowed : tuple of str
        By the settings of this process.
    other, own : str
        What the two are called in the reason.
    shortfall : str
        Why this process does not allow a transport that its settings ask for.
    """
    same_host = hello.host == identity.host
    for offer in hello.transports:
        if offer not in allowed:
            continue
        if offer == shared_memory.NAME and same_host:
            return Choice(offer, SAME_HOST)
        if offer == hccl.ONE_SIDED:
            return Choice(offer, "the caches of both are on Ascend devices, and both ask for one-sided transfers")
        if offer == hccl.NAME:
            return Choice(offer, _why_two_sided(hello, allowed, other, own, shortfall))
        if offer == tcp.NAME:
            return Choice(offer, _why_not_mapped(hello, same_host, other, own))
    if shared_memory.NAME in hello.transports and shared_memory.NAME in allowed:
        return Choice(None, f"memory cannot be shared between this host and that of {other} ({hello.host})")
    if (hccl.NAME in hello.transports) != (hccl.NAME in allowed):
        on_device = other if hccl.NAME in hello.transports else own
        return Choice(None, f"the caches of {on_device} are on an Ascend device, those of the other are on the host")
    return Choice(None, f"{other} offers {hello.transports}, {own} allows {list(allowed)}")


def _why_two_sided(hello: _Hello, allowed: tuple[str, ...], other: str, own: str, shortfall: str) -> str:
    if hello.reason or shortfall:
        return hello.reason or shortfall
    if (hccl.ONE_SIDED in hello.transports) != (hccl.ONE_SIDED in allowed):
        whose = own if hccl.ONE_SIDED in hello.transports else other
        return f"the settings of {whose} do not ask for one-sided transfers"
    return "the caches of both are on Ascend devices"


def _why_not_mapped(hello: _Hello, same_host: bool, other: str, own: str) -> str:
    if hello.reason:
        return hello.reason
    if not same_host:
        return "the peer is on another host or in another network name space"
    whose = own if shared_memory.NAME in hello.transports else other
    return f"the settings of {whose} allow tcp alone"
