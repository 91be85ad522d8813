"""switch_role."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.conformance.conftest import Start, StartRemote
from tests.conformance.expectations import LINKED, invalid, refused
from tests.conformance.remote import DECODER, PROMPT, Remote, link_to, payload_slot, slot, target
from tests.datadist_member import cluster_info
from tests.processes import Member

ENABLED = {"llm.EnableSwitchRole": "1"}
EXIST_LINK = LLMStatusCode.LLM_EXIST_LINK
FreePort = Callable[[], int]


@pytest.fixture
def decoder(start: Start) -> LLMDataDist:
    """A decoder that may switch."""
    return start(LLMRole.DECODER, changes=ENABLED)


def listen(port: int) -> dict[str, str]:
    return {"llm.listenIpInfo": f"127.0.0.1:{port}"}


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def switch(state: dd.State, role: LLMRole, options: dict[str, str] | None = None) -> None:
    state["datadist"].switch_role(role, options)


def test_C227_conditions(start: Start, decoder: LLMDataDist) -> None:
    invalid(decoder.switch_role, LLMRole.DECODER, match="role not changed")
    with pytest.raises(TypeError):
        decoder.switch_role(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        decoder.switch_role(LLMRole.MIX, [])  # type: ignore[arg-type]
    decoder.finalize()
    refused(LLMStatusCode.LLM_FEATURE_NOT_ENABLED, start(LLMRole.DECODER).switch_role, LLMRole.MIX)


@pytest.mark.parametrize("switch_options", [None, {}, {"llm.listenIpInfo": "127.0.0.1"}])
def test_C228_a_prompt_needs_an_address(decoder: LLMDataDist, switch_options: Any) -> None:
    text = "ip:port" if switch_options else "listenIpInfo"
    invalid(decoder.switch_role, LLMRole.PROMPT, switch_options, match=text)
    assert decoder.kv_cache_manager.is_initialized()


def test_C229_links_are_in_the_way(
    start_remote: StartRemote, process: Member, decoder: LLMDataDist, free_port: FreePort
) -> None:
    prompt = start_remote(process, LLMRole.PROMPT, PROMPT, ge_options=ENABLED)
    link_to(decoder, prompt)
    address = listen(free_port())
    refused(EXIST_LINK, decoder.switch_role, LLMRole.PROMPT, address)
    with pytest.raises(LLMException) as raised:
        prompt.call(switch, LLMRole.DECODER)
    assert raised.value.status_code is EXIST_LINK
    assert decoder.unlink_clusters([cluster_info(PROMPT, prompt.port or 0)]) == LINKED
    decoder.switch_role(LLMRole.PROMPT, address)
    prompt.call(switch, LLMRole.DECODER)


def test_C230_roles_exchanged(
    start_remote: StartRemote,
    process: Member,
    more_processes: list[Member],
    decoder: LLMDataDist,
    free_port: FreePort,
) -> None:
    old_prompt = start_remote(process, LLMRole.PROMPT, PROMPT, ge_options=ENABLED)
    other = start_remote(more_processes[0], LLMRole.DECODER, 3)
    port = free_port()
    decoder.switch_role(LLMRole.PROMPT, listen(port))
    old_prompt.call(switch, LLMRole.DECODER)
    for number, puller in enumerate((other, old_prompt)):
        described = CacheDesc(2, (1, 256), DataType.DT_UINT8)
        cache = decoder.kv_cache_manager.allocate_cache(described, [CacheKey(DECODER, number)])
        for tensor in range(2):
            tensor_view(cache, tensor)[:] = number + tensor
        assert puller.call(dd.link, DECODER, port) == LINKED
        theirs = puller.call(dd.allocate, 2, (1, 256))
        puller.call(dd.pull_cache, CacheKey(DECODER, number), theirs)
        assert puller.call(dd.read, theirs, 1) == bytes([number + 1]) * 256


def test_C231_a_prompt_that_became_a_decoder(start: Start, remote_prompt: Remote, free_port: FreePort) -> None:
    port = free_port()
    prompt = start(LLMRole.PROMPT, changes={**ENABLED, **listen(port)})
    assert is_listening(port)
    cache = target(prompt.kv_cache_manager)
    cache_id = cache.cache_id
    prompt.switch_role(LLMRole.DECODER)
    assert not is_listening(port)
    manager = prompt.kv_cache_manager
    invalid(manager.allocate_cache, CacheDesc(1, (1, 8), DataType.DT_INT8), [CacheKey(1, 2)])
    assert cache.cache_id == cache_id
    assert slot(cache, 0, 0) == b"\xaa" * 256
    link_to(prompt, remote_prompt)
    remote_prompt.offer(CacheKey(PROMPT, 7))
    manager.pull_cache(CacheKey(PROMPT, 7), cache)
    assert slot(cache, 0, 0) == payload_slot(1, 0, 0)


def test_C232_the_given_options(decoder: LLMDataDist, free_port: FreePort) -> None:
    port = free_port()
    given = {**listen(port), "no.such.key": "5", "llm.SyncKvCacheWaitTime": "70"}
    before = dict(given)
    decoder.switch_role(LLMRole.PROMPT, given)
    assert given == before
    assert is_listening(port)


def test_C233_a_failed_switch(start: Start, remote_prompt: Remote) -> None:
    decoder = start(LLMRole.DECODER, changes=ENABLED)
    with pytest.raises(LLMException):
        decoder.switch_role(LLMRole.PROMPT, listen(remote_prompt.port or 0))
    link_to(decoder, remote_prompt)
    remote_prompt.offer(CacheKey(PROMPT, 7))
    mine = target(decoder.kv_cache_manager)
    decoder.kv_cache_manager.pull_cache(CacheKey(PROMPT, 7), mine)
    assert slot(mine, 0, 0) == payload_slot(1, 0, 0)
