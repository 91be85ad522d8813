"""Linking: a decoder in this process, its prompts in others, or the reverse."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_datadist import CacheKey, LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.conformance.conftest import Linked, Start, StartRemote
from tests.conformance.expectations import INVALID, LINKED, LITTLE_S, NOT_LINKED, OK, invalid, refused
from tests.conformance.remote import DECODER, PROMPT, Remote, link_to, payload_slot, slot, target
from tests.datadist_member import cluster_info
from tests.processes import Member

LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
UNLINK_FAILED = LLMStatusCode.LLM_UNLINK_FAILED
MIX = LLMRole.MIX


def info_of(remote: Remote) -> LLMClusterInfo:
    return cluster_info(remote.cluster_id, remote.port or 0)


def assert_pulls(decoder: LLMDataDist, prompt: Remote, seed: int = 1) -> None:
    """Offer a cache at the prompt and pull it."""
    prompt.offer(CacheKey(1, 7), seed=seed, hold=False)
    manager = decoder.kv_cache_manager
    mine = target(manager)
    manager.pull_cache(CacheKey(prompt.cluster_id, 7), mine)
    assert slot(mine, 3, 0) == payload_slot(seed, 3, 0)
    manager.deallocate_cache(mine)


def test_C141_link(remote_prompt: Remote, start: Start) -> None:
    decoder = start(LLMRole.DECODER)
    assert decoder.link_clusters([info_of(remote_prompt)]) == LINKED
    assert_pulls(decoder, remote_prompt)


def test_C142_link_again(linked: Linked) -> None:
    assert linked.decoder.link_clusters([info_of(linked.prompt)]) == (OK, [LLMStatusCode.LLM_ALREADY_LINK])


def test_C143_nobody_listens(
    start: Start, start_remote: StartRemote, process: Member, free_port: Callable[[], int]
) -> None:
    decoder, port = start(LLMRole.DECODER), free_port()
    started = time.monotonic()
    overall, each = decoder.link_clusters([cluster_info(PROMPT, port)], 500)
    assert time.monotonic() - started < 0.5 + LITTLE_S
    assert overall is LINK_FAILED
    assert len(each) == 1
    assert each[0] is not OK
    start_remote(process, LLMRole.PROMPT, PROMPT, port=port)
    assert decoder.link_clusters([cluster_info(PROMPT, port)]) == LINKED


def test_C144_something_that_never_answers(start: Start) -> None:
    decoder = start(LLMRole.DECODER)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        overall, each = decoder.link_clusters([cluster_info(PROMPT, silent.getsockname()[1])], 300)
        assert time.monotonic() - started < 0.3 + LITTLE_S
    assert OK not in (overall, *each)


def test_C145_one_good_one_bad(remote_prompt: Remote, start: Start, free_port: Callable[[], int]) -> None:
    decoder = start(LLMRole.DECODER)
    overall, each = decoder.link_clusters([cluster_info(8, free_port()), info_of(remote_prompt)], 1000)
    assert overall is LINK_FAILED
    assert each[0] is not OK
    assert each[1:] == [OK]
    assert_pulls(decoder, remote_prompt)


def test_C146_the_same_cluster_twice(remote_prompt: Remote, start: Start) -> None:
    decoder = start(LLMRole.DECODER)
    info = info_of(remote_prompt)
    assert decoder.link_clusters([info, info])[1] == [OK, LLMStatusCode.LLM_REPEAT_REQUEST]


def test_C147_seventeen_clusters(start: Start) -> None:
    decoder = start(LLMRole.DECODER)
    infos = [cluster_info(number, 1) for number in range(17)]
    assert decoder.link_clusters(infos) == (LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT, [])


@pytest.mark.parametrize(("local", "remote"), [(0, 1), (1, 0), (0, 0), (2, 1), (1, 2)])
def test_C148_addresses(linked: Linked, local: int, remote: int) -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = 5
    for _ in range(local):
        info.append_local_ip_info("127.0.0.1", 0)
    for _ in range(remote):
        info.append_remote_ip_info("127.0.0.1", linked.prompt.port or 0)
    assert linked.decoder.link_clusters([info]) == (INVALID, [])
    assert linked.decoder.link_clusters([]) == (INVALID, [])


@pytest.mark.parametrize("role", [LLMRole.PROMPT, MIX])
def test_C149_only_a_decoder_links(remote_prompt: Remote, start: Start, role: LLMRole) -> None:
    assert start(role).link_clusters([info_of(remote_prompt)]) == (INVALID, [])


@pytest.mark.parametrize("name", ["link_clusters", "unlink_clusters"])
def test_C150_arguments(start: Start, name: str) -> None:
    call: Callable[..., Any] = getattr(start(LLMRole.DECODER), name)
    info = cluster_info(1, 1)
    for timeout in (0, -1):
        invalid(call, [info], timeout, match="should be greater than 0")
    with pytest.raises(TypeError):
        call([info], "1")
    with pytest.raises(ValueError, match="out of range"):
        call([info], 2**31)
    for wrong in (None, info, [1]):
        with pytest.raises(TypeError):
            call(wrong)
    nameless = LLMClusterInfo()
    nameless.append_local_ip_info("127.0.0.1", 0)
    nameless.append_remote_ip_info("127.0.0.1", 1)
    with pytest.raises(TypeError):
        call([nameless])


def test_C151_two_threads(
    remote_prompt: Remote, start_remote: StartRemote, more_processes: list[Member], start: Start
) -> None:
    prompts = [remote_prompt, start_remote(more_processes[0], LLMRole.PROMPT, 5)]
    decoder = start(LLMRole.DECODER)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda prompt: decoder.link_clusters([info_of(prompt)]), prompts))
    busy = (LLMStatusCode.LLM_PROCESSING_LINK, [])
    assert answers.count(busy) <= 1
    assert answers.count(LINKED) + answers.count(busy) == 2
    for prompt in prompts:
        decoder.link_clusters([info_of(prompt)])
        assert_pulls(decoder, prompt)


def test_C152_equal_ids_on_both_sides(start_remote: StartRemote, process: Member, start: Start) -> None:
    prompt = start_remote(process, LLMRole.PROMPT, 0)
    decoder = start(LLMRole.DECODER, 0)
    link_to(decoder, prompt)
    assert_pulls(decoder, prompt)
    assert decoder.unlink_clusters([info_of(prompt)]) == LINKED


def test_C153_two_decoders_at_one_prompt(
    linked: Linked, start_remote: StartRemote, more_processes: list[Member]
) -> None:
    other = start_remote(more_processes[0], LLMRole.DECODER, 3)
    assert other.call(dd.link, PROMPT, linked.prompt.port) == LINKED
    linked.prompt.offer(CacheKey(1, 9), seed=9)
    cache = other.call(dd.allocate, 4, (4, 256))
    other.call(dd.pull_cache, CacheKey(PROMPT, 9), cache)
    assert other.call(dd.read, cache, 0)[:256] == payload_slot(9, 0, 0)
    assert_pulls(linked.decoder, linked.prompt)


def test_C154_three_prompts_at_one_decoder(
    remote_prompt: Remote, start_remote: StartRemote, more_processes: list[Member], start: Start
) -> None:
    others = [start_remote(member, LLMRole.PROMPT, 5 + number) for number, member in enumerate(more_processes)]
    decoder = start(LLMRole.DECODER)
    link_to(decoder, remote_prompt, *others)
    for prompt in (remote_prompt, *others):
        assert_pulls(decoder, prompt, seed=prompt.cluster_id)


def test_C155_unlink(linked: Linked) -> None:
    info = info_of(linked.prompt)
    assert linked.decoder.unlink_clusters([info]) == LINKED
    refused(NOT_LINKED, linked.manager.pull_cache, CacheKey(PROMPT, 7), target(linked.manager))
    assert linked.decoder.link_clusters([info]) == LINKED
    assert_pulls(linked.decoder, linked.prompt)


def test_C156_unlink_without_a_link(remote_prompt: Remote, start: Start) -> None:
    assert start(LLMRole.DECODER).unlink_clusters([info_of(remote_prompt)]) == (OK, [NOT_LINKED])


def test_C157_unlink_compares_the_ip(linked: Linked) -> None:
    def info_at(ip: str, port: int) -> LLMClusterInfo:
        info = LLMClusterInfo()
        info.remote_cluster_id = PROMPT
        info.append_local_ip_info("127.0.0.1", 0)
        info.append_remote_ip_info(ip, port)
        return info

    assert linked.decoder.unlink_clusters([info_at("127.0.0.2", linked.prompt.port or 0)]) == (UNLINK_FAILED, [INVALID])
    linked.decoder.check_link_status(PROMPT)
    assert linked.decoder.unlink_clusters([info_at("127.0.0.1", 1)]) == LINKED


def test_C158_forced_unlink(linked: Linked) -> None:
    info = info_of(linked.prompt)
    assert linked.decoder.unlink_clusters([info], force=True) == LINKED
    refused(NOT_LINKED, linked.decoder.check_link_status, PROMPT)
    assert linked.prompt.call(dd.unlink, DECODER, 1, force=True) == LINKED
    assert linked.decoder.link_clusters([info]) == LINKED
    assert_pulls(linked.decoder, linked.prompt)


def test_C159_force_is_a_bool(start: Start) -> None:
    with pytest.raises(TypeError):
        start(LLMRole.DECODER).unlink_clusters([cluster_info(1, 1)], force=1)  # type: ignore[arg-type]


def test_C163_check_link_status(linked: Linked) -> None:
    linked.decoder.check_link_status(PROMPT)
    refused(NOT_LINKED, linked.decoder.check_link_status, 77)
    with pytest.raises(TypeError):
        linked.decoder.check_link_status("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        linked.decoder.check_link_status(-1)
    linked.decoder.finalize()


def test_C163_a_prompt_does_not_check(start: Start) -> None:
    invalid(start(LLMRole.PROMPT).check_link_status, DECODER, match="is not supported by")


def test_C165_caches_and_keys_survive(linked: Linked) -> None:
    cache = linked.prompt.offer(CacheKey(1, 7), seed=3)
    info = info_of(linked.prompt)
    assert linked.decoder.unlink_clusters([info]) == LINKED
    assert linked.decoder.link_clusters([info]) == LINKED
    mine = target(linked.manager)
    linked.manager.pull_cache(CacheKey(PROMPT, 7), mine)
    assert slot(mine, 0, 0) == payload_slot(3, 0, 0)
    assert linked.prompt.call(dd.read, cache, 0) == dd.payload(3, 0, 1024).tobytes()
