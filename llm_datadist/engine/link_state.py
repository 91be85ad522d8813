"""The states of a link and every legal way from one to another; no input or output in here."""

from __future__ import annotations

from enum import Enum


class LinkState(Enum):
    """Where a link stands."""

    UNLINKED = "unlinked"
    LINKING = "linking"
    LINKED = "linked"
    UNLINKING = "unlinking"
    BROKEN = "broken"


class LinkEvent(Enum):
    """What can happen to a link."""

    SET_UP = "set up"  # a handshake starts
    MADE = "made"  # both sides have what they need
    ROLLED_BACK = "rolled back"  # the handshake failed; nothing is left
    TAKE_DOWN = "take down"  # an unlink starts
    KEPT = "kept"  # the unlink found the link in use
    CLOSED = "closed"  # this side has given everything up
    PEER_LOST = "peer lost"  # the kernel says that the peer is gone, or it closed the link


class IllegalTransition(RuntimeError):
    """An event that cannot happen in this state: a mistake in this library."""


_TRANSITIONS = {
    (LinkState.UNLINKED, LinkEvent.SET_UP): LinkState.LINKING,
    (LinkState.LINKING, LinkEvent.MADE): LinkState.LINKED,
    (LinkState.LINKING, LinkEvent.ROLLED_BACK): LinkState.UNLINKED,
    (LinkState.LINKED, LinkEvent.TAKE_DOWN): LinkState.UNLINKING,
    (LinkState.LINKED, LinkEvent.PEER_LOST): LinkState.BROKEN,
    (LinkState.UNLINKING, LinkEvent.KEPT): LinkState.LINKED,
    (LinkState.UNLINKING, LinkEvent.CLOSED): LinkState.UNLINKED,
    (LinkState.UNLINKING, LinkEvent.PEER_LOST): LinkState.UNLINKING,  # it goes away anyway
    (LinkState.BROKEN, LinkEvent.TAKE_DOWN): LinkState.UNLINKING,
    (LinkState.BROKEN, LinkEvent.PEER_LOST): LinkState.BROKEN,
    (LinkState.UNLINKED, LinkEvent.PEER_LOST): LinkState.UNLINKED,  # word of the death came after the unlink
}


def next_state(state: LinkState, event: LinkEvent) -> LinkState:
    """Tell the state that an event leads to.

    Raises
    ------
    IllegalTransition
        The event cannot happen in this state.
    """
    try:
        return _TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"event {event.name} is not possible in link state {state.name}") from None


class LinkStatus:
    """The state of one link; the only place where it changes."""

    def __init__(self) -> None:
        self._state = LinkState.UNLINKED

    @property
    def state(self) -> LinkState:
        return self._state

    def handle(self, event: LinkEvent) -> LinkState:
        """Take an event and return the new state; an illegal one raises and leaves the state as it was."""
        self._state = next_state(self._state, event)
        return self._state

    def __repr__(self) -> str:
        return f"LinkStatus({self._state.name})"
