"""When links over HCCL are one-sided, and what is said when they are not."""

from __future__ import annotations

import pytest

from llm_datadist.control.messages import Hello
from llm_datadist.engine import network as settings
from llm_datadist.engine.link import Identity
from llm_datadist.engine.options import NetworkOptions
from llm_datadist.engine.transport_choice import choose
from llm_datadist.status import LLMException

BOTH, SENDING = ("hccl_one_sided", "hccl"), ("hccl",)
HERE = Identity(1, bytes(16), "a host", False)


def hello(transports: tuple[str, ...], reason: str = "") -> Hello:
    return Hello(2, 1, 0, bytes(16), "a host", list(transports), reason, 1000, False)


@pytest.mark.parametrize(
    ("offers", "reason", "allowed", "shortfall", "transport", "why"),
    [
        (BOTH, "", BOTH, "", "hccl_one_sided", "both ask for one-sided"),
        (BOTH, "", SENDING, "", "hccl", "the settings of the server do not ask"),
        (SENDING, "", BOTH, "", "hccl", "the settings of the client do not ask"),
        (SENDING, "its HCCL is old", BOTH, "", "hccl", "its HCCL is old"),
        (BOTH, "", SENDING, "our HCCL is old", "hccl", "our HCCL is old"),
        (SENDING, "", SENDING, "", "hccl", "the caches of both are on Ascend devices"),
    ],
)
def test_both_ends_have_to_ask(
    offers: tuple[str, ...], reason: str, allowed: tuple[str, ...], shortfall: str, transport: str, why: str
) -> None:
    choice = choose(hello(offers, reason), HERE, allowed, shortfall=shortfall)
    assert choice.transport == transport
    assert why in choice.reason


def test_memory_of_the_host_is_never_reached_by_it() -> None:
    assert choose(hello(BOTH), HERE, ("shared_memory", "tcp")).transport is None
    with pytest.raises(LLMException, match="hccl_one_sided.*should be one of auto, shared_memory, tcp"):
        settings.network(NetworkOptions(transport="hccl_one_sided"))


def test_links_in_cache_manager_mode_send_and_receive() -> None:
    found = settings.network(NetworkOptions(transport="hccl_one_sided"), on_ascend=True, cache_manager=True)
    assert found.transports == SENDING
    assert "cache-manager mode" in found.reason


def test_nothing_is_missing_where_nothing_was_asked_for() -> None:
    for name in ("auto", "hccl"):
        found = settings.network(NetworkOptions(transport=name), on_ascend=True)
        assert (found.transports, found.reason) == (SENDING, "")
