"""The link state machine alone."""

from __future__ import annotations

import itertools

import pytest

from llm_datadist.engine.link_state import IllegalTransition, LinkEvent, LinkState, LinkStatus, next_state

LEGAL = {
    (LinkState.UNLINKED, LinkEvent.SET_UP, LinkState.LINKING),
    (LinkState.UNLINKED, LinkEvent.PEER_LOST, LinkState.UNLINKED),
    (LinkState.LINKING, LinkEvent.MADE, LinkState.LINKED),
    (LinkState.LINKING, LinkEvent.ROLLED_BACK, LinkState.UNLINKED),
    (LinkState.LINKED, LinkEvent.TAKE_DOWN, LinkState.UNLINKING),
    (LinkState.LINKED, LinkEvent.PEER_LOST, LinkState.BROKEN),
    (LinkState.UNLINKING, LinkEvent.KEPT, LinkState.LINKED),
    (LinkState.UNLINKING, LinkEvent.CLOSED, LinkState.UNLINKED),
    (LinkState.UNLINKING, LinkEvent.PEER_LOST, LinkState.UNLINKING),
    (LinkState.BROKEN, LinkEvent.TAKE_DOWN, LinkState.UNLINKING),
    (LinkState.BROKEN, LinkEvent.PEER_LOST, LinkState.BROKEN),
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LinkState, LinkEvent)))
def test_each_event_in_each_state(state: LinkState, event: LinkEvent) -> None:
    allowed = [after for before, what, after in LEGAL if (before, what) == (state, event)]
    if allowed:
        assert next_state(state, event) is allowed[0]
    else:
        with pytest.raises(IllegalTransition, match=f"{event.name}.*{state.name}"):
            next_state(state, event)


def test_an_illegal_event_leaves_the_state() -> None:
    status = LinkStatus()
    status.handle(LinkEvent.SET_UP)
    with pytest.raises(IllegalTransition):
        status.handle(LinkEvent.CLOSED)
    assert status.state is LinkState.LINKING
    assert repr(status) == "LinkStatus(LINKING)"


def test_every_way_out_leads_back_to_unlinked() -> None:
    """No state is a trap: from each one UNLINKED can be reached."""
    for start in LinkState:
        reached = {start}
        while True:
            more = {after for before, _, after in LEGAL if before in reached} - reached
            if not more:
                break
            reached |= more
        assert LinkState.UNLINKED in reached
