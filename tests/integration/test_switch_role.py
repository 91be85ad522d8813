"""Roles change while caches stay: between real processes, with links made again the other way round."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheKey, LLMException, LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.pair import DECODER, PROMPT, start_decoder, start_prompt
from tests.processes import Member

Members = Callable[[str], Member]
OK = LLMStatusCode.LLM_SUCCESS
LINKED = (OK, [OK])
SWITCHABLE = {"llm.EnableSwitchRole": "1"}


def switch(state: dd.State, role: LLMRole, options: Any = None) -> None:
    state["datadist"].switch_role(role, options)


def switch_to_prompt(state: dd.State, port: int) -> None:
    options = {"llm.listenIpInfo": f"127.0.0.1:{port}", "ge.exec.deviceId": "7"}
    before = dict(options)
    state["datadist"].switch_role(LLMRole.PROMPT, options)
    assert options == before


def code_of(member: Member, function: Any, *args: Any) -> LLMStatusCode:
    with pytest.raises(LLMException) as caught:
        member.call(function, *args)
    return caught.value.status_code


@pytest.fixture
def both(members: Members, free_port: Callable[[], int]) -> tuple[Member, Member, int]:
    """A prompt and a decoder that may switch, linked."""
    port = free_port()
    prompt = start_prompt(members("prompt"), port, ge_options=SWITCHABLE)
    decoder = start_decoder(members("decoder"), ge_options=SWITCHABLE)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    return prompt, decoder, port


def offer(member: Member, cluster_id: int, req_id: int, seed: int) -> int:
    cache = member.call(dd.allocate, 2, (1, 4096), keys=[CacheKey(cluster_id, req_id)])
    member.call(dd.fill, cache, seed)
    return int(cache)


def assert_pulled(member: Member, cluster_id: int, req_id: int, seed: int) -> None:
    cache = member.call(dd.allocate, 2, (1, 4096))
    member.call(dd.pull_cache, CacheKey(cluster_id, req_id), cache)
    for tensor in range(2):
        assert member.call(dd.read, cache, tensor) == dd.payload(seed, tensor, 4096).tobytes()


def test_roles_are_exchanged(both: tuple[Member, Member, int], free_port: Callable[[], int]) -> None:
    prompt, decoder, port = both
    kept = offer(prompt, PROMPT, 5, seed=5)
    for member, role in ((prompt, LLMRole.DECODER), (decoder, LLMRole.PROMPT)):
        options = {"llm.listenIpInfo": f"127.0.0.1:{port}"}
        assert code_of(member, switch, role, options) is LLMStatusCode.LLM_EXIST_LINK
    assert decoder.call(dd.unlink, PROMPT, port) == LINKED
    new_port = free_port()
    prompt.call(switch, LLMRole.DECODER)
    decoder.call(switch_to_prompt, new_port)
    offer(decoder, DECODER, 6, seed=6)
    assert prompt.call(dd.link, DECODER, new_port) == LINKED
    assert_pulled(prompt, DECODER, 6, seed=6)
    # The caches of the old prompt kept their bytes and ids; it may not bind keys now.
    assert prompt.call(dd.read, kept, 0) == dd.payload(5, 0, 4096).tobytes()
    with pytest.raises(LLMException, match="cache_keys is not supported by"):
        offer(prompt, PROMPT, 7, seed=7)
    # Back again: the key that was bound before can be pulled.
    assert prompt.call(dd.unlink, DECODER, new_port) == LINKED
    prompt.call(switch_to_prompt, port)
    decoder.call(switch, LLMRole.DECODER)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    assert_pulled(decoder, PROMPT, 5, seed=5)


def test_the_old_address_does_not_accept_any_more(both: tuple[Member, Member, int], members: Members) -> None:
    prompt, decoder, port = both
    decoder.call(dd.unlink, PROMPT, port)
    prompt.call(switch, LLMRole.DECODER)
    deadline = time.monotonic() + 5
    while decoder.call(dd.link, PROMPT, port, 300) != (
        LLMStatusCode.LLM_LINK_FAILED,
        [LLMStatusCode.LLM_LINK_FAILED],
    ):
        assert time.monotonic() < deadline
    start_prompt(members("successor"), port)  # the port is free for another process
    assert decoder.call(dd.link, PROMPT, port) == LINKED


def test_an_address_in_use_leaves_the_old_role(both: tuple[Member, Member, int]) -> None:
    prompt, decoder, port = both
    decoder.call(dd.unlink, PROMPT, port)
    with pytest.raises(LLMException, match="cannot listen on"):
        decoder.call(switch_to_prompt, port)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    offer(prompt, PROMPT, 1, seed=1)
    assert_pulled(decoder, PROMPT, 1, seed=1)


def test_a_broken_link_counts_until_it_is_unlinked(both: tuple[Member, Member, int]) -> None:
    prompt, decoder, port = both
    decoder.kill()
    deadline = time.monotonic() + 5
    while prompt.call(dd.unlink, DECODER, port) != LINKED:
        assert time.monotonic() < deadline
    prompt.call(switch, LLMRole.MIX)
    assert prompt.call(dd.pool_used) == 0


def test_what_is_refused(members: Members, free_port: Callable[[], int]) -> None:
    member = start_decoder(members("fixed"))
    assert code_of(member, switch_to_prompt, free_port()) is LLMStatusCode.LLM_FEATURE_NOT_ENABLED
    with pytest.raises(LLMException, match="role not changed"):
        member.call(switch, LLMRole.DECODER)
    for role in (1, "PROMPT", None):
        with pytest.raises(TypeError, match="only support"):
            member.call(switch, role)
    with pytest.raises(TypeError, match="only support"):
        member.call(switch, LLMRole.MIX, [])
    for options in (None, {}, {"llm.listenIpInfo": ""}):
        with pytest.raises(LLMException, match="listenIpInfo"):
            member.call(switch, LLMRole.PROMPT, options)
    with pytest.raises(LLMException, match="ip:port"):
        member.call(switch, LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1"})
    with pytest.raises(LLMException, match="ip:port"):
        member.call(switch, LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:1;127.0.0.1:2"})
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        member.call(switch, LLMRole.PROMPT, {"llm.listenIpInfo": "abc:1"})
    with pytest.raises(ValueError, match="should be a number"):
        member.call(switch, LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:x"})
