"""Linking and unlinking between real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheKey, LLMException, LLMRole, LLMStatusCode
from llm_datadist.introspection import describe_links
from tests import datadist_member as dd
from tests.pair import DECODER, PROMPT, Pair, start_decoder, start_prompt
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
LINKED = (OK, [OK])
Members = Callable[[str], Member]


def link_all(state: dd.State, targets: list[tuple[int, int]], timeout: int = 3000) -> Any:
    return state["datadist"].link_clusters([dd.cluster_info(*target) for target in targets], timeout)


def link_from_two_threads(state: dd.State, targets: list[tuple[int, int]]) -> list[Any]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda target: link_all(state, [target]), targets))


def unlink_at(state: dd.State, cluster_id: int, ip: str, port: int) -> Any:
    info = dd.LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(ip, port)
    return state["datadist"].unlink_clusters([info])


def links(state: dd.State) -> list[tuple[int, str, str]]:
    return [(link.cluster_id, link.state, link.transport) for link in describe_links(state["datadist"])]


def wait_for_links(member: Member, expected: list[tuple[int, str, str]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while member.call(links) != expected:
        assert time.monotonic() < deadline, f"{member.name} has {member.call(links)}, expected {expected}"


def offer(member: Member, req_id: int, seed: int) -> None:
    cache = member.call(dd.allocate, 2, (1, 4096), keys=[CacheKey(PROMPT, req_id)])
    member.call(dd.fill, cache, seed)


def pull_and_compare(decoder: Member, req_id: int, seed: int, cluster_id: int = PROMPT) -> None:
    cache = decoder.call(dd.allocate, 2, (1, 4096))
    decoder.call(dd.pull_cache, CacheKey(cluster_id, req_id), cache)
    for tensor in range(2):
        assert decoder.call(dd.read, cache, tensor) == dd.payload(seed, tensor, 4096).tobytes()
    decoder.call(dd.deallocate, cache)


def test_a_link_is_seen_on_both_sides(pair: Pair) -> None:
    assert pair.decoder.call(links) == [(PROMPT, "LINKED", "shared_memory")]
    assert pair.prompt.call(links) == [(DECODER, "LINKED", "shared_memory")]
    pair.decoder.call(dd.check_link, PROMPT)
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == (OK, [LLMStatusCode.LLM_ALREADY_LINK])


def test_unlink_takes_both_sides_down_and_link_works_again(pair: Pair) -> None:
    for _ in range(3):
        assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == LINKED
        assert pair.decoder.call(links) == []
        assert pair.prompt.call(links) == []
        with pytest.raises(LLMException, match="no link to cluster 1") as caught:
            pair.decoder.call(dd.check_link, PROMPT)
        assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
        assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == (OK, [LLMStatusCode.LLM_NOT_YET_LINK])
        assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED


def test_caches_and_keys_survive_unlink_and_link(pair: Pair) -> None:
    offer(pair.prompt, 7, seed=3)
    pair.decoder.call(dd.unlink, PROMPT, pair.port)
    pair.decoder.call(dd.link, PROMPT, pair.port)
    pull_and_compare(pair.decoder, 7, seed=3)


def test_nobody_listens_then_somebody_does(members: Members, free_port: Callable[[], int]) -> None:
    decoder, port = start_decoder(members("decoder")), free_port()
    started = time.monotonic()
    overall, each = decoder.call(dd.link, PROMPT, port, 5000)
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    assert time.monotonic() - started < 2, "a refused connection is known at once"
    start_prompt(members("prompt"), port)
    assert decoder.call(dd.link, PROMPT, port) == LINKED


def test_good_and_bad_clusters_of_a_call_do_not_touch_each_other(
    pair: Pair, members: Members, free_port: Callable[[], int]
) -> None:
    port = free_port()
    start_prompt(members("second"), port, cluster_id=9)
    codes = pair.decoder.call(link_all, [(8, free_port()), (9, port), (PROMPT, pair.port), (9, port)])
    assert codes == (
        LLMStatusCode.LLM_LINK_FAILED,
        [LLMStatusCode.LLM_LINK_FAILED, OK, LLMStatusCode.LLM_ALREADY_LINK, LLMStatusCode.LLM_REPEAT_REQUEST],
    )
    pair.decoder.call(dd.check_link, 9)


def test_the_cluster_id_must_be_the_one_that_listens(pair: Pair) -> None:
    overall, each = pair.decoder.call(dd.link, 77, pair.port)
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    pair.decoder.call(dd.check_link, PROMPT)


def test_unlink_compares_addresses_but_not_ports(pair: Pair) -> None:
    assert pair.decoder.call(unlink_at, PROMPT, "127.0.0.2", pair.port) == (
        LLMStatusCode.LLM_UNLINK_FAILED,
        [LLMStatusCode.LLM_PARAM_INVALID],
    )
    pair.decoder.call(dd.check_link, PROMPT)
    assert pair.decoder.call(unlink_at, PROMPT, "127.0.0.1", 1) == (OK, [OK])


def test_forced_unlink_cleans_one_side(pair: Pair) -> None:
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port, force=True) == LINKED
    assert pair.decoder.call(links) == []
    wait_for_links(pair.prompt, [(DECODER, "BROKEN", "shared_memory")])
    assert pair.prompt.call(dd.unlink, DECODER, pair.port, force=True) == LINKED
    assert pair.prompt.call(links) == []
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED


def test_a_link_that_one_side_forgot_is_replaced(pair: Pair) -> None:
    pair.decoder.call(dd.unlink, PROMPT, pair.port, force=True)
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED
    assert pair.prompt.call(links) == [(DECODER, "LINKED", "shared_memory")]
    offer(pair.prompt, 5, seed=5)
    pull_and_compare(pair.decoder, 5, seed=5)


def test_the_prompt_can_unlink_too(pair: Pair) -> None:
    assert pair.prompt.call(dd.unlink, DECODER, pair.port) == LINKED
    wait_for_links(pair.decoder, [(PROMPT, "BROKEN", "shared_memory")])
    offer(pair.prompt, 5, seed=5)
    cache = pair.decoder.call(dd.allocate, 2, (1, 4096))
    with pytest.raises(LLMException, match="unlink, then link again"):
        pair.decoder.call(dd.pull_cache, CacheKey(PROMPT, 5), cache)
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == (OK, [LLMStatusCode.LLM_ALREADY_LINK])
    assert pair.decoder.call(dd.unlink, PROMPT, pair.port) == LINKED
    assert pair.decoder.call(dd.link, PROMPT, pair.port) == LINKED
    pull_and_compare(pair.decoder, 5, seed=5)


def test_equal_cluster_ids_on_both_sides(members: Members, free_port: Callable[[], int]) -> None:
    port = free_port()
    prompt, decoder = start_prompt(members("prompt"), port, cluster_id=0), start_decoder(members("decoder"), 0)
    assert decoder.call(dd.link, 0, port) == LINKED
    offer(prompt, 1, seed=1)
    pull_and_compare(decoder, 1, seed=1, cluster_id=0)
    assert decoder.call(dd.unlink, 0, port) == LINKED


def test_two_decoders_at_one_prompt(pair: Pair, members: Members) -> None:
    other = start_decoder(members("other"), cluster_id=3)
    assert other.call(dd.link, PROMPT, pair.port) == LINKED
    for number in range(4):
        offer(pair.prompt, number, seed=number)
    for number, decoder in enumerate((pair.decoder, other, pair.decoder, other)):
        pull_and_compare(decoder, number, seed=number)
    assert other.call(dd.unlink, PROMPT, pair.port) == LINKED
    assert pair.prompt.call(links) == [(DECODER, "LINKED", "shared_memory")]


def test_a_second_process_cannot_take_the_id_of_a_living_one(pair: Pair, members: Members) -> None:
    twin = start_decoder(members("twin"))
    overall, each = twin.call(dd.link, PROMPT, pair.port)
    assert (overall, each) == (LLMStatusCode.LLM_LINK_FAILED, [LLMStatusCode.LLM_LINK_FAILED])
    pair.decoder.call(dd.check_link, PROMPT)


def test_one_decoder_at_three_prompts(members: Members, free_port: Callable[[], int]) -> None:
    ports = {cluster_id: free_port() for cluster_id in (1, 5, 6)}
    prompts = {number: start_prompt(members(f"prompt-{number}"), port, number) for number, port in ports.items()}
    decoder = start_decoder(members("decoder"))
    assert decoder.call(link_all, list(ports.items())) == (OK, [OK] * 3)
    for number, prompt in prompts.items():
        offer(prompt, 1, seed=number)
    for number in prompts:
        pull_and_compare(decoder, 1, seed=number, cluster_id=number)


def test_two_threads_link_at_once(members: Members, free_port: Callable[[], int]) -> None:
    ports = {number: free_port() for number in (1, 5)}
    for number, port in ports.items():
        start_prompt(members(f"prompt-{number}"), port, number)
    decoder = start_decoder(members("decoder"))
    results = decoder.call(link_from_two_threads, list(ports.items()))
    busy = (LLMStatusCode.LLM_PROCESSING_LINK, [])
    assert sorted(results, key=str) in ([LINKED, LINKED], sorted([LINKED, busy], key=str))
    decoder.call(link_all, list(ports.items()))
    for number in ports:
        decoder.call(dd.check_link, number)


def test_wrong_calls_are_answered_without_a_peer(pair: Pair) -> None:
    assert pair.decoder.call(link_all, [(number, 1) for number in range(17)]) == (
        LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT,
        [],
    )
    assert pair.decoder.call(link_all, []) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    assert pair.prompt.call(link_all, [(5, 1)]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    with pytest.raises(LLMException, match="is not supported by") as caught:
        pair.prompt.call(dd.check_link, DECODER)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize("role", [LLMRole.DECODER, LLMRole.MIX])
def test_only_a_prompt_listens(role: LLMRole, members: Members, free_port: Callable[[], int]) -> None:
    port, silent, decoder = free_port(), members("silent"), start_decoder(members("decoder"))
    silent.call(dd.init_datadist, role, PROMPT, port=port)
    assert decoder.call(dd.link, PROMPT, port)[0] is LLMStatusCode.LLM_LINK_FAILED


def test_twenty_decoders_link_at_the_same_moment(members: Members, free_port: Callable[[], int]) -> None:
    port = free_port()
    prompt = start_prompt(members("prompt"), port)
    decoders = [start_decoder(members(f"decoder-{number}"), 100 + number, pool_bytes=1 << 20) for number in range(20)]
    calls = [decoder.start(dd.link, PROMPT, port, 10000) for decoder in decoders]
    assert [call.result() for call in calls] == [LINKED] * 20
    assert len(prompt.call(links)) == 20
